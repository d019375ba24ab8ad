"""What a person sees of an ask."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from m3cli.corpus.corpus import CorpusRequest
from m3cli.engine.events import LoadProgress, Notice, Prefilled, Updated
from m3cli.engine.fake import FakeEngine
from m3cli.errors import OutputClosedError
from m3cli.model.catalog import resolve
from m3cli.report.ask_console import AskConsole
from m3cli.tasks.ask import AskRequest, Text, ask
from m3cli.tasks.context import ContextRequest

if TYPE_CHECKING:
    from pathlib import Path

SAYS = "<think>let me see</think>It is one (a.py:1), or two (b.py:7)."


def show(tmp_path: Path, **options: bool) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    request = AskRequest("What is x?", ContextRequest(CorpusRequest((str(tmp_path),)), resolve(None, {})))
    with AskConsole(answer_to=sys.stdout, **options) as console:
        for event in ask(request, open_engine=lambda *_: FakeEngine(SAYS), stdin=lambda: b""):
            console.show(event)


def test_answer_and_sources_go_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer, and each citation with its verdict; reasoning is dropped."""
    show(tmp_path)
    out, err = capsys.readouterr()
    assert out == (
        "It is one (a.py:1), or two (b.py:7).\n"
        "\nSources:\n  [ok] a.py:1\n  [unverified] b.py:7 (b.py is not in the pack)\n"
    )
    assert "read 1 file" in err
    assert "let me see" not in err


def test_reasoning_is_shown_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--show-thinking puts it on stderr, and stdout stays as it was."""
    show(tmp_path, show_thinking=True)
    out, err = capsys.readouterr()
    assert "let me see" in err
    assert "let me see" not in out


def test_quiet_is_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--quiet leaves stderr to errors."""
    show(tmp_path, quiet=True, show_thinking=True, verbose=True)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_progress_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal the bars say speed and time left, of all the prefill and not of its last seconds."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    monkeypatch.setenv("COLUMNS", "120")
    with AskConsole(answer_to=None) as console:
        for event in (LoadProgress(0.5), Prefilled(0, 1_000_000, 0.0), Prefilled(100_000, 1_000_000, 1000.0)):
            console.show(event)
        console._progress.refresh()  # type: ignore[union-attr]
        console.show(Notice("by the way"))
    err = capsys.readouterr().err
    assert "100 tokens/s, 2 h 30 min left" in err
    assert "loading the model" in err
    assert "note: by the way" in err


def test_a_pipe_gets_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, progress is not drawn."""
    with AskConsole(answer_to=None) as console:
        console.show(Prefilled(1, 2, 1.0))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("edits", "computed", "lines"),
    [
        (1, 80, ["updated in place: 1 edit, 80 tokens computed in 0.5 s"]),
        (12, 1080, ["updated in place: 12 edits, 1,080 tokens computed in 0.5 s"]),
        (0, 0, []),
    ],
)
def test_an_update_is_told_with_what_it_costs_in_truth(
    capsys: pytest.CaptureFixture[str], edits: int, computed: int, lines: list[str]
) -> None:
    """What was computed, if anything was; and always how much of the context is out of date."""
    with AskConsole(answer_to=None) as console:
        console.show(Updated(100_000, edits, computed, 0.01234, 0.5))
    lines.append("1.2% of what this context was computed from has changed since")
    assert capsys.readouterr().err.splitlines() == lines
    with AskConsole(answer_to=None, quiet=True) as console:
        console.show(Updated(100_000, edits, computed, 0.01234, 0.5))
    assert capsys.readouterr().err == ""


def test_a_reader_that_left_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed pipe while the answer streams ends the run as one that is not wanted any more."""

    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None: ...

    with AskConsole(answer_to=Gone()) as console, pytest.raises(OutputClosedError):  # type: ignore[arg-type]
        console.show(Text("answer", "hello"))
