"""An evaluation in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console, RenderableType

from m3cli.report.eval_parts import STEPS, colours, comparisons, contrast, interval, percent, run_names, step
from m3cli.report.eval_text import bar_text, heatmap, length_name, print_evaluation
from m3cli.tasks.evaluate.results import Bar, Evaluation, Score, Skipped
from tests.report.evaluations import HOSTILE, evaluation_of, outcome, run_of, varied

LENGTHS = tuple(512 * 2**i for i in range(12))  # 512 to 1M


def written(evaluation: Evaluation, width: int = 80) -> str:
    """What goes into a pipe."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_evaluation(evaluation, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def shown(item: RenderableType, *, width: int = 80, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(item)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (0, "0"),
        (512, "512"),
        (4096, "4k"),
        (6000, "6,000"),
        (131_072, "128k"),
        (1_048_576, "1M"),
        (1_572_864, "1,536k"),
        (1_000_000, "1,000,000"),
    ],
)
def test_lengths_are_short_where_they_are_exact(tokens: int, name: str) -> None:
    """Powers of 1,024 as people call contexts; nothing is rounded."""
    assert length_name(tokens) == name


def test_percent_is_all_or_nothing_only_where_it_is() -> None:
    """Rounding makes neither a perfect score nor a hopeless one."""
    assert [percent(share) for share in (0, 0.001, 0.876, 0.999, 1)] == ["0", "1", "88", "99", "100"]
    assert [percent(share, 1) for share in (0.00001, 0.9999)] == ["0.1", "99.9"]
    for count in range(1, 201):
        perfect, hopeless = (Score.of([value] * count) for value in (1.0, 0.0))
        assert interval(perfect).endswith("–100")
        assert interval(hopeless).startswith("0–")


def test_effective_contexts_in_words() -> None:
    """What is undecided is said, and that nothing longer was asked."""
    one = Score(1, 0.9, 1, 40)
    scores = {512: one, 1024: one}
    assert [bar_text(bar, scores) for bar in (Bar(0.8, 0, 0), Bar(0.8, 512, 0), Bar(0.8, 1024, 0))] == [
        "none",
        "512",
        "1k or more",
    ]
    assert bar_text(Bar(0.8, 512, 1024), scores) == "512, undecided at 1k"
    assert bar_text(Bar(0.8, 0, 512), scores) == "undecided at 512"


def test_the_heatmap_has_the_numbers_in_its_cells() -> None:
    """Rows are depths, columns lengths; what was not asked is a dash."""
    run = run_of(
        outcome(1, length=512, depth=0.0),
        outcome(0, length=512, depth=0.49),
        outcome(0.5, length=512, depth=0.1),
        outcome(1, length=4096, depth=1.0),
        outcome(0, length=4096, depth=1.0, task="mrcr", group="coreference"),
        outcome(0, length=8192, depth=None, task="vt", group="tracing"),
    )
    lines = [line.split() for line in shown(heatmap(run, 2)).splitlines()]
    assert lines == [
        ["depth", "512", "4k"],
        ["0–50", "%", "50", "-"],
        ["50–100", "%", "-", "50"],
    ]
    alone = [line.split() for line in shown(heatmap(run, 2, "coreference")).splitlines()]
    assert alone == [["depth", "4k"], ["0–50", "%", "-"], ["50–100", "%", "0"]]
    assert "No question here" in shown(heatmap(run, 2, "tracing"))
    assert "No question here" in shown(heatmap(run_of(), 2))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_tables_of_many_lengths_go_on_below(width: int) -> None:
    """Twelve lengths in any width: every column is there once, and no line is too long."""
    run = varied(1, lengths=LENGTHS)
    text = shown(heatmap(run, 5), width=width)
    assert max(map(len, text.splitlines())) <= width
    heads = [line.split()[1:] for line in text.splitlines() if line.startswith("depth")]
    assert [head for line in heads for head in line] == [length_name(length) for length in LENGTHS]
    cells = [line.split("%")[1].split() for line in text.splitlines() if line.startswith("0–20 %")]
    found = run.cells(5)
    assert [cell for line in cells for cell in line] == [percent(found[n, 0].mean) for n in LENGTHS]


def test_colours_only_repeat_the_numbers() -> None:
    """With colours and without, the text is the same; the background is that of the score."""
    run = varied(2)
    coloured = shown(heatmap(run, 5), colour=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == shown(heatmap(run, 5))
    worst = min(run.cells(5).values(), key=lambda score: score.mean)
    back, _ = colours(step(worst.mean))
    red, green, blue = (int(back[place : place + 2], 16) for place in (1, 3, 5))
    assert f"48;2;{red};{green};{blue}m" in coloured


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_read(dark: bool) -> None:
    """Each step of the scale is lighter than the one before (darker in the dark); numbers stand out."""
    pairs = [colours(number, dark=dark) for number in range(STEPS + 1)]
    assert all(contrast(back, ink) >= 4.5 for back, ink in pairs)
    lightness = [contrast(back, "#000000") for back, _ in pairs]
    assert lightness == sorted(lightness, reverse=dark)
    assert len({back for back, _ in pairs}) == STEPS + 1
    assert [step(score) for score in (0, 0.001, 0.5, 0.999, 1)] == [0, 1, 10, 19, 20]


def test_everything_is_printed_in_80_columns() -> None:
    """Effective contexts, scores, heatmaps, comparisons, skips and warnings, each in its place."""
    evaluation = evaluation_of(
        varied(1),
        varied(1, mode="select", decline=0.02),
        varied(1, kv=("q8_0", "q4_0"), decline=0.2),
        run_of(mode="end"),
        skipped=(Skipped("vt", 512, "too short"), Skipped("vt", 1024, "too short")),
        complete=False,
        known=7,
        warnings=("It was trained for 4k.",),
    )
    text = written(evaluation)
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "1,080, 7 of them from earlier runs",
        "1,234,567 tokens in 67 min",
        "f16 · whole: scores by length",
        "q8_0/q4_0 · whole: scores by depth",
        "f16 · end: nothing was answered",
        "Modes compared, KV f16; differences to whole",
        "KV caches compared, mode whole; differences to f16",
        "vt    512, 1k  too short",
        "more samples would",
        "It was ended before",
        "warning: It was trained for 4k.",
    ):
        assert words in text
    assert "\x1b" not in text


