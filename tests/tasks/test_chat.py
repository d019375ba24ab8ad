"""Conversations, with an engine that says what the test wants to hear."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from m3cli.cli.lines import piped
from m3cli.corpus.corpus import CorpusRequest
from m3cli.engine.events import CacheConfig, EngineConfig, Notice
from m3cli.engine.fake import FakeEngine
from m3cli.errors import CorpusError, DoesNotFitError
from m3cli.model.catalog import resolve
from m3cli.report.chat_console import ChatConsole
from m3cli.tasks.ask import Answer
from m3cli.tasks.chat import FORGOTTEN, Chat
from m3cli.tasks.context import ContextRequest
from tests.tasks.measured import long_tree, measured

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.engine.events import Request


class Engines:
    """Opens fake engines and remembers them."""

    def __init__(self, says: str = "It is {} (a.py:1).") -> None:
        self.opened: list[FakeEngine] = []
        self.configs: list[EngineConfig] = []
        self._says = says

    def open(self, config: EngineConfig, _cache: CacheConfig | None) -> FakeEngine:
        self.configs.append(config)
        self.opened.append(FakeEngine(lambda _: self._says.format(len(self.requests)), n_ctx=config.n_ctx))
        return self.opened[-1]

    @property
    def requests(self) -> list[Request]:
        return [request for engine in self.opened for request in engine.requests]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a.py").write_text("x = 1\n")
    return tmp_path


def chat(tree: Path, engines: Engines, **options: object) -> Chat:
    request = ContextRequest(CorpusRequest((str(tree),)), resolve(None, {}), **options)  # type: ignore[arg-type]
    return Chat(request, open_engine=engines.open, stdin=lambda: b"")


def answers(conversation: Chat, question: str) -> tuple[Answer, list[str]]:
    events = list(conversation.ask(question))
    answer = events[-1]
    assert isinstance(answer, Answer)
    return answer, [event.text for event in events if isinstance(event, Notice)]


def test_the_corpus_stands_first_in_every_prompt(tree: Path) -> None:
    """Each question comes with what was said before, behind a prefix that never changes; one engine runs."""
    engines = Engines()
    with chat(tree, engines) as conversation:
        said = [answers(conversation, question)[0].text for question in ("What?", "Why?", "How?")]
    assert said == ["It is 1 (a.py:1).", "It is 2 (a.py:1).", "It is 3 (a.py:1)."]
    assert len(engines.opened) == 1
    assert engines.opened[0].closed
    first, second, third = engines.requests
    assert first.prefix == second.prefix == third.prefix > 0
    assert first.tokens[: first.prefix] == second.tokens[: first.prefix] == third.tokens[: first.prefix]
    assert len(first.tokens) < len(second.tokens) < len(third.tokens)
    assert (first.exact, second.exact) == (True, False)


def test_the_prefix_is_that_of_ask(tree: Path) -> None:
    """What `ask` has computed of a corpus serves a conversation about it."""
    from m3cli.tasks.ask import AskRequest, ask

    engines = Engines()
    with chat(tree, engines) as conversation:
        answers(conversation, "What?")
        answers(conversation, "Why?")
    context = ContextRequest(CorpusRequest((str(tree),)), resolve(None, {}))
    list(ask(AskRequest("Something else?", context), open_engine=engines.open, stdin=lambda: b""))
    _, chatted, asked = engines.requests
    assert asked.prefix == chatted.prefix
    assert asked.tokens[: asked.prefix] == chatted.tokens[: asked.prefix]


def test_a_conversation_that_outgrows_its_context_forgets_its_beginning(tree: Path) -> None:
    """The corpus stays whole; the oldest questions go, and that is said."""
    engines = Engines()
    long = "word " * 60
    with chat(tree, engines, ctx=640, max_tokens=100) as conversation:
        heard = [notice for number in range(8) for notice in answers(conversation, f"{long}{number}?")[1]]
        assert 0 < len(conversation.turns) < 8
        assert conversation.packed is not None
        assert conversation.packed.pack.strategy == "whole"
    assert FORGOTTEN in heard
    assert max(config.n_ctx for config in engines.configs) <= 640


def test_a_larger_context_is_made_when_it_is_needed(tree: Path) -> None:
    """The engine begins with room for some answers, and is opened anew for more."""
    engines = Engines()
    with chat(tree, engines, max_tokens=50) as conversation:
        for number in range(8):
            answers(conversation, "word " * 100 + f"{number}?")
        assert len(conversation.turns) == 8
    sizes = [config.n_ctx for config in engines.configs]
    assert len(sizes) > 1
    assert sizes == sorted(sizes)
    assert all(engine.closed for engine in engines.opened)


def test_a_corpus_that_does_not_fit_is_selected_from(tree: Path) -> None:
    """Each question gets the excerpts that match it, which begin no other prompt."""
    for name in ("red", "green", "blue"):
        (tree / f"{name}.py").write_text(f"def {name}():\n    return 1\n" + f"# {name} things\n" * 60)
    engines = Engines()
    with chat(tree, engines, ctx=900, max_tokens=50) as conversation:
        for name in ("green", "blue"):
            answers(conversation, f"What does {name} return?")
            assert conversation.packed is not None
            assert f"{name}.py" in conversation.packed.pack.paths
    assert [request.prefix for request in engines.requests] == [0, 0]


def test_no_question_reads_more_than_the_model_uses_well(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The effective context holds for the second question as for the first, and is told once."""
    state = tmp_path_factory.mktemp("state")
    long_tree(tree)
    measured(state, good=1024, longest=4096)
    engines = Engines()
    with chat(tree, engines, state_dir=state) as conversation:
        told = [answers(conversation, question)[1] for question in ("value_1_7", "value_2_7")]
    assert [any("1,024 tokens of context well" in note for note in notes) for notes in told] == [True, False]
    assert all(len(request.tokens) <= 1024 for request in engines.requests)


