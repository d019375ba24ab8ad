"""What becomes of options: the values that tasks take."""

from __future__ import annotations

import os
import re
import sys
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console

    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.corpus.order import Order
    from m3cli.engine.endpoint import Endpoint
    from m3cli.engine.events import CacheConfig, Engine, EngineConfig, Sampling
    from m3cli.engine.snapshots import SnapshotStore
    from m3cli.report.ask_console import AskConsole
    from m3cli.report.chat_console import ChatConsole
    from m3cli.report.eval_console import EvalConsole
    from m3cli.settings import Settings
    from m3cli.tasks.configure import RunOptions
    from m3cli.tasks.context import ContextRequest
    from m3cli.tasks.costs import Prices


_ALL = 2**31 - 1  # layers
# What says how a model runs on this machine, and how a flag is called that is not called so.
_HERE_ONLY = {
    "kv_type": "",
    "kv_type_v": "",
    "ubatch": "",
    "flash_attention": "",
    "threads": "",
    "lora": "",
    "gpu_layers": "",
    "cpu_moe_layers": "--cpu-moe and --n-cpu-moe",
    "override_tensor": "",
    "tensor_split": "",
    "main_gpu": "",
    "op_offload": "",
    "no_host": "",
    "mmap": "",
    "mlock": "",
    "server": "",
    "update": "",
    "checkpoint_every": "",
    "top_k": "",
}


def settings(options: Mapping[str, object], project: Path | bytes | None = None) -> Settings:
    """The settings, with those among a command's `options` that were given; the rest is passed over.

    Options have the names of settings; `project` stands in for the project file. Raises UsageError.
    """
    from m3cli.settings import Settings, load_settings

    given = {name: options[name] for name in Settings.__dataclass_fields__ if name in options}
    flags = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    if options.get("cpu_moe"):
        flags["cpu_moe_layers"] = _ALL
    every = flags.get("checkpoint_every")
    if isinstance(every, str):
        flags["checkpoint_every"] = seconds(every, "--checkpoint-every")
    return load_settings(flags, project=project)


