"""MiniMax-M3's hyperparameters come out of config.json, or the reason why they cannot."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.errors import ModelError
from quantize.hparams import HParams, read_hparams, read_json
from scripts.make_shape_gguf import MINIMAX_M3

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")
DROP = object()


def published(layers: int = 60, dense: int = 3) -> dict[str, Any]:
    """config.json in the published style, with the real model's values."""
    sparse = [0] * dense + [1] * (layers - dense)
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "image_token_index": 200025,
        "text_config": {
            "architectures": ["MiniMaxM3SparseForCausalLM"],
            "hidden_size": 6144,
            "intermediate_size": 3072,
            "dense_intermediate_size": 12288,
            "shared_intermediate_size": 3072,
            "num_hidden_layers": layers,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 200064,
            "max_position_embeddings": 1048576,
            "rms_norm_eps": 1e-06,
            "use_gemma_norm": True,
            "attention_output_gate": False,
            "rope_theta": 5000000,
            "rotary_dim": 64,
            "partial_rotary_factor": 0.5,
            "hidden_act": "swigluoai",
            "swiglu_alpha": 1.702,
            "swiglu_beta": 1.0,
            "swiglu_limit": 7.0,
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "tie_word_embeddings": False,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "routed_scaling_factor": 2.0,
            "moe_layer_freq": sparse,
            "num_mtp_modules": 7,
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_num_index_heads": 4,
                "sparse_index_dim": 128,
                "sparse_topk_blocks": 16,
                "sparse_block_size": 128,
                "sparse_local_block": 1,
                "sparse_init_block": 0,
                "sparse_score_type": "max",
                "sparse_attention_freq": sparse,
                "sparse_disable_index_value": sparse,
            },
        },
        "vision_config": {"hidden_size": 1280, "num_hidden_layers": 32, "model_type": "clip_vision_model"},
    }


