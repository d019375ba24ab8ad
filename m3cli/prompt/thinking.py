"""Which variable of a chat template lets a model reason or not, and its value for each mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from m3cli.errors import ModelError
from m3cli.prompt.chat import Message
from m3cli.prompt.segments import Content

if TYPE_CHECKING:
    from m3cli.prompt.chat import ChatTemplate
    from m3cli.prompt.segments import Segment

ThinkMode = Literal["off", "on", "adaptive"]


@dataclass(frozen=True, slots=True)
class Switch:
    """A variable that templates read, with its values; `adaptive` None is the template's own default."""

    variable: str
    off: bool | int | str
    on: bool | int | str
    adaptive: str | None = None


# The first that a template obeys is its switch, so what turns reasoning off stands before what only
# shortens it.
SWITCHES = (
    Switch("thinking_mode", "disabled", "enabled", "adaptive"),  # MiniMax-M3
    Switch("enable_thinking", False, True),  # Qwen3, GLM, SmolLM3, Gemma 4, Nemotron 3, Hunyuan, …
    Switch("thinking", False, True),  # DeepSeek-V3.1 and later, Kimi
    Switch("reasoning", False, True),  # Cohere
    Switch("thinking_budget", 0, -1),  # Seed-OSS: tokens, −1 without limit
    Switch("reasoning_effort", "no_think", "high"),  # Hunyuan 3
    Switch("reasoning_effort", "none", "high"),  # Mistral
    # Models that always reason can only be told to do little of it. gpt-oss has no value for none.
    Switch("reasoning_effort", "low", "high"),  # gpt-oss, Solar
    Switch("reasoning_strength", "low", "high"),  # Muse Glimmer
)
# Values that a template takes from a list of its own, and that are just text to others.
_ONLY_IF_SPELLED = frozenset({"no_think", "none"})
_PROBE = (Message("system", (Content("S"),)), Message("user", (Content("U"),)))


def think_variables(template: ChatTemplate, mode: ThinkMode) -> dict[str, object] | None:
    """The variables that make `template` render for `mode`; None if it has no switch for thinking."""
    switch = next((switch for switch in SWITCHES if _obeys(template, switch)), None)
    if switch is None:
        return None
    value = {"off": switch.off, "on": switch.on, "adaptive": switch.adaptive}[mode]
    return {} if value is None else {switch.variable: value}


def _obeys(template: ChatTemplate, switch: Switch) -> bool:
    """Whether off and on make a difference.

    Tried rather than read from the source: a template may name a variable and overwrite it, or heed it
    only in conversations without a system message (Granite 3.3).
    """
    if switch.off in _ONLY_IF_SPELLED and not any(
        f"{quote}{switch.off}{quote}" in template.source for quote in "'\""
    ):
        return False

    def rendered(value: object) -> list[Segment]:
        return template.render(_PROBE, **{switch.variable: value})

    try:
        return rendered(switch.off) != rendered(switch.on)
    except ModelError:  # a value that it refuses
        return False