def stdout_console() -> Console:
    """Tables on standard output; not cut at 80 columns when that is a pipe."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def read_stdin() -> bytes:
    """All of standard input. Raises UsageError when it is closed."""
    if sys.stdin is None:
        raise UsageError("Standard input is closed.", "Pipe or redirect something into m3.")
    return sys.stdin.buffer.read()


def read_input(name: str, option: str) -> bytes:
    """The content of a file, or of standard input for `-`. Raises UsageError."""
    if name == "-":
        return read_stdin()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UsageError(
            f"The file {name} of {option} cannot be read: {error.strerror}.",
            "Name a readable file, or - for standard input.",
        ) from error


def corpus_request(
    paths: list[str],
    settings: Settings,
    *,
    files_from: str | None,
    null: bool,
    no_ignore: bool,
    order: Literal["auto"] | Order = "path",
    ref: str | None = None,
    outputs: tuple[Path, ...] = (),
    question: str = "",
    compress: bool = False,
    strip_comments: bool = False,
    diff: str | None = None,
    log: int = 0,
) -> CorpusRequest:
    """What to read. Raises UsageError if nothing is named or the path list cannot be read."""
    from m3cli.corpus.corpus import CorpusRequest
    from m3cli.corpus.documents import DocumentLimits
    from m3cli.corpus.extract import ExtractOptions
    from m3cli.corpus.sources import WalkOptions, read_path_list

    listed: list[str] = []
    if files_from is not None:
        if files_from == "-" and "-" in paths:
            raise UsageError(
                "Standard input cannot be both the list of paths and a document.",
                "Put the list into a file and name that with --files-from.",
            )
        listed = read_path_list(read_input(files_from, "--files-from"), nul=null)
    if not paths and not listed:
        raise UsageError("There is nothing to read.", "Name a directory, a file, or - for standard input.")
    given_limit = settings.max_file_size if settings.origins.get("max_file_size") else None
    return CorpusRequest(
        paths=tuple(paths),
        listed=tuple(listed),
        walk=WalkOptions(
            include=settings.include,
            exclude=settings.exclude,
            use_ignore_files=not no_ignore,
            hidden=settings.hidden,
        ),
        limits=DocumentLimits(max_bytes=settings.max_file_size, explicit_max_bytes=given_limit),
        extract=ExtractOptions(html=settings.html_text, outputs=settings.notebook_outputs),
        outputs=outputs,
        question=question,
        compress=compress,
        strip_comments=strip_comments,
        diff=diff,
        log=log,
        ref=ref,
        order=order,
    )


def order(settings: Settings) -> Literal["auto"] | Order:
    """The order of files. One that stays as it is suits contexts that are updated in place."""
    stays = settings.update == "inplace" and not settings.endpoint
    return "path" if settings.order == "auto" and stays else settings.order


def context_request(
    corpus: CorpusRequest | None,
    settings: Settings,
    *,
    allow_dense: bool,
    asks: bool = False,
    reviews: bool = False,
) -> ContextRequest:
    """How the model is to run on `corpus`, for a command that `asks` questions of it, `reviews`, or neither.

    Raises UsageError for settings that exclude each other.
    """
    from m3cli.model.catalog import ModelRef, resolve
    from m3cli.settings import cache_dir
    from m3cli.tasks.context import Caching, ContextRequest

    remote = _endpoint(settings) if asks or reviews else None
    if remote is not None:
        model = ModelRef(settings.model or "", Path(), "remote", remote.url)
    else:
        model = resolve(settings.model, settings.models)
    return ContextRequest(
        corpus=corpus,
        model=model,
        endpoint=remote,
        state_dir=cache_dir(),
        strategy=settings.strategy,
        recap={"auto": None, "on": True, "off": False}[settings.recap],
        quote_first=asks and settings.quote_first,
        think=settings.think if "think" in settings.origins else None,
        ctx=settings.ctx,
        max_tokens=settings.max_tokens,
        run=run_options(settings, allow_dense=allow_dense),
        servers=cache_dir() / "servers" if settings.server else None,
        caching=Caching(cache_dir(), settings.cache_size, settings.checkpoint_every)
        if settings.cache
        else None,
    )


def _endpoint(settings: Settings) -> Endpoint | None:
    """The server that answers in place of this machine, if one is named. Raises UsageError."""
    if not settings.endpoint:
        return None
    from m3cli.engine.endpoint import Endpoint

    for name, flag in _HERE_ONLY.items():
        if settings.origins.get(name, "").startswith("--"):
            raise UsageError(
                f"With --endpoint, the server decides how the model runs: it is not told "
                f"{flag or settings.origins[name]}.",
                "Leave it out.",
            )
    key = api_key(settings.api_key_env) if settings.api_key_env else ""
    return Endpoint.parse(settings.endpoint, api_key=key, model=settings.model)


def api_key(name: str) -> str:
    """The key that an environment variable holds. Raises UsageError."""
    key = os.environ.get(name, "")
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise UsageError(
            f"The variable {name} of --api-key-env holds no key.",
            f"Set it to one word of printable ASCII characters: export {name}=…",
        )
    return key


def run_options(settings: Settings, *, allow_dense: bool = False) -> RunOptions:
    """How the model is to run. Raises UsageError for settings that are malformed or exclude each other."""
    from m3cli.tasks.configure import RunOptions

    kv_type = settings.kv_type if "kv_type" in settings.origins else None
    if settings.update == "inplace":
        kv_type = kv_type or "f16"  # other keys cannot be moved
    values = kv_type if settings.kv_type_v == "same" else settings.kv_type_v
    flash = settings.flash_attention != "off"
    quantized = next((name for name in (kv_type, values) if name not in (None, "f16")), None)
    if not flash and quantized:
        raise UsageError(
            f"A {quantized} KV cache needs flash attention, which is switched off.",
            "Leave out --flash-attention off, or use --kv-type f16.",
        )
    return RunOptions(
        type_k=kv_type,
        type_v=values,
        n_ubatch=settings.ubatch or None,
        gpu_layers=settings.gpu_layers if settings.gpu_layers >= 0 else None,
        cpu_experts=settings.cpu_moe_layers if settings.cpu_moe_layers >= 0 else None,
        flash_attention=flash,
        allow_dense=allow_dense,
        threads=settings.threads,
        tensor_overrides=tuple(map(_override, settings.override_tensor)),
        tensor_split=_shares(settings.tensor_split),
        main_gpu=settings.main_gpu,
        op_offload=settings.op_offload,
        no_host=settings.no_host,
        mmap=settings.mmap,
        mlock=settings.mlock,
        lora=tuple(map(_adapter, settings.lora)),
        update=settings.update,
    )


def prices(settings: Settings) -> Prices:
    """What tokens and energy cost."""
    from m3cli.tasks.costs import Prices

    return Prices(settings.price_in, settings.price_out, settings.price_kwh, settings.watts)


def _override(text: str) -> tuple[str, str]:
    """`REGEX=BUFFER`, as llama.cpp's own tools take it."""
    pattern, _, buffer = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"The pattern of --override-tensor {text} is no regular expression: {error}.",
            "Write it as exps=CPU, a pattern and a buffer type.",
        ) from error
    if not pattern or not buffer:
        raise UsageError(
            f"--override-tensor {text} names no buffer type.",
            "Write it as exps=CPU, a pattern and a buffer type.",
        )
    return pattern, buffer