def changed(changes: dict[str, Any], config: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config with some values, at dotted places, replaced or dropped."""
    result = copy.deepcopy(published() if config is None else config)
    for place, value in changes.items():
        *parents, key = place.split(".")
        section = result
        for parent in parents:
            section = section[parent]
        if value is DROP:
            del section[key]
        else:
            section[key] = value
    return result


def text(changes: dict[str, Any]) -> dict[str, Any]:
    return changed({f"text_config.{key}": value for key, value in changes.items()})


def read(directory: Path, config: object) -> HParams:
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_hparams(directory)


def refusal(directory: Path, config: object) -> str:
    """The message of the refusal, which has to name the file and to say what to do."""
    with pytest.raises(ModelError) as caught:
        read(directory, config)
    assert str(directory / "config.json") in caught.value.message
    assert caught.value.hint
    return caught.value.message


def saved_as_dict(config: Any, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")


def saved_with_model(config: Any, directory: Path) -> None:
    config.save_pretrained(directory)


def saved_text_alone(config: Any, directory: Path) -> None:
    config.text_config.save_pretrained(directory)


SMALL = {
    "num_hidden_layers": 5,
    "moe_layer_freq": [0, 0, 1, 1, 1],
    "hidden_size": 96,
    "intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 80,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rotary_dim": 8,
    "partial_rotary_factor": 0.25,
    "rope_theta": 12345.5,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 3e-5,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.5,
    "sparse_attention_config.sparse_num_index_heads": 2,
    "sparse_attention_config.sparse_index_dim": 16,
    "sparse_attention_config.sparse_topk_blocks": 5,
    "sparse_attention_config.sparse_block_size": 64,
    "sparse_attention_config.sparse_local_block": 2,
    "sparse_attention_config.sparse_attention_freq": [0, 0, 1, 1, 1],
    "sparse_attention_config.sparse_disable_index_value": [0, 0, 1, 1, 1],
}


def test_the_real_model(tmp_path: Path) -> None:
    """The published form gives the real model's numbers."""
    hparams = read(tmp_path, published())
    assert hparams == MINIMAX_M3
    assert hparams.shared_ff == 3072


def test_the_width_of_shared_experts(tmp_path: Path) -> None:
    """llama.cpp runs all shared experts as one, as wide as they are together."""
    assert read(tmp_path, text({"n_shared_experts": 2})).shared_ff == 2 * 3072


@pytest.mark.parametrize("save", [saved_as_dict, saved_with_model, saved_text_alone])
@pytest.mark.parametrize("changes", [{}, SMALL, {"sparse_attention_config.sparse_block_size": 64}])
def test_what_transformers_saves_reads_the_same(
    tmp_path: Path, save: Callable[[Any, Path], None], changes: dict[str, Any]
) -> None:
    """The config that transformers makes of the published one, and saves again, has the same numbers."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig

    config = text(changes)
    save(MiniMaxM3VLConfig.from_dict(changed({"vision_config": {}}, config)), tmp_path)
    saved = read_hparams(tmp_path)
    assert "sparse_attention_config" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert saved == read(tmp_path, config)
    assert (saved == MINIMAX_M3) == (not changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"index_n_heads": 2, "index_head_dim": 64, "index_topk_blocks": 8, "index_block_size": 64},
        {"index_local_blocks": 3},
        {"layer_types": ["minimax_m3_sparse"] * 60, "mlp_layer_types": ["sparse"] * 60},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ],
)
def test_a_config_that_says_it_twice(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Where both forms of a value stand in one config and differ, the one that transformers takes counts."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig

    config = text({**changes, "sparse_attention_config.sparse_disable_index_value": DROP})
    MiniMaxM3VLConfig.from_dict(changed({"vision_config": {}}, config)).save_pretrained(tmp_path)
    assert read_hparams(tmp_path) == read(tmp_path, config)


@pytest.mark.parametrize("factor", [0.25, 0.5, 0.3, 1.0])
def test_rotated_channels_are_those_of_transformers(tmp_path: Path, factor: float) -> None:
    """The factor says how much of a head is rotated, whatever a stale rotary_dim says beside it."""
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLRotaryEmbedding

    config = text({"partial_rotary_factor": factor})
    reference: Any = MiniMaxM3VLConfig.from_dict(changed({"vision_config": {}}, config))
    frequencies = MiniMaxM3VLRotaryEmbedding(reference.text_config).inv_freq
    assert read(tmp_path, config).rotary_dim == 2 * len(frequencies)


def test_rotary_dim_counts_where_no_factor_is_given(tmp_path: Path) -> None:
    """Without a factor rotary_dim is taken at its word; without either the config is refused."""
    assert read(tmp_path, text({"partial_rotary_factor": DROP, "rotary_dim": 32})).rotary_dim == 32
    neither = text({"partial_rotary_factor": DROP, "rotary_dim": DROP})
    assert "does not state text_config.partial_rotary_factor or text_config.rotary_dim" in refusal(
        tmp_path, neither
    )


@pytest.mark.parametrize("kind", ["llama", "minimax_m2", None, 3, ["minimax_m3_vl"], "x" * 999])
def test_another_model_is_refused(tmp_path: Path, kind: object) -> None:
    """A checkpoint of another model is named by its type, in a message of bounded length."""
    message = refusal(tmp_path, changed({"model_type": kind}))
    assert f"describes a model of type {kind!r}"[:60] in message
    assert len(message) < 300 + len(str(tmp_path))
    assert "of type None" in refusal(tmp_path, {})


REQUIRED = [
    "hidden_size",
    "intermediate_size",
    "dense_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "num_local_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "moe_layer_freq",
    "sparse_attention_config.sparse_num_index_heads",
    "sparse_attention_config.sparse_index_dim",
    "sparse_attention_config.sparse_topk_blocks",
    "sparse_attention_config.sparse_block_size",
    "sparse_attention_config.sparse_local_block",
    "sparse_attention_config.sparse_attention_freq",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    """Nothing is guessed: a config without a value, or with null for it, says which one it lacks."""
    for value in (DROP, None):
        message = refusal(tmp_path, text({key: value}))
        assert "does not state" in message
        assert f"text_config.{key}" in message


@pytest.mark.parametrize("section", ["sparse_attention_config", "rope_parameters"])
@pytest.mark.parametrize("value", [[], "yes", 1])
def test_a_section_that_is_no_object_is_named(tmp_path: Path, section: str, value: object) -> None:
    """Where an object is expected, something else is shown with its place."""
    message = refusal(tmp_path, text({section: value}))
    assert f"sets text_config.{section} to {value!r}, not to an object" in message


def test_a_text_config_that_is_no_object_is_named(tmp_path: Path) -> None:
    """The text model's section is an object, or the config is refused."""
    assert "sets text_config to [1], not to an object" in refusal(tmp_path, changed({"text_config": [1]}))


COUNTS = [key for key in REQUIRED if not key.endswith(("_freq", "_factor", "_theta", "_eps"))]


@pytest.mark.parametrize("key", [*COUNTS, "n_shared_experts"])
@pytest.mark.parametrize("value", ["60", 60.0, True, [60], -1, 0, 1 << 31, {}])
def test_a_count_is_a_whole_number(tmp_path: Path, key: str, value: object) -> None:
    """Texts, fractions, booleans, negative and absurd numbers are no counts."""
    message = refusal(tmp_path, text({key: value}))
    assert f"sets text_config.{key} to {value!r}, not to a count" in message


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "routed_scaling_factor"])
@pytest.mark.parametrize("value", ["1", True, [1.0], 0, -1e-6, float("nan"), float("inf"), 10**400])
def test_a_number_is_positive_and_finite(tmp_path: Path, key: str, value: object) -> None:
    """Python's JSON knows NaN and Infinity; a network does not."""
    message = refusal(tmp_path, text({key: value}))
    assert f"sets text_config.{key} to {str(value)[:50]}" in message.replace("'", "")
    assert "not to a positive number" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("hidden_act", "gelu"),
        ("swiglu_alpha", 1.0),
        ("swiglu_beta", 0.0),
        ("swiglu_limit", 8.0),
        ("swiglu_limit", list(range(999))),
        ("use_gemma_norm", False),
        ("use_qk_norm", False),
        ("qk_norm_type", "per_layer"),
        ("attention_output_gate", True),
        ("use_routing_bias", False),
        ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "yarn", "factor": 4}),
        ("shared_intermediate_size", 1024),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("sparse_attention_config.use_sparse_attention", False),
        ("sparse_attention_config.sparse_score_type", "mean"),
        ("sparse_attention_config.sparse_init_block", 1),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path, key: str, value: object) -> None:
    """A variant whose graph is not the one that llama.cpp has fixed would be converted to nonsense."""
    message = refusal(tmp_path, text({key: value}))
    place = "rope_parameters.rope_type" if key == "rope_parameters" else key
    assert f"sets text_config.{place} to " in message
    assert "llama.cpp computes minimax-m3 with" in message
    assert len(message) < 300 + len(str(tmp_path))