def test_files_can_be_read_again(tree: Path) -> None:
    """After a change the next prompt has the new text; the conversation goes on, even if reading fails."""
    engines = Engines()
    with chat(tree, engines) as conversation:
        answers(conversation, "What?")
        (tree / "a.py").write_text("x = 1\ny = 2\n")
        conversation.reload()
        answers(conversation, "And now?")
        (tree / "a.py").unlink()
        with pytest.raises(CorpusError):
            conversation.reload()
        answers(conversation, "Still there?")
        assert len(conversation.turns) == 3
    first, second, third = engines.requests
    assert second.prefix > first.prefix
    assert third.prefix == second.prefix


def run(conversation: Chat, *lines: str) -> str:
    """What stdout gets."""
    out = io.StringIO()
    ChatConsole(answers_to=out).run(conversation, iter(lines))
    return out.getvalue()


def test_commands_are_not_questions(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/files, /save, /reload, /help and /quit do what they say; an unknown one is an error, not the end."""
    engines = Engines()
    saved = tree / "talk.md"
    with chat(tree, engines) as conversation:
        out = run(
            conversation, "", "/files", "/nonsense", "What?", "/files", f"/save {saved}", "/save", "/help",
            "/reload", "Why?", "/quit", "Never asked?",
        )  # fmt: skip
    err = capsys.readouterr().err
    assert len(engines.requests) == 2
    assert "It is 1" in out
    assert "Never" not in out
    for words in ("There is no command /nonsense", "a.py", "tokens", "needs the name of a file", "/reload"):
        assert words in err
    assert saved.read_text() == "## What?\n\nIt is 1 (a.py:1).\n\n"


def test_what_cannot_be_answered_is_told(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A question that is too long costs an error, and the next one is answered."""
    engines = Engines()
    with chat(tree, engines, ctx=400, max_tokens=50) as conversation:
        with pytest.raises(DoesNotFitError):
            list(conversation.ask("word " * 2000))
        out = run(conversation, "word " * 2000, "What?")
    assert "too small" in capsys.readouterr().err
    assert "It is 1" in out


def test_an_interrupted_answer_is_forgotten(tree: Path) -> None:
    """Ctrl-C ends an answer, not the conversation."""
    engines = Engines()
    with chat(tree, engines) as conversation:
        events = conversation.ask("What?")
        next(events)
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
        assert conversation.turns == []
        assert answers(conversation, "Why?")[0].text == "It is 1 (a.py:1)."


def test_piped_lines() -> None:
    """One question a line; what stands between lines of three quotation marks is one of several lines."""
    text = 'first\n\n"""\nsecond\n  goes on\n"""\r\nthird\n"""\nnever closed\n'
    assert list(piped(io.StringIO(text))) == ["first", "", "second\n  goes on", "third", "never closed"]
    assert list(piped(None)) == []