def _shares(text: str) -> tuple[float, ...]:
    if not text:
        return ()
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,9}(\.\d{1,9})?", word.strip()) for word in words):
        raise UsageError(
            f"The value {text!r} of --tensor-split is no list of shares.",
            "Write one for each GPU, as in 3,1.",
        )
    shares = tuple(map(float, words))
    if not any(shares):
        raise UsageError(f"All shares of --tensor-split {text} are 0.", "Write one for each GPU, as in 3,1.")
    return shares


def _adapter(text: str) -> tuple[str, float]:
    """`FILE` or `FILE:SCALE`; a file whose name ends in a colon and a number is named with its scale."""
    name, _, scale = text.rpartition(":")
    if name and re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", scale):
        return name, float(scale)
    return text, 1.0


def note_demo(
    console: AskConsole | ChatConsole | EvalConsole, context: ContextRequest, settings: Settings
) -> None:
    """Say that nobody chose the model."""
    if context.model.origin == "demo" and settings.model is None:
        console.note(
            "note: using the bundled demo model, which is for trying m3 out; name a real one with --model"
        )


def sampling(settings: Settings) -> Sampling:
    """How tokens are chosen."""
    from m3cli.engine.events import Sampling

    return Sampling(
        settings.temperature,
        settings.top_p,
        settings.top_k,
        settings.min_p,
        settings.seed,
        settings.repeat_penalty,
    )


def open_engine(config: EngineConfig, cache: CacheConfig | None) -> Engine:
    """The engine of this machine."""
    from m3cli.engine.local import LocalEngine
    from m3cli.settings import cache_dir

    return LocalEngine(config, state_dir=cache_dir(), cache=cache)


def snapshots() -> SnapshotStore:
    """The saved contexts of this user; what is damaged is told on stderr."""
    from m3cli.engine.snapshots import SnapshotStore
    from m3cli.report.text import printable, stderr_console
    from m3cli.settings import cache_dir, load_settings

    def report(sentence: str) -> None:
        stderr_console().print(f"note: {printable(sentence)}", style="dim", markup=False)

    return SnapshotStore(cache_dir() / "snapshots", max_bytes=load_settings({}).cache_size, report=report)


def question_lines() -> Iterator[str]:
    """Lines that a person types, with editing and a history; or those of standard input."""
    from m3cli.cli.lines import piped, typed
    from m3cli.settings import cache_dir

    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        return typed(cache_dir() / "chat-history")
    return piped(sys.stdin)


def seconds(text: str, option: str) -> int:
    """`90`, `30s`, `5m` or `2h` in seconds. Raises UsageError."""
    return _number(text, option, {"": 1, "S": 1, "M": 60, "H": 3600}, "a time, such as 30s, 5m or 2h")


def nbytes(text: str, option: str) -> int:
    """`48G` in bytes, in powers of 1,000 as the names of published files count. Raises UsageError."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    return _number(text, option, units | {f"{unit}B": n for unit, n in units.items()}, "a size, such as 48G")


def _number(text: str, option: str, units: Mapping[str, int], wanted: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([A-Z]*)", text.strip().upper())
    number = int(Decimal(match[1]) * units.get(match[2], 0)) if match else 0
    if not number:
        raise UsageError(f"The value {text!r} of {option} is not {wanted}.", f"Give {option} {wanted}.")
    return number