def test_tied_embeddings_of_the_whole_model_are_refused(tmp_path: Path) -> None:
    """The switch counts also where it stands outside the text model's section."""
    assert "sets tie_word_embeddings to True" in refusal(tmp_path, changed({"tie_word_embeddings": True}))


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_layer_freq": [1, 0] + [1] * 58},
        {"moe_layer_freq": [0] * 3 + [1] * 56 + [0]},
        {"moe_layer_freq": [0] * 2 + [1] * 58},
        {"sparse_attention_config.sparse_attention_freq": [0] * 4 + [1] * 56},
        {"sparse_attention_config.sparse_attention_freq": [1] * 60},
        {"sparse_attention_config.sparse_disable_index_value": [0] * 4 + [1] * 56},
        {"sparse_attention_config.sparse_disable_index_value": [1] * 59 + [0]},
        {"layer_types": ["full_attention"] * 60},
        {"mlp_layer_types": ["sparse"] * 3 + ["dense"] * 57},
    ],
)
def test_another_arrangement_of_layers_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Dense layers lead, and the others have experts, sparse attention and no index values."""
    assert "arranges dense and sparse layers as llama.cpp cannot" in refusal(tmp_path, text(changes))


@pytest.mark.parametrize(
    "key",
    [
        "moe_layer_freq",
        "mlp_layer_types",
        "layer_types",
        "sparse_attention_config.sparse_attention_freq",
        "sparse_attention_config.sparse_disable_index_value",
    ],
)
@pytest.mark.parametrize("value", [[1] * 59, [], 1, "1" * 60, {"0": 1}])
def test_a_list_of_layers_has_one_entry_each(tmp_path: Path, key: str, value: object) -> None:
    """A list that is too short, or none, is refused with its place and the number of layers."""
    message = refusal(tmp_path, text({key: value}))
    assert f"sets text_config.{key} to {repr(value)[:50]}" in message
    assert "a list with one entry for each of the 60 layers" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparse_attention_config.sparse_num_index_heads": 1}, "1 indexer heads for 4 KV heads"),
        ({"num_key_value_heads": 8}, "4 indexer heads for 8 KV heads"),
        ({"num_attention_heads": 62}, "62 heads, no multiple of 4 KV heads"),
        ({"sparse_attention_config.sparse_index_dim": 32}, "of which 64 would be rotated"),
        ({"sparse_attention_config.sparse_block_size": 96}, "blocks of 96 tokens, which is no power of two"),
        (
            {"max_position_embeddings": 64},
            "blocks of 128 tokens, which is no power of two within the context",
        ),
        ({"sparse_attention_config.sparse_local_block": 17}, "17 local blocks of 16 a query"),
        ({"num_experts_per_tok": 129}, "128 experts, of which a token would use 129"),
        ({"num_local_experts": 30_000_000}, "30,000,000 experts"),
        ({"num_local_experts": 1025}, "1,025 experts"),
        (
            {
                "moe_layer_freq": [0] * 60,
                "sparse_attention_config.sparse_attention_freq": [0] * 60,
            },
            "no sparse layer: all",
        ),
    ],
)
def test_numbers_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """What would fail an assertion of llama.cpp's is refused before weights are read."""
    message = refusal(tmp_path, text(changes))
    assert words in message
    assert "which llama.cpp cannot run" in message


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e6},
        {"type": "yarn", "factor": 4.0, "rope_theta": 5e6},
        {"full_attention": {"rope_theta": 1e4}, "minimax_m3_sparse": {"rope_theta": 5e6}},
    ],
)
def test_another_rope_is_refused(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Stretched positions, by either name of the key, and parameters for each type of layer."""
    assert "rope_parameters" in refusal(tmp_path, text({"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("changes", "rotary"),
    [
        ({"partial_rotary_factor": 0.4}, 51),
        ({"partial_rotary_factor": 1.5}, 192),
        ({"partial_rotary_factor": 0.001}, 0),
        ({"partial_rotary_factor": DROP, "rotary_dim": 63}, 63),
        ({"partial_rotary_factor": DROP, "rotary_dim": 130}, 130),
    ],
)
def test_a_part_of_a_head_that_cannot_be_rotated(
    tmp_path: Path, changes: dict[str, Any], rotary: int
) -> None:
    """Channels are rotated in pairs, and no more of them than a head has."""
    assert f"rotates {rotary} of 128 channels of a head, which is no even part" in refusal(
        tmp_path, text(changes)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (json.dumps(published()).encode()[:-40], "is not valid JSON"),
        (b"<html>404</html>", "is not valid JSON"),
        (b'{"model_type": "\xff\xfe"}', "is not valid JSON"),
        (json.dumps(published()).encode("utf-16"), "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"model_type": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b'"minimax_m3_vl"', "holds no JSON object"),
        (b"null", "holds no JSON object"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    """What is no JSON object is told from one, whatever the reason."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_hparams(tmp_path)
    assert caught.value.message.startswith(f"{path} {words}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A directory without config.json, or no directory at all, is no checkpoint."""
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError) as caught:
            read_hparams(directory)
        assert caught.value.message == f"There is no config.json in {directory}."
        assert "downloaded checkpoint" in caught.value.hint


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """The system's words are passed on."""
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Is a directory\."):
        read_hparams(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Not a directory\."):
        read_hparams(tmp_path / "file")


def places(value: object, prefix: str = "") -> Iterator[str]:
    """The dotted place of each value of a config."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield prefix + key
            yield from places(inner, f"{prefix}{key}.")


TEXT = st.text(st.characters(), max_size=9)  # lone surrogates too, which JSON can spell
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=9,
)
ENTRIES = st.sampled_from([0, 1, None, "dense", "sparse", "minimax_m3_sparse"]) | JSON
VALUES = (
    st.sampled_from([1 << 31, 10**400, 0.5, 1e300, -0.0, DROP])
    | st.integers(0, 300)
    | st.lists(ENTRIES, min_size=4, max_size=4)
    | JSON
)


def value_or_error(read: Callable[[Path], T], path: Path) -> T | ModelError:
    try:
        return read(path)
    except ModelError as error:
        return error


SAVED_KEYS = (
    "index_n_heads",
    "index_block_size",
    "layer_types",
    "mlp_layer_types",
    "rope_parameters",
    "rope_scaling",
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([*places(published()), *(f"text_config.{key}" for key in SAVED_KEYS)]),
        VALUES,
        max_size=3,
    )
)
def test_no_config_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    """However odd the values, they are hyperparameters that fit each other or a ModelError."""
    directory = tmp_path_factory.getbasetemp()
    config = published(4, 1)
    for place, value in sorted(changes.items(), reverse=True):  # inner places before those around them
        if value is not DROP or place in places(config):
            config = changed({place: value}, config)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hparams = value_or_error(read_hparams, directory)
    if isinstance(hparams, ModelError):
        assert str(directory / "config.json") in str(hparams).encode("utf-8").decode()
        assert hparams.hint
        return
    assert hparams.layers > hparams.dense_layers
    assert hparams.heads % hparams.kv_heads == 0
    assert 0 < hparams.rotary_dim <= min(hparams.head_dim, hparams.index_dim)
    assert 0 < hparams.index_local <= hparams.index_top_k


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_content_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """Whatever a file holds, it is a JSON object or a ModelError."""
    path = tmp_path_factory.getbasetemp() / "content.json"
    path.write_bytes(content)
    value = value_or_error(read_json, path)
    assert isinstance(value, dict) or str(path) in value.message
