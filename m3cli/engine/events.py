"""What goes into an engine and what every engine streams out of it.

The order of a run is `LoadProgress* Loaded Restored? Prefilled+ Token* Finished`, with `Notice`, `Saved`
and `NotSaved` anywhere, and `Updated` after a `Prefilled`. A run that was asked to stop ends with `Stopped`
instead.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# What opens and closes a model's reasoning, by family. Engines show these tokens, although they are
# control tokens in most vocabularies: whoever reads the answer has to see where the reasoning ends.
THINK_TAGS = {
    "<think>": "</think>",
    "<mm:think>": "</mm:think>",
    "<thinking>": "</thinking>",
    "<seed:think>": "</seed:think>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
}

KVType = Literal["f16", "q8_0", "q4_0"]

# full: a model without sparse attention; sparse: MiniMax Sparse Attention (MSA) runs; dense: a model that
# was trained with MSA runs without it, which changes its answers.
Attention = Literal["full", "sparse", "dense"]

Update = Literal["exact", "inplace", "auto"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; `temperature` 0 is greedy and ignores the other values.

    All but `repeat_penalty`: more than 1 makes tokens less likely that are among the last 64, which
    keeps very small models from going round in circles; 1 leaves them alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repeat_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is loaded and its context made. Sizes are in tokens.

    `gpu_layers` −1 puts every layer on the GPU that the build and the device can take.
    `threads` 0 leaves the choice to the engine (physical cores). A model that would run with another
    attention than it was trained with is refused unless `allow_dense`.

    Where weights go: `tensor_overrides` are pairs of a regular expression and the name of a buffer type,
    such as `("ffn_.*_exps", "CPU")`; the first that matches a tensor's name decides. `main_gpu` −1
    divides the layers among all GPUs, by the proportions of `tensor_split` if there are any; another
    number puts all of them on that GPU. With `op_offload`, a GPU computes large batches of layers whose
    weights are in main memory. `no_host` keeps those out of the GPU's pinned memory. `mmap` maps the file
    instead of reading it, `mlock` keeps the weights from being swapped out.

    `lora` are adapters, each a GGUF file and the scale that it is applied with. With `in_place`, the context
    has what it takes to be updated in place; not for models with sparse attention, which would run densely.
    """

    model_path: str
    n_ctx: int
    n_batch: int = 512
    n_ubatch: int = 512
    threads: int = 0
    gpu_layers: int = -1
    kv_type_k: KVType = "f16"
    kv_type_v: KVType = "f16"
    flash_attention: bool = True
    allow_dense: bool = False
    tensor_overrides: tuple[tuple[str, str], ...] = ()
    main_gpu: int = -1
    tensor_split: tuple[float, ...] = ()
    op_offload: bool = True
    no_host: bool = False
    mmap: bool = True
    mlock: bool = False
    lora: tuple[tuple[str, float], ...] = ()
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where KV caches are kept between runs. `max_bytes` 0 takes a share of the disk.

    During a long prefill the cache is saved every `checkpoint_seconds`. `model_digest` is that of
    m3cli.model.digest, `model_name` what people call it.
    """

    directory: str
    model_digest: str
    model_name: str
    max_bytes: int = 0
    checkpoint_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and when to stop. End-of-generation tokens always stop.

    The first `prefix` tokens are shared with other prompts: their KV cache is saved once it is computed,
    under `label`; without `save`, only what was computed when the run is stopped, or for long, is. With
    `exact`, what is reused is cut back to where a run without reuse would have cut its batches, so that both
    compute the same numbers; without, all that agrees is reused. With a `schema`, a JSON schema as text, the
    answer is JSON that it describes, if `max_tokens` suffice. `update` says how a context is brought up to
    date that was computed of other tokens in part: `exact` computes all behind the first that differs,
    `inplace` those that differ, and `auto` takes what m3cli.engine.inplace chooses.

    For a server that makes its own tokens, `messages` are roles and texts, and `variables` go to its chat
    template; `tokens` are then what m3 takes the prompt for.
    """

    tokens: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    prefix: int = 0
    label: str = ""
    exact: bool = True
    schema: str = ""
    save: bool = True
    update: Update = "exact"
    messages: tuple[tuple[str, str], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Share of the weights loaded so far, 0 to 1."""

    fraction: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """Weights and context are ready. `description` is llama.cpp's, e.g. `llama 135M Q4_1`."""

    seconds: float
    n_ctx: int
    description: str
    attention: Attention


@dataclass(frozen=True, slots=True)
class Restored:
    """The KV cache of the first `tokens` need not be computed: they come from this process or the disk."""

    tokens: int
    seconds: float
    source: Literal["memory", "disk"]


@dataclass(frozen=True, slots=True)
class Updated:
    """A context was updated in place: `edits` replaced, `computed` tokens of the `tokens` it has now.

    `staleness` is that of m3cli.engine.edits. What was not computed counts as restored.
    """

    tokens: int
    edits: int
    computed: int
    staleness: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    """The KV cache of the first `tokens` is on the disk, in `nbytes` bytes."""

    tokens: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class NotSaved:
    """A KV cache that should have been saved could not be; `text` is a whole sentence that says why."""

    text: str


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the KV cache, `seconds` after prefill began.

    The first of a run counts what was restored.
    """

    done: int
    total: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `text` holds whole characters only and may be empty.

    Bytes of a character that is not complete yet wait for the token that completes it.
    """

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should hear once, such as a work-around that was switched on."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: an end-of-generation token (`stop`), or `max_tokens` reached (`length`).

    `staleness` is that of the context; see Updated.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    restored_tokens: int = 0
    staleness: float = 0.0


@dataclass(frozen=True, slots=True)
class Stopped:
    """The end of a run that was asked to stop: `done` prompt tokens computed, `saved` of them on the disk."""

    done: int
    saved: int


Event = (
    LoadProgress
    | Loaded
    | Restored
    | Updated
    | Prefilled
    | Saved
    | NotSaved
    | Token
    | Notice
    | Finished
    | Stopped
)
_EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def event_message(event: Event) -> dict[str, Any]:
    """An event as JSON, for another process."""
    return {"event": type(event).__name__, **asdict(event)}


def event_of(message: Mapping[str, Any]) -> Event:
    """The event of such a message. Raises KeyError, TypeError for what is none."""
    values = dict(message)
    return _EVENTS[values.pop("event")](**values)


def request_message(request: Request) -> dict[str, Any]:
    """A request as JSON, but for its tokens."""
    return {name: value for name, value in asdict(replace(request, tokens=())).items() if name != "tokens"}


def request_of(message: Mapping[str, Any], tokens: Sequence[int]) -> Request:
    """The request of such a message. Raises KeyError, TypeError for what is none."""
    values = dict(message)
    return Request(tokens, sampling=Sampling(**values.pop("sampling")), **values)


class Engine(Protocol):
    """Something that continues a prompt. A context manager, so that its process ends with it."""

    def generate(self, request: Request) -> Iterator[Event]:
        """Stream the continuation of `request`.

        Raises ModelError or MachineError when the model cannot be loaded or its context not be
        made, EngineCrashError when the process that runs it dies.
        """
        ...

    def stop(self) -> None:
        """Have the generation end with Stopped that runs in another thread, if one does."""
        ...

    def close(self) -> None:
        """Free everything; may be called twice."""
        ...

    def __enter__(self) -> Engine: ...
    def __exit__(self, *exc_info: object) -> None: ...
