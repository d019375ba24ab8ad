"""MiniMax-M3's hyperparameters, out of a checkpoint's `config.json`.

Two forms are read: the published one (`sparse_attention_config`, `moe_layer_freq`,
`n_shared_experts`) and the one that transformers saves again (`layer_types`, `mlp_layer_types`,
`index_*`). llama.cpp's graph fixes much that a config could state otherwise, such as the
activation's constants; whatever it would compute differently is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m3cli.errors import ModelError
from m3cli.model.preflight import nonsense
from m3cli.model.shape import Indexer

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURE = "minimax-m3"

_UNLIKE_M3 = "m3 converts MiniMax-M3; for a variant of it, use a converter that was made for that variant."
_INCOMPLETE = "Take config.json from the published checkpoint, as it stands beside the weights."

# What llama.cpp computes whatever the config says (src/models/minimax-m3.cpp): key → values it may have.
_FIXED: dict[str, tuple[object, ...]] = {
    "scoring_func": ("sigmoid",),
    "hidden_act": ("swigluoai", "silu"),  # transformers saves "silu" for the same activation
    "swiglu_alpha": (1.702,),
    "swiglu_beta": (1.0,),
    "swiglu_limit": (7.0,),
    "use_gemma_norm": (True,),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_head",),
    "attention_output_gate": (False,),
    "use_routing_bias": (True,),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}
_FIXED_SPARSE: dict[str, tuple[object, ...]] = {
    "use_sparse_attention": (True,),
    "sparse_score_type": ("max",),
    "sparse_init_block": (0,),
}


@dataclass(frozen=True, slots=True)
class HParams:
    """Shape of the text model. Sizes are in elements, blocks of sparse attention in tokens.

    The first `dense_layers` have a dense MLP and full attention; the rest route between experts
    and attend sparsely. `shared_ff` is the width of all shared experts together.
    """

    layers: int
    dense_layers: int
    hidden: int
    vocab_size: int
    context_length: int
    rms_eps: float
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    dense_ff: int
    experts: int
    experts_used: int
    expert_ff: int
    shared_experts: int
    expert_scale: float
    index_heads: int
    index_dim: int
    index_top_k: int
    index_block: int
    index_local: int

    @property
    def shared_ff(self) -> int:
        """Width of the shared experts, which llama.cpp runs as one."""
        return self.shared_experts * self.expert_ff


class _Section:
    """One JSON object of the config; errors name the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix

    def section(self, key: str) -> _Section:
        value = self._values.get(key)
        if value is None:
            return _Section(self.path, {}, f"{self._prefix}{key}.")
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return _Section(self.path, value, f"{self._prefix}{key}.")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key, default)
        if value is None:
            raise self.missing(key)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self._wrong(key, value, "a count")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if not value:
            raise self._wrong(key, value, "a count of at least 1")
        return value

    def number(self, key: str) -> float:
        value = self._values.get(key)
        if value is None:
            raise self.missing(key)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def per_layer(self, key: str, layers: int, *, on: object = None) -> tuple[bool, ...] | None:
        """One switch a layer, or None without the key: equal to `on`, or simply true."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != layers:
            raise self._wrong(key, value, f"a list with one entry for each of the {layers} layers")
        return tuple(bool(entry) if on is None else entry == on for entry in value)

    def require(self, fixed: Mapping[str, tuple[object, ...]]) -> None:
        for key, allowed in fixed.items():
            if key in self._values and self._values[key] not in allowed:
                shown = _shown(self._values[key])
                raise ModelError(
                    f"{self.path} sets {self._prefix}{key} to {shown}; llama.cpp computes "
                    f"{ARCHITECTURE} with {allowed[0]!r} only, so a conversion would give wrong answers.",
                    _UNLIKE_M3,
                )

    def require_plain(self) -> None:
        """Refuse values that are objects: parameters for each type of layer, which are not read."""
        for key, value in self._values.items():
            if isinstance(value, Mapping):
                raise self._wrong(key, value, "a number or a text")

    def missing(self, *keys: str) -> ModelError:
        named = " or ".join(self._prefix + key for key in keys)
        return ModelError(f"{self.path} does not state {named}.", _INCOMPLETE)

    def _wrong(self, key: str, value: object, wanted: str) -> ModelError:
        return ModelError(
            f"{self.path} sets {self._prefix}{key} to {_shown(value)}, not to {wanted}.", _INCOMPLETE
        )


def read_hparams(directory: Path) -> HParams:
    """Read `config.json` of the checkpoint in `directory`.

    Raises ModelError, naming file and key, when it is missing or broken, describes another model,
    or states something that llama.cpp's `minimax-m3` does not compute.
    """
    path = directory / "config.json"
    whole = _Section(path, read_json(path))
    kind = whole.get("model_type")
    if not str(kind).startswith("minimax_m3"):
        raise ModelError(
            f"{path} describes a model of type {_shown(kind)}; m3 converts MiniMax-M3 "
            "('minimax_m3_vl') only.",
            "For other models, use llama.cpp's convert_hf_to_gguf.py.",
        )
    config = whole.section("text_config") if whole.get("text_config") is not None else whole
    whole.require({"tie_word_embeddings": (False,)})
    config.require(_FIXED)
    sparse = config.section("sparse_attention_config")
    sparse.require(_FIXED_SPARSE)
    layers = config.positive("num_hidden_layers")
    head_dim = config.positive("head_dim")
    expert_ff = config.positive("intermediate_size")
    dense_layers = _dense_layers(config, sparse, layers)

    def indexer(saved: str, published: str) -> int:
        if config.get(saved) is None and sparse.get(published) is None:
            raise config.missing(saved, f"sparse_attention_config.{published}")
        return config.positive(saved) if sparse.get(published) is None else sparse.positive(published)

    result = HParams(
        layers=layers,
        dense_layers=dense_layers,
        hidden=config.positive("hidden_size"),
        vocab_size=config.positive("vocab_size"),
        context_length=config.positive("max_position_embeddings"),
        rms_eps=config.number("rms_norm_eps"),
        heads=config.positive("num_attention_heads"),
        kv_heads=config.positive("num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, head_dim),
        rope_theta=_rope_theta(config),
        dense_ff=config.positive("dense_intermediate_size"),
        experts=config.positive("num_local_experts"),
        experts_used=config.positive("num_experts_per_tok"),
        expert_ff=expert_ff,
        shared_experts=config.positive("n_shared_experts", 1),
        expert_scale=config.number("routed_scaling_factor"),
        index_heads=indexer("index_n_heads", "sparse_num_index_heads"),
        index_dim=indexer("index_head_dim", "sparse_index_dim"),
        index_top_k=indexer("index_topk_blocks", "sparse_topk_blocks"),
        index_block=indexer("index_block_size", "sparse_block_size"),
        index_local=indexer("index_local_blocks", "sparse_local_block"),
    )
    config.require({"shared_intermediate_size": (expert_ff,)})
    indexer_shape = Indexer(
        result.index_heads, result.index_dim, result.index_top_k, result.index_block, result.index_local
    )
    wrong = nonsense(
        indexer_shape,
        layers=result.layers,
        dense_layers=result.dense_layers,
        heads=result.heads,
        kv_heads=(result.kv_heads,),
        context_length=result.context_length,
        rotated=result.rotary_dim,
        experts=result.experts,
        experts_used=result.experts_used,
    )
    if wrong:
        raise ModelError(f"{path} has {wrong}, which llama.cpp cannot run.", _UNLIKE_M3)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError, naming the file, when there is none."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"There is no {path.name} in {path.parent}.",
            "Name the directory of a downloaded checkpoint, with its config, index and tokenizer files.",
        ) from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:  # also JSONDecodeError, UnicodeDecodeError
        raise ModelError(
            f"{path} is not valid JSON: {error}.", "The file may be cut short; download it again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object.", "Take the file from the published checkpoint.")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dense_layers(config: _Section, sparse: _Section, layers: int) -> int:
    """How many layers lead with a dense MLP; the indexer has to sit on exactly the others."""
    routed = config.per_layer("mlp_layer_types", layers, on="sparse")
    routed = routed or config.per_layer("moe_layer_freq", layers)
    if routed is None:
        raise config.missing("moe_layer_freq", "mlp_layer_types")
    attention = config.per_layer("layer_types", layers, on="minimax_m3_sparse")
    attention = attention or sparse.per_layer("sparse_attention_freq", layers)
    if attention is None:
        raise config.missing("sparse_attention_config.sparse_attention_freq", "layer_types")
    dense = layers - sum(routed)
    index_value = sparse.per_layer("sparse_disable_index_value", layers)
    if (
        routed != (False,) * dense + (True,) * (layers - dense)
        or attention != routed
        or (index_value is not None and not all(index_value[dense:]))
    ):
        raise ModelError(
            f"{config.path} arranges dense and sparse layers as llama.cpp cannot: it needs all dense layers "
            "first, and score-only sparse attention on exactly the layers with experts.",
            _UNLIKE_M3,
        )
    return dense


def _rotary_dim(config: _Section, head_dim: int) -> int:
    """Channels of a head that are rotated. A saved `rotary_dim` may be stale, so the factor goes first."""
    rope = config.section("rope_parameters")
    for section in (rope, config):
        if section.get("partial_rotary_factor") is not None:
            rotary = int(head_dim * section.number("partial_rotary_factor"))
            break
    else:
        if config.get("rotary_dim") is None:
            raise config.missing("partial_rotary_factor", "rotary_dim")
        rotary = config.positive("rotary_dim")
    if not 0 < rotary <= head_dim or rotary % 2:
        raise ModelError(
            f"{config.path} rotates {rotary} of {head_dim} channels of a head, which is no even part.",
            _INCOMPLETE,
        )
    return rotary


def _rope_theta(config: _Section) -> float:
    rope = config.section("rope_parameters")
    rope.require({"rope_type": ("default",), "type": ("default",)})
    rope.require_plain()
    return config.number("rope_theta") if rope.get("rope_theta") is None else rope.number("rope_theta")
