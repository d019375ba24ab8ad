"""Defaults < user file < project file < environment < flags; the origin of each value is kept.

The user file is `config.toml` in the platform's config directory (or the file `M3_CONFIG` names):

    model = "m3"                     # a path or an alias
    kv_type = "q8_0"
    [models]                         # aliases
    m3 = "/models/MiniMax-M3-Q2_K_L-00001-of-00004.gguf"

The project file is `.m3.toml` in the current directory. It comes with a repository that somebody
else may have written, so it may only say what to pack, never which model to load or how.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from m3cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT_FILE = ".m3.toml"


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set outside a single command. Sizes are in tokens or bytes as named.

    `ctx` 0 is the model's own context length, `max_tokens` 0 a share of the window that the
    planner chooses, `threads` 0 all physical cores, `gpu_layers` −1 as many as the device takes, `ubatch` 0,
    `cpu_moe_layers` −1 and `main_gpu` −1 are for the planner to choose, `cache_size` 0 is a share of the
    disk; `checkpoint_every` is in seconds. Prices are for a million tokens, `watts` is what the machine
    draws; 0 is unknown.
    """

    model: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    endpoint: str = ""
    api_key_env: str = ""
    ctx: int = 0
    max_tokens: int = 0
    strategy: Literal["auto", "whole", "select", "sweep"] = "auto"
    recap: Literal["auto", "on", "off"] = "auto"
    quote_first: bool = False
    order: Literal["auto", "churn", "path", "given", "dependency", "relevance"] = "auto"
    think: Literal["off", "on", "adaptive"] = "off"
    kv_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    kv_type_v: Literal["same", "f16", "q8_0", "q4_0"] = "same"
    flash_attention: Literal["auto", "on", "off"] = "auto"
    threads: int = 0
    gpu_layers: int = -1
    ubatch: int = 0
    cpu_moe_layers: int = -1
    override_tensor: tuple[str, ...] = ()
    tensor_split: str = ""
    main_gpu: int = -1
    op_offload: bool = True
    no_host: bool = False
    mmap: bool = True
    mlock: bool = False
    lora: tuple[str, ...] = ()
    server: bool = True
    cache: bool = True
    cache_size: int = 0
    checkpoint_every: int = 300
    update: Literal["exact", "inplace", "auto"] = "exact"
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.0
    seed: int = 0
    repeat_penalty: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    hidden: bool = False
    html_text: bool = False
    notebook_outputs: bool = False
    max_file_size: int = 2_000_000
    review_context: Literal["diff", "related", "repo"] = "related"
    review_ignore: tuple[str, ...] = ()
    min_severity: Literal["info", "warning", "error"] = "info"
    fail_on: Literal["warning", "error", "never"] = "error"
    max_findings: int = 0
    price_in: float = 0.0
    price_out: float = 0.0
    watts: float = 0.0
    price_kwh: float = 0.3
    origins: Mapping[str, str] = field(default_factory=dict)

    def items(self) -> list[tuple[str, object, str]]:
        """(name, value, origin) of every setting, in the order of the class."""
        return [
            (f.name, getattr(self, f.name), self.origins.get(f.name, "default"))
            for f in fields(self)
            if f.name != "origins"
        ]


_LARGEST_FILE = 1_000_000  # bytes; a settings file is a few lines
# Smallest and largest value of each number; ggml takes at most 512 threads.
_RANGES: dict[str, tuple[float, float]] = {
    "ctx": (0, 2**31 - 1),
    "max_tokens": (0, 2**31 - 1),
    "threads": (0, 512),
    "gpu_layers": (-1, 2**31 - 1),
    "ubatch": (0, 2**20),
    "cpu_moe_layers": (-1, 2**31 - 1),
    "main_gpu": (-1, 1023),
    "cache_size": (0, 2**63 - 1),
    "checkpoint_every": (1, 2**31 - 1),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (0, 2**32 - 2),
    "repeat_penalty": (1, 10),
    "max_file_size": (1, 2**63 - 1),
    "max_findings": (0, 2**31 - 1),
    "price_in": (0, 1e9),
    "price_out": (0, 1e9),
    "watts": (0, 1e9),
    "price_kwh": (0, 1e9),
}
_WITH_COLONS = frozenset({"lora", "override_tensor", "review_ignore"})  # lists whose items hold colons
_PROJECT_MAY_SET = frozenset(
    {
        "exclude",
        "fail_on",
        "hidden",
        "html_text",
        "include",
        "max_file_size",
        "max_findings",
        "min_severity",
        "notebook_outputs",
        "review_context",
        "review_ignore",
    }
)
_CHOICES = {
    name: get_args(hint) for name, hint in get_type_hints(Settings).items() if get_origin(hint) is Literal
}


