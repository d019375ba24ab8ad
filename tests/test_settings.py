"""Settings: which layer wins, and what a stranger's repository may not say."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from m3cli.errors import UsageError
from m3cli.settings import PROJECT_FILE, load_settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def layers(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    """User file, project file, environment."""
    user = tmp_path / "config.toml"
    return user, tmp_path / PROJECT_FILE, {"M3_CONFIG": str(user)}


def test_each_layer_overrides_the_one_below(
    layers: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    """Defaults < user file < project file < environment < flags, and each value knows its origin."""
    user, project, environ = layers
    user.write_text('hidden = true\nmax_file_size = 1\nctx = 1\nseed = 1\nkv_type = "q8_0"\n')
    project.write_text("max_file_size = 2\n")
    settings = load_settings(
        {"seed": 3, "ctx": None, "threads": None},
        environ={**environ, "M3_CTX": "2", "M3_SEED": "2"},
        cwd=tmp_path,
    )
    assert (settings.hidden, settings.max_file_size, settings.ctx, settings.seed, settings.threads) == (
        True,
        2,
        2,
        3,
        0,
    )
    origins = {name: origin for name, _, origin in settings.items()}
    assert (
        origins["hidden"],
        origins["max_file_size"],
        origins["ctx"],
        origins["seed"],
        origins["threads"],
    ) == (
        str(user),
        str(project),
        "M3_CTX",
        "--seed",
        "default",
    )


@pytest.mark.parametrize("line", ['model = "/evil.gguf"', "ctx = 5", "gpu_layers = 99", '[models]\nm3 = "x"'])
def test_a_project_file_may_only_say_what_to_pack(
    layers: tuple[Path, Path, dict[str, str]], tmp_path: Path, line: str
) -> None:
    """The file that comes with a repository chooses neither the model nor how it runs."""
    _, project, environ = layers
    project.write_text(line)
    with pytest.raises(UsageError, match="which a project file may not"):
        load_settings({}, environ=environ, cwd=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'x'", "sets 'modle', which m3 does not know"),
        ("origins = 'x'", "sets 'origins', which m3 does not know"),
        ("ctx = 'big'", "sets 'ctx' to 'big'"),
        ("ctx = true", "sets 'ctx' to True"),
        ("kv_type = 'q5'", "sets 'kv_type' to 'q5'"),
        ("exclude = [1]", "sets 'exclude'"),
        ("models = {a = 1}", "sets 'models'"),
        ("ctx = ", "is not valid TOML"),
        ("\xff", "is not valid TOML"),
    ],
)
def test_a_wrong_user_file_is_named(
    layers: tuple[Path, Path, dict[str, str]], tmp_path: Path, text: str, message: str
) -> None:
    """The error names the file, the key and the value."""
    user, _, environ = layers
    user.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message) as caught:
        load_settings({}, environ=environ, cwd=tmp_path)
    assert str(user) in caught.value.message


@pytest.mark.parametrize(
    ("variable", "value"),
    [("M3_CTX", "many"), ("M3_HIDDEN", "perhaps"), ("M3_STRATEGY", "x"), ("M3_THINK", "x")],
)
def test_a_wrong_environment_variable_is_named(tmp_path: Path, variable: str, value: str) -> None:
    """The error names the variable and its value."""
    with pytest.raises(UsageError, match=f"{variable} sets .* to '{value}'"):
        load_settings({}, environ={"M3_CONFIG": str(tmp_path / "none"), variable: value}, cwd=tmp_path)


def test_thinking_is_off_unless_asked_for(layers: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    """A mode comes from file, environment or flag, is one of three, and its origin tells it was asked for."""
    user, _, environ = layers
    default = load_settings({"think": None}, environ=environ, cwd=tmp_path)
    assert (default.think, "think" in default.origins) == ("off", False)
    user.write_text('think = "on"\n')
    assert load_settings({}, environ=environ, cwd=tmp_path).think == "on"
    environ["M3_THINK"] = "adaptive"
    assert load_settings({}, environ=environ, cwd=tmp_path).think == "adaptive"
    asked = load_settings({"think": "off"}, environ=environ, cwd=tmp_path)
    assert (asked.think, asked.origins["think"]) == ("off", "--think")
    environ["M3_THINK"] = "often"
    with pytest.raises(UsageError, match="M3_THINK sets 'think' to 'often'") as caught:
        load_settings({}, environ=environ, cwd=tmp_path)
    assert "Choose off, on, adaptive." in str(caught.value)


def test_lists_and_numbers_come_from_the_environment(tmp_path: Path) -> None:
    """A list is separated as PATH is, a whole number serves where a fraction may stand."""
    environ = {"M3_CONFIG": str(tmp_path / "none"), "M3_EXCLUDE": "*.md:docs/", "M3_TEMPERATURE": "1"}
    settings = load_settings({}, environ=environ, cwd=tmp_path)
    assert settings.exclude == ("*.md", "docs/")
    assert settings.temperature == 1.0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("M3_CTX", "-5"),
        ("M3_THREADS", "100000"),
        ("M3_TOP_P", "7"),
        ("M3_TEMPERATURE", "nan"),
        ("M3_SEED", "-1"),
    ],
)
def test_numbers_have_ranges(tmp_path: Path, variable: str, value: str) -> None:
    """A number that no run could use is refused, and the range is named."""
    with pytest.raises(UsageError, match="The value must be"):
        load_settings({}, environ={"M3_CONFIG": str(tmp_path / "none"), variable: value}, cwd=tmp_path)


def test_gpu_layers_may_be_auto_everywhere(tmp_path: Path) -> None:
    """`auto` is as many layers as fit, from a flag as from the environment."""
    environ = {"M3_CONFIG": str(tmp_path / "none"), "M3_GPU_LAYERS": "auto"}
    assert load_settings({}, environ=environ, cwd=tmp_path).gpu_layers == -1
    assert load_settings({"gpu_layers": "12"}, environ=environ, cwd=tmp_path).gpu_layers == 12
    with pytest.raises(UsageError, match="sets 'gpu_layers' to 'all'"):
        load_settings({"gpu_layers": "all"}, environ=environ, cwd=tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "link", "nested", "huge"])
def test_a_hostile_project_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A project file that would hang or exhaust m3 is an error that names it."""
    project = tmp_path / PROJECT_FILE
    if kind == "fifo":
        os.mkfifo(project)
    elif kind == "link":
        project.symlink_to("/dev/zero")
    else:
        project.write_text("include = " + "[" * 5000 if kind == "nested" else "#" * 2_000_000)
    with pytest.raises(UsageError, match=PROJECT_FILE):
        load_settings({}, environ={"M3_CONFIG": str(tmp_path / "none")}, cwd=tmp_path)
