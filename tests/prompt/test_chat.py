"""Chat templates, rendered around content that must never become part of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3cli.errors import ModelError
from m3cli.prompt.chat import PLAIN_TEMPLATE, ChatTemplate, Message
from m3cli.prompt.segments import Content, TemplateText

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
MESSAGES = [
    Message("system", (Content("SYS"),)),
    Message("user", (Content("FILE"), Content("QUESTION"))),
]
SYS, FILE, QUESTION = Content("SYS"), Content("FILE"), Content("QUESTION")
M3_ROOT = (
    "]~!b[]~b]system\nYour model version is MiniMax-M3, developed by MiniMax.\n\n<thinking_instructions>\n"
    "Current thinking mode: {}. Wrap reasoning in <mm:think></mm:think>.\n</thinking_instructions>[e~[\n"
    "]~b]developer\n"
)


def template(name: str) -> ChatTemplate:
    text = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return ChatTemplate(text, bos_token={"llama3": "<|begin_of_text|>", "gemma": "<bos>"}.get(name, ""))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen",
            [
                TemplateText("<|im_start|>system\n"),
                SYS,
                TemplateText("<|im_end|>\n<|im_start|>user\n"),
                FILE,
                QUESTION,
                TemplateText("<|im_end|>\n<|im_start|>assistant\n"),
            ],
        ),
        (
            "llama3",
            [
                TemplateText(
                    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
                    "Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2026\n\n"
                ),
                SYS,
                TemplateText("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"),
                FILE,
                QUESTION,
                TemplateText("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
            ],
        ),
        (
            "gemma",  # refuses a system message: it goes in front of the user's
            [
                TemplateText("<bos><start_of_turn>user\n"),
                SYS,
                Content("\n\n"),
                FILE,
                QUESTION,
                TemplateText("<end_of_turn>\n<start_of_turn>model\n"),
            ],
        ),
        (
            "minimax-m3",
            [
                TemplateText(M3_ROOT.format("adaptive")),
                SYS,
                TemplateText("[e~[\n]~b]user\n"),
                FILE,
                QUESTION,
                TemplateText("[e~[\n]~b]ai\n"),
            ],
        ),
    ],
)
def test_the_published_templates_render(name: str, expected: list[object]) -> None:
    """Each template gives its own text as template text and the messages as content, in order."""
    assert template(name).render(MESSAGES) == expected


def test_thinking_modes_reach_the_template() -> None:
    """Variables such as M3's thinking_mode change the template's text."""
    disabled = template("minimax-m3").render(MESSAGES, thinking_mode="disabled")
    assert disabled[0] == TemplateText(M3_ROOT.format("disabled"))
    assert disabled[-1] == TemplateText("[e~[\n]~b]ai\n</mm:think>")
    assert template("qwen").render(MESSAGES, enable_thinking=False)[-1] == TemplateText(
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_model_without_a_template_is_prompted_as_plain_text() -> None:
    """The fallback joins the messages by blank lines and asks for an answer."""
    rendered = ChatTemplate(PLAIN_TEMPLATE).render(MESSAGES)
    assert "".join(segment.text for segment in rendered) == "SYS\n\nFILEQUESTION\n\nAnswer:"


def test_a_template_may_use_what_hugging_face_offers() -> None:
    """The generation block, loop controls and tojson's layout work as in transformers."""
    source = (
        "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ {'a': 1} | tojson(indent=1) }}"
    )
    rendered = ChatTemplate(source).render(MESSAGES)
    assert rendered == [SYS, FILE, QUESTION, TemplateText('{\n "a": 1\n}')]


def test_content_never_reaches_the_template_engine() -> None:
    """What looks like jinja, or like m3's own placeholder, is content like any other."""
    hostile = "{{ 1/0 }}{% raw %}\ue000m3-part-0\ue001\ue000m3-part-1\ue001"
    rendered = template("qwen").render([Message("system", (SYS,)), Message("user", (Content(hostile),))])
    assert [s.text for s in rendered if isinstance(s, Content)] == ["SYS", hostile]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}{% endfor %}",  # drops what was said
        "{{ messages[0].content }}{{ messages[0].content }}",  # says it twice
        "{{ messages[0].content ",  # does not parse
        "{{ messages | nosuchfilter }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% break %}",
        "{{ messages | xmlattr }}",
        "{{ nothing.at.all }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # the sandbox holds
    ],
)
def test_a_template_that_cannot_be_trusted_is_an_error(source: str) -> None:
    """A template that fails, or loses, doubles or reorders messages, is a ModelError."""
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source).render(MESSAGES)