def test_an_evaluation_of_nothing() -> None:
    """No run, a run without answers, one length, no depth: all are printed."""
    for runs in ((), (run_of(),), (run_of(outcome(1, depth=None)),), (run_of(outcome(0)),)):
        assert "tiny-m3" in written(evaluation_of(*runs))


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_texts_do_not_drive_the_terminal(hostile: str) -> None:
    """Names and reasons with controls and markup are shown as text."""
    text = written(
        evaluation_of(
            run_of(outcome(0, task=hostile, reply=hostile, question=hostile, text=hostile)),
            model=hostile,
            haystack=hostile,
            description=hostile,
            skipped=(Skipped(hostile, 512, hostile),),
            warnings=(hostile,),
        )
    )
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200f\u2028\u202e\u2066\ud800-\udfff]", text)
    if "[bold" in hostile:
        assert "[bold red]markup[/]" in text.replace("\n", " ")


def test_runs_are_compared_at_the_questions_of_both() -> None:
    """Differences are of pairs; their interval is that of Newcombe's example for method 10."""
    pairs = [(1, 1)] * 36 + [(1, 0)] * 12 + [(0, 1)] * 2
    base = run_of(*(outcome(b, question=str(i)) for i, (_, b) in enumerate(pairs)))
    run = run_of(
        *(outcome(a, question=str(i), mode="select") for i, (a, _) in enumerate(pairs)),
        outcome(0, question="another", mode="select"),
        mode="select",
    )
    (comparison,) = comparisons(evaluation_of(run, base))
    assert comparison.base == "whole"
    first, second = comparison.rows
    assert second.difference is None
    gain = first.difference
    assert gain is not None
    assert gain.count == 50
    assert gain.value == pytest.approx(0.2)
    assert (gain.low, gain.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert first.computed_tokens == 1000
    assert first.seconds == 2


def test_a_difference_may_have_no_pairs() -> None:
    """Runs that share no question, or of which one is empty, have no difference."""
    base = run_of(outcome(1, question="a"))
    for other in (run_of(outcome(1, question="b"), mode="end"), run_of(mode="end")):
        (comparison,) = comparisons(evaluation_of(base, other))
        assert [row.difference for row in comparison.rows] == [None, None]
        assert "whole" in written(evaluation_of(base, other))


def test_the_attention_is_named_where_it_differs() -> None:
    """Runs are told apart by it, and compared with each other."""
    runs = run_of(outcome(1)), run_of(outcome(0), attention="dense")
    assert run_names(evaluation_of(*runs)) == ["f16 · sparse · whole", "f16 · dense · whole"]
    (comparison,) = comparisons(evaluation_of(*runs))
    assert (comparison.of, comparison.title, comparison.base) == ("kv", "KV caches", "f16 · sparse")
    assert run_names(evaluation_of(runs[0])) == ["f16 · whole"]


def test_runs_are_compared_at_the_questions_of_all() -> None:
    """Scores and costs leave out what one of the runs was not asked; a run without answers takes nothing."""
    base = run_of(
        outcome(1, question="a", seconds=2, prompt_tokens=4000),
        outcome(0, question="b", seconds=4, prompt_tokens=5000),
        outcome(0, question="c", seconds=60, prompt_tokens=9000),
        outcome(0, question="a", length=8192, seconds=60),
    )
    select = run_of(outcome(1, question="b"), outcome(1, question="a"), mode="select")
    (comparison,) = comparisons(evaluation_of(base, select, run_of(mode="end")))
    whole, other, empty = comparison.rows
    assert (whole.score, other.score, empty.score) == (Score.of([1, 0]), Score.of([1, 1]), None)
    assert (whole.seconds, whole.prompt_tokens, whole.computed_tokens) == (3, 4500, 1500)


def test_what_was_not_finished_is_said() -> None:
    """The length where a run ended early is named; where it is the only one, no group has a score."""
    first = outcome(1, length=4096)
    text = written(evaluation_of(run_of(first, outcome(0, length=65_536), partial=65_536), complete=False))
    assert "64k was not finished" in text
    assert "Effective context" in text
    text = written(evaluation_of(run_of(first, partial=4096), complete=False))
    assert "4k was not finished" in text
    assert "No length was finished." in text
    assert "Effective context" not in text
    assert "not finished" not in written(evaluation_of(run_of(first)))