def load_settings(
    flags: Mapping[str, object],
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    project: Path | bytes | None = None,
) -> Settings:
    """Settings from all layers; a flag that is None was not given.

    `project` is a file, or the content of one, to take in place of the project file in `cwd`.

    Raises UsageError, naming file and key, for a file that is no TOML, an unknown key, a value of
    the wrong type, and a project file that sets what it may not.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def layer(found: Mapping[str, object], origin: Callable[[str], str]) -> None:
        for name, value in found.items():
            values[name] = _checked(name, value, origin(name))
            origins[name] = origin(name)

    user = user_file(environ)
    layer(read_toml(user, follow=True), lambda _: str(user))
    if isinstance(project, bytes):
        place, from_project = PROJECT_FILE, _parse_toml(project, PROJECT_FILE)
    elif project is not None:
        if not project.exists():
            raise UsageError(f"There is no settings file {project}.", "Check the spelling of --config.")
        place, from_project = str(project), read_toml(project, follow=True)
    else:
        file = Path(PROJECT_FILE) if cwd is None else cwd / PROJECT_FILE
        place, from_project = str(file), read_toml(file, follow=False)
    for name in sorted(from_project.keys() - _PROJECT_MAY_SET):
        raise UsageError(
            f"{place} sets '{name}', which a project file may not.",
            f"A project file may set {', '.join(sorted(_PROJECT_MAY_SET))}; put the rest into {user}.",
        )
    layer(from_project, lambda _: place)
    names = {f"M3_{f.name.upper()}": f.name for f in fields(Settings) if f.name not in ("origins", "models")}
    layer(
        {name: _parsed(name, environ[variable]) for variable, name in names.items() if environ.get(variable)},
        lambda name: f"M3_{name.upper()}",
    )
    layer({k: v for k, v in flags.items() if v is not None}, lambda name: f"--{name.replace('_', '-')}")
    return Settings(**values, origins=origins)


def user_file(environ: Mapping[str, str] | None = None) -> Path:
    """The user's configuration file, which need not exist."""
    environ = os.environ if environ is None else environ
    if named := environ.get("M3_CONFIG"):
        return Path(named)
    import platformdirs

    return platformdirs.user_config_path("m3") / "config.toml"


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where m3 keeps what it can make again: `M3_CACHE_DIR`, else the platform's cache directory."""
    environ = os.environ if environ is None else environ
    if named := environ.get("M3_CACHE_DIR"):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("m3")


def read_toml(path: Path, *, follow: bool) -> dict[str, object]:
    """Read a settings file, empty if there is none. A stranger's file is not followed if it is a link."""
    try:
        status = path.stat() if follow else path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise UsageError(f"{path} is no settings file: not a small regular file.", "Remove or rename it.")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Repair or remove the file.") from error
    return _parse_toml(data, str(path))


def _parse_toml(data: bytes, place: str) -> dict[str, object]:
    try:
        values: dict[str, object] = tomllib.loads(data[:_LARGEST_FILE].decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{place} is not valid TOML: {error}.", "Repair or remove the file.") from error
    return values


def _parsed(name: str, text: str) -> object:
    """The value of an environment variable, as the setting's type; text where that fails."""
    default = Settings.__dataclass_fields__[name].default
    if isinstance(default, bool):
        return {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    if isinstance(default, (int, float)):
        try:
            return type(default)(text)
        except ValueError:
            return text
    separator = ";" if name in _WITH_COLONS else os.pathsep
    return tuple(text.split(separator)) if isinstance(default, tuple) else text


def _checked(name: str, value: object, origin: str) -> object:
    if name == "origins" or name not in Settings.__dataclass_fields__:
        known = ", ".join(f.name for f in fields(Settings) if f.name != "origins")
        raise UsageError(f"{origin} sets '{name}', which m3 does not know.", f"Settings are: {known}.")
    default = Settings.__dataclass_fields__[name].default
    if name == "gpu_layers" and isinstance(value, str):  # `auto`, or a flag's digits
        value = -1 if value == "auto" else int(value) if value.isdecimal() and len(value) < 10 else value
    if (
        isinstance(value, (list, tuple))
        and isinstance(default, tuple)
        and all(isinstance(v, str) for v in value)
    ):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(default, float):
        value = float(value)
    if name == "models":
        right = isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values())
    elif name == "model":
        right = isinstance(value, str)
    else:
        right = type(value) is type(default)
    if not right:
        wanted = {"models": "a table of texts", "model": "a text"}.get(name, f"like {default!r}")
        raise UsageError(f"{origin} sets '{name}' to {value!r}.", f"The value must be {wanted}.")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UsageError(f"{origin} sets '{name}' to {value!r}.", f"Choose {', '.join(_CHOICES[name])}.")
    if isinstance(value, (int, float)) and name in _RANGES:
        low, high = _RANGES[name]
        if not low <= value <= high:  # also not a number
            raise UsageError(f"{origin} sets '{name}' to {value!r}.", f"The value must be {low} to {high}.")
    return value
