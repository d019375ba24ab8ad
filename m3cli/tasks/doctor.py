"""`m3 doctor`: look at everything that m3 needs and say what is wrong."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m3cli import __version__
from m3cli.engine.local import system_facts
from m3cli.errors import M3Error
from m3cli.model.catalog import resolve
from m3cli.settings import cache_dir, user_file
from m3cli.tasks.model import open_model

if TYPE_CHECKING:
    from m3cli.settings import Settings


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found. `llama_cpp` is None when it does not load; `problems` are sentences."""

    m3: str
    python: str
    llama_cpp: dict[str, Any] | None
    git: str | None
    model: str
    cache: str
    settings_file: str
    settings: tuple[tuple[str, object, str], ...]
    problems: tuple[str, ...]


def diagnose(settings: Settings) -> Diagnosis:
    """Look at llama.cpp, the model that would be used, git and the settings. Raises nothing of its own."""
    problems: list[str] = []
    facts: dict[str, Any] | None = None
    try:
        facts = system_facts()
    except M3Error as error:
        problems.append(str(error))
    model = "none"
    try:
        with open_model(resolve(settings.model, settings.models)) as opened:
            shape = opened.shape
            model = f"{opened.ref.name} ({shape.architecture}, {shape.context_length:,} tokens of context)"
    except M3Error as error:
        problems.append(str(error))
    return Diagnosis(
        m3=__version__,
        python=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        llama_cpp=facts,
        git=shutil.which("git"),
        model=model,
        cache=str(cache_dir()),
        settings_file=f"{user_file()}{'' if user_file().exists() else ' (not there)'}",
        settings=tuple(settings.items()),
        problems=tuple(problems),
    )
