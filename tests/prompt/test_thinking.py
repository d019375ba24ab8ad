"""Thinking modes, told to each family's chat template in the words that it understands."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from m3cli.prompt.chat import PLAIN_TEMPLATE, ChatTemplate, Message
from m3cli.prompt.segments import Content
from m3cli.prompt.thinking import ThinkMode, think_variables

M3 = (Path(__file__).parents[1] / "data" / "templates" / "minimax-m3.jinja").read_text("utf-8")
TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
MESSAGES = [Message("system", (Content("SYS"),)), Message("user", (Content("FILE"),))]

# Family: its switch as its published template writes it, and what the prompt ends with when thinking is
# off, on, and adaptive.
FAMILIES: dict[str, tuple[str, tuple[str, str, str]]] = {
    "minimax-m3": (M3, ("]~b]ai\n</mm:think>", "]~b]ai\n<mm:think>", "]~b]ai\n")),
    "qwen3": (
        TURNS
        + "ai:{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
        ("ai:<think></think>", "ai:", "ai:"),
    ),
    "smollm3": (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{% set mode = '/think' if enable_thinking else '/no_think' %}" + TURNS + "{{ mode }} ai:",
        ("/no_think ai:", "/think ai:", "/think ai:"),
    ),
    "gemma4": (
        TURNS + "ai:{% if not enable_thinking | default(false) %}<empty>{% endif %}",
        ("ai:<empty>", "ai:", "ai:<empty>"),
    ),
    "deepseek-v3.1": (
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
        + TURNS
        + "ai:{{ '<think>' if thinking else '</think>' }}",
        ("ai:</think>", "ai:<think>", "ai:</think>"),
    ),
    "kimi-k3": (  # an effort that counts only while thinking is on
        "{% if thinking is undefined %}{% set thinking = true %}{% endif %}"
        "{% if reasoning_effort is undefined %}{% set reasoning_effort = 'max' %}{% endif %}"
        + TURNS
        + "ai:{% if thinking %}<think>{{ reasoning_effort }}{% endif %}",
        ("ai:", "ai:<think>max", "ai:<think>max"),
    ),
    "cohere": (
        "{% set reasoning = reasoning if reasoning is not undefined else "
        "(false if reasoning_effort is defined and reasoning_effort | lower == 'none' else true) %}"
        + TURNS
        + "ai:{{ '<|START_THINKING|>' }}{% if not reasoning %}{{ '<|END_THINKING|>' }}{% endif %}",
        ("<|START_THINKING|><|END_THINKING|>", "ai:<|START_THINKING|>", "ai:<|START_THINKING|>"),
    ),
    "seed-oss": (
        "{% if not thinking_budget is defined %}{% set thinking_budget = -1 %}{% endif %}"
        + TURNS
        + "ai:{% if thinking_budget == 0 %}<seed:think></seed:think>"
        "{% elif thinking_budget != -1 %}{{ thinking_budget }}{% endif %}",
        ("ai:<seed:think></seed:think>", "ai:", "ai:"),
    ),
    "hunyuan3": (
        "{% if not reasoning_effort is defined %}{% set reasoning_effort = 'no_think' %}"
        "{% elif reasoning_effort not in ['high', 'low', 'no_think'] %}{{ raise_exception('no') }}{% endif %}"
        + TURNS
        + "ai:<think>{% if reasoning_effort == 'no_think' %}</think>{% endif %}",
        ("ai:<think></think>", "ai:<think>", "ai:<think></think>"),
    ),
    "mistral": (
        "{% set reasoning_effort = reasoning_effort | default('none') %}"
        '{% if reasoning_effort not in ["none", "high"] %}{{ raise_exception("no") }}{% endif %}'
        + TURNS
        + "[{{ reasoning_effort }}]",
        ("[none]", "[high]", "[none]"),
    ),
    "gpt-oss": (  # takes any word, and always reasons
        "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
        + TURNS
        + "Reasoning: {{ reasoning_effort }};ai:",
        ("Reasoning: low;ai:", "Reasoning: high;ai:", "Reasoning: medium;ai:"),
    ),
    "solar": (
        "{% set reasoning_effort = reasoning_effort if reasoning_effort is defined else 'high' %}"
        + TURNS
        + "{% if reasoning_effort in ['low', 'minimal'] %}ai:<|think|><|end|>{% endif %}ai:",
        ("ai:<|think|><|end|>ai:", ";ai:", ";ai:"),
    ),
}


def end(source: str, mode: ThinkMode) -> str:
    template = ChatTemplate(source)
    variables = think_variables(template, mode)
    assert variables is not None
    return "".join(segment.text for segment in template.render(MESSAGES, **variables))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hears_the_mode(family: str) -> None:
    """Off, on and adaptive reach the template as the values that it knows; the prompt ends accordingly."""
    source, ends = FAMILIES[family]
    for mode, expected in zip(get_args(ThinkMode), ends, strict=True):
        assert end(source, mode).endswith(expected), mode


def test_adaptive_is_the_default_of_a_two_valued_switch() -> None:
    """Only MiniMax-M3 knows adaptive; the others get no variable at all."""
    found = {
        name: think_variables(ChatTemplate(source), "adaptive") for name, (source, _) in FAMILIES.items()
    }
    assert found.pop("minimax-m3") == {"thinking_mode": "adaptive"}
    assert all(variables == {} for variables in found.values())


@pytest.mark.parametrize(
    "source",
    [
        PLAIN_TEMPLATE,
        TURNS + "ai:<think>",  # always reasons
        "{% set enable_thinking = true %}" + TURNS + "ai:{% if enable_thinking %}<think>{% endif %}",
        # names it for its own use: earlier turns, or a word in its text
        TURNS
        + "{% for m in messages if m.role == 'ai' %}{% if thinking %}{{ m.thoughts }}{% endif %}{% endfor %}",
        TURNS + "Never mention enable_thinking.",
        # heeds it only where nobody else wrote a system message, which m3 always does (Granite 3.3)
        "{% if messages[0].role != 'system' and thinking %}Think!{% endif %}" + TURNS,
        "{{ messages[0].content }}",  # fails whatever it is told
    ],
)
def test_a_template_that_does_not_obey_has_no_switch(source: str) -> None:
    """A variable that changes nothing in m3's prompts is no switch, whether it is named or not."""
    assert [think_variables(ChatTemplate(source), mode) for mode in get_args(ThinkMode)] == [None] * 3
