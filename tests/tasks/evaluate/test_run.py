"""A whole evaluation: what engines of known abilities score, what is kept, and what a limit leaves."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from m3cli.corpus.corpus import CorpusRequest
from m3cli.engine.events import Finished, Notice, Prefilled, Stopped
from m3cli.engine.fake import FakeEngine
from m3cli.errors import DoesNotFitError, UsageError
from m3cli.model.catalog import resolve
from m3cli.model.vocabulary import LETTERS
from m3cli.tasks.context import QUOTE_FIRST, ContextRequest
from m3cli.tasks.evaluate.results import Evaluation
from m3cli.tasks.evaluate.run import LEARNED, Asked, EvalRequest, Evaluator
from tests.gguf_files import NORMAL, USER_DEFINED, write_vocabulary
from tests.tasks.evaluate.oracle import oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from m3cli.engine.events import Engine, Event, Request

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<ai>\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file whose tokens are bytes, but for one, with a context of 64k."""
    path = tmp_path_factory.mktemp("model") / "bytes.gguf"
    fields = {"tokenizer.chat_template": TEMPLATE, "llama.context_length": 65536}
    tokens = [*LETTERS, "th"]  # llama.cpp wants a merge
    return write_vocabulary(path, "minimax-m2", tokens, [NORMAL] * len(tokens), ["t h"], **fields)


def text_of(tokens: Sequence[int]) -> str:
    return b"".join(b"th" if token == 256 else bytes([token]) for token in tokens).decode("utf-8", "replace")


def sees_all(request: Request) -> str:
    return oracle(text_of(request.tokens))


def sees_the_ends(request: Request) -> str:
    """Answers from the first and the last quarter of the prompt alone."""
    quarter = len(request.tokens) // 4
    try:
        return oracle(text_of(request.tokens[:quarter]) + text_of(request.tokens[-quarter:]))
    except (ValueError, IndexError):
        return "no idea"


def guesses(request: Request) -> str:
    rng = random.Random(len(request.tokens))
    return " ".join(str(rng.randint(10**6, 10**7 - 1)) for _ in range(12))


def wanted(model: Path, state_dir: Path, **options: object) -> EvalRequest:
    context = ContextRequest(None, resolve(str(model), {}), state_dir=state_dir)
    defaults = {"tasks": ("niah_multikey_1",), "lengths": (2048, 4096), "samples": 4, "depths": 4}
    return EvalRequest(context, **{**defaults, **options})  # type: ignore[arg-type]


def evaluated(
    request: EvalRequest, script: Callable[[Request], str]
) -> tuple[Evaluation, FakeEngine, list[object]]:
    engine = FakeEngine(script)
    with Evaluator(request, open_engine=lambda *_: engine, stdin=lambda: b"") as evaluator:
        *events, last = evaluator.run()
    assert isinstance(last, Evaluation)
    return last, engine, events


RULER = ("ruler", "mrcr")


def test_an_oracle_scores_everything(model: Path, tmp_path: Path) -> None:
    """Who answers from the prompt alone is right in every task: the answer is there, and scored as right."""
    result, engine, _ = evaluated(
        wanted(model, tmp_path, tasks=RULER, lengths=(8192,), samples=1, depths=2), sees_all
    )
    (run,) = result.runs
    assert {task: scores[8192].mean for task, scores in run.tasks().items() if scores[8192].mean < 1} == {}
    assert len(run.tasks()) == 12
    assert result.complete
    assert max(len(request.tokens) + request.max_tokens for request in engine.requests) <= 8192


def test_guessing_scores_next_to_nothing(model: Path, tmp_path: Path) -> None:
    """Random numbers of the right form are hardly ever the right ones."""
    result, _, _ = evaluated(
        wanted(model, tmp_path, tasks=RULER, lengths=(8192,), samples=2, depths=2), guesses
    )
    scores = [outcome.score for outcome in result.runs[0].outcomes]
    assert len(scores) > 30
    assert sum(scores) / len(scores) < 0.02


def test_who_sees_only_the_ends_has_a_hole_in_the_middle(model: Path, tmp_path: Path) -> None:
    """The heatmap shows exactly the rows that were not seen."""
    request = wanted(model, tmp_path, tasks=("niah_single_2",), lengths=(8192, 16384), samples=3, depths=8)
    result, _, _ = evaluated(request, sees_the_ends)
    cells = result.runs[0].cells(8)
    assert {length for length, _ in cells} == {4096, 8192, 16384}
    for (length, row), score in cells.items():
        if length > 4096:  # in shorter ones, the instructions take much of the quarters
            assert score.mean == (1.0 if row in (0, 1, 6, 7) else 0.0), (length, row)


def test_a_repeated_run_asks_nothing_again(model: Path, tmp_path: Path) -> None:
    """Outcomes are found again by what was asked; a longer run asks only what is new; fresh asks all."""
    first, engine, _ = evaluated(wanted(model, tmp_path), sees_all)
    again, silent, events = evaluated(wanted(model, tmp_path), guesses)
    assert silent.requests == []
    assert again.runs[0].outcomes == first.runs[0].outcomes
    assert again.known == len(first.runs[0].outcomes) == len(engine.requests)
    assert all(event.known for event in events if isinstance(event, Asked))
    more, asked, _ = evaluated(wanted(model, tmp_path, lengths=(2048, 4096, 8192)), sees_all)
    assert len(asked.requests) == len(more.runs[0].outcomes) - more.known == 16
    fresh, asked, _ = evaluated(wanted(model, tmp_path, fresh=True), guesses)
    assert fresh.known == 0
    assert sum(outcome.score for outcome in fresh.runs[0].outcomes) == 0


def test_a_killed_run_goes_on(model: Path, tmp_path: Path) -> None:
    """What was answered before the engine died is not asked again."""
    answered = 0

    def dies(request: Request) -> str:
        nonlocal answered
        if answered == 5:
            raise RuntimeError("killed")
        answered += 1
        return sees_all(request)

    with pytest.raises(RuntimeError):
        evaluated(wanted(model, tmp_path), dies)
    result, engine, _ = evaluated(wanted(model, tmp_path), sees_all)
    assert result.known == 5
    assert len(engine.requests) == len(result.runs[0].outcomes) - 5


def test_ways_are_kept_apart(model: Path, tmp_path: Path) -> None:
    """Another type of KV cache is another result, measured on the same questions."""
    kv_types = (("f16", "f16"), ("q8_0", "q4_0"))
    result, engine, _ = evaluated(wanted(model, tmp_path, kv_types=kv_types), sees_all)
    assert [(run.type_k, run.type_v) for run in result.runs] == list(kv_types)
    first, second = ([o.question for o in run.outcomes] for run in result.runs)
    assert first == second
    assert len(engine.requests) == len(first) + len(second)


def test_a_time_limit_ends_the_run_and_keeps_what_was_answered(model: Path, tmp_path: Path) -> None:
    """The evaluation says that it is not complete, and the next one goes on."""
    result, engine, _ = evaluated(wanted(model, tmp_path, time_limit=0.0), sees_all)
    assert not result.complete
    assert engine.requests == []
    assert result.runs[0].outcomes == ()


def test_an_interrupted_run_has_a_result(model: Path, tmp_path: Path) -> None:
    """When the engine was asked to stop, the answers so far are there."""

    class Interrupted(FakeEngine):
        def generate(self, request: Request) -> Iterator[Event]:
            for event in super().generate(request):
                if len(self.requests) == 4 and isinstance(event, Prefilled):
                    yield Stopped(event.done, 0)
                    return
                yield event

    engine: Engine = Interrupted(sees_all)
    with Evaluator(wanted(model, tmp_path), open_engine=lambda *_: engine, stdin=lambda: b"") as evaluator:
        with pytest.raises(KeyboardInterrupt):
            list(evaluator.run())
        result = evaluator.result
    assert not result.complete
    assert len(result.runs[0].outcomes) == 3


def test_lengths_that_hold_no_haystack_are_told(model: Path, tmp_path: Path) -> None:
    """A task that cannot be so short is skipped with its reason, and the others are asked."""
    request = wanted(model, tmp_path, tasks=("niah_multikey_1", "cwe"), lengths=(1024, 2048), samples=1)
    result, _, _ = evaluated(request, sees_all)
    assert {(skip.task, skip.length) for skip in result.skipped} >= {("cwe", 1024)}
    assert all(skip.reason for skip in result.skipped)
    assert "niah_multikey_1" in result.runs[0].tasks()


@pytest.mark.parametrize(
    ("options", "error"),
    [({"tasks": ("juggling",)}, UsageError), ({"lengths": (1 << 20,)}, DoesNotFitError)],
)
def test_what_cannot_be_measured_is_refused(
    model: Path, tmp_path: Path, options: dict[str, object], error: type[Exception]
) -> None:
    """A task that does not exist, a length beyond the model's context."""
    with pytest.raises(error):
        Evaluator(
            wanted(model, tmp_path, **options), open_engine=lambda *_: FakeEngine(""), stdin=lambda: b""
        )


def code_oracle(request: Request) -> str:
    """The value of a constant that is asked for, from the line that sets it; for a sweep, that line."""
    text = text_of(request.tokens)
    if request.schema:
        name = re.findall(r"`(LIMIT_\w+)`", text)[-1]
        files = re.findall(rf'<file path="([^"]+)">\n(?:\d+: .*\n)*?(\d+): {name} = ', text)
        return json.dumps({"passages": [{"path": p, "first": int(n), "last": int(n)} for p, n in files]})
    question = re.findall(r"value of the constant `(\w+)` in", text)
    if not question:
        return "no idea"
    value = "; ".join(re.findall(rf"\d+: {question[-1]} = (\S+)", text)) + " (settings.py:1-2)"
    return f"1: LIMIT = 5 Answer: {value}" if QUOTE_FIRST in text else value


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    directory = tmp_path / "tree"
    directory.mkdir()
    for number in range(30):
        lines = [f"LIMIT_{number}_{i} = {1000 + 37 * number + i}" for i in range(4)]
        lines += [f"def work_{number}(items):", "    # nothing to see here", "    return sorted(items)", ""]
        (directory / f"module_{number:02}.py").write_text("\n".join(lines))
    return directory


def about(tree: Path, request: EvalRequest) -> EvalRequest:
    return replace(request, context=replace(request.context, corpus=CorpusRequest((str(tree),))))


def test_modes_are_measured_on_the_same_questions(model: Path, tmp_path: Path, tree: Path) -> None:
    """Whatever is shown of it, the right value is found; a selection is shorter than the whole."""
    request = wanted(
        model,
        tmp_path / "state",
        tasks=("code_constant",),
        lengths=(4096,),
        samples=2,
        modes=("recap", "quote", "end", "select", "sweep"),
    )
    result, engine, _ = evaluated(about(tree, request), code_oracle)
    asked = {run.mode: [o for o in run.outcomes if o.task == "code_constant"] for run in result.runs}
    assert list(asked) == ["whole", "recap", "quote", "end", "select", "sweep"]
    assert len(asked["whole"]) == 8
    for mode, outcomes in asked.items():
        assert [o.question for o in outcomes] == [o.question for o in asked["whole"]]
        assert {o.score for o in outcomes} == {1.0}, mode
    tokens = {mode: sum(o.prompt_tokens for o in outcomes) for mode, outcomes in asked.items()}
    assert tokens["select"] < tokens["whole"] < min(tokens["recap"], tokens["quote"], tokens["sweep"])
    prefixes = {tuple(r.tokens[: r.prefix]) for r in engine.requests if r.save and not r.schema}
    assert len(prefixes) == 1  # whole, recap and quote share the haystack, down to the token
    windows = [r for r in engine.requests if r.schema]
    assert (
        len({tuple(r.tokens[: r.prefix]) for r in windows}) == len(windows) / 8
    )  # the same for all questions


def test_a_quote_is_no_answer(model: Path, tmp_path: Path, tree: Path) -> None:
    """Only what comes behind "Answer:" is scored in the mode that quotes first."""
    request = wanted(
        model, tmp_path / "state", tasks=("code_constant",), lengths=(4096,), samples=1, modes=("quote",)
    )

    def quotes_only(request: Request) -> str:
        return code_oracle(request).replace("Answer:", "")

    result, _, _ = evaluated(about(tree, request), quotes_only)
    whole, quote = result.runs
    assert {o.score for o in whole.outcomes} == {1.0}
    assert {o.score for o in quote.outcomes} == {0.0}


def test_a_mode_that_does_not_fit_is_left_out_with_the_reason(
    model: Path, tmp_path: Path, tree: Path
) -> None:
    """At the end of the context there is no room for a recap; the questions of the others are all there."""
    request = wanted(
        model, tmp_path / "state", tasks=("code_constant",), lengths=(4096,), samples=1, modes=("recap",)
    )
    context = replace(request.context, ctx=4096)
    result, _, _ = evaluated(about(tree, replace(request, context=context)), code_oracle)
    whole, recap = result.runs
    assert whole.outcomes
    assert not recap.outcomes
    assert [skip.reason for skip in result.skipped if skip.reason.startswith("recap: ")]


def test_modes_are_for_tasks_about_a_corpus(model: Path, tmp_path: Path) -> None:
    """A text of RULER's can only be shown whole."""
    with pytest.raises(UsageError, match="niah_single_1"):
        evaluated(wanted(model, tmp_path, tasks=("niah_single_1",), modes=("select",)), guesses)


def test_long_lengths_alone_have_a_short_one_to_be_held_against(model: Path, tmp_path: Path) -> None:
    """What a model scores at a short context is measured beside the long ones."""
    result, _, _ = evaluated(wanted(model, tmp_path, lengths=(8192,), samples=1), sees_all)
    assert result.lengths == (4096, 8192)


def test_results_of_finished_lengths_are_remembered_however_a_run_ends(model: Path, tmp_path: Path) -> None:
    """A crash at the second length leaves what the first has shown to m3 ask."""
    answered = 0

    def dies(request: Request) -> str:
        nonlocal answered
        answered += 1
        if answered > 40:
            raise RuntimeError("killed")
        return sees_all(request)

    with pytest.raises(RuntimeError):
        evaluated(wanted(model, tmp_path, samples=8), dies)
    (file,) = tmp_path.rglob("f16-f16-full.json")
    assert list(json.loads(file.read_text())["scores"]["retrieval"]) == ["2048"]


def test_reasoning_that_a_template_begins_is_ended(tmp_path: Path) -> None:
    """A model that would reason for longer than a reply may be is made to answer at once."""
    path = tmp_path / "reasons.gguf"
    tokens = [*LETTERS, "th", "<think>", "</think>"]
    types = [NORMAL] * 257 + [USER_DEFINED] * 2
    fields = {
        "tokenizer.chat_template": TEMPLATE.replace("<ai>\n", "<ai>\n<think>\n"),
        "llama.context_length": 8192,
    }
    write_vocabulary(path, "minimax-m2", tokens, types, ["t h"], **fields)
    prompts: list[list[int]] = []

    def answers(request: Request) -> str:
        prompts.append(list(request.tokens))
        return "no idea"

    evaluated(wanted(path, tmp_path, samples=1, lengths=(2048,)), answers)
    assert prompts
    assert all(prompt.count(257) == prompt.count(258) == 1 for prompt in prompts)


def test_what_a_model_may_have_learned_is_told(model: Path, tmp_path: Path) -> None:
    """Questions about Python's library are not only about the text."""
    result, _, _ = evaluated(
        wanted(model, tmp_path, tasks=("code_file",), lengths=(8192,), samples=1), guesses
    )
    assert LEARNED in result.warnings


def test_haystacks_of_code_are_shared_and_nested(model: Path, tmp_path: Path, tree: Path) -> None:
    """All tasks about code have one haystack for each length, and the longer begins as the shorter does."""
    request = wanted(model, tmp_path / "state", tasks=("code",), lengths=(2048, 4096), samples=1)
    result, engine, _ = evaluated(about(tree, request), code_oracle)
    prefixes = list(dict.fromkeys(tuple(r.tokens[: r.prefix]) for r in engine.requests))
    assert len(prefixes) == 2
    shared = next(i for i, (a, b) in enumerate(zip(*prefixes, strict=False)) if a != b)
    assert shared > 0.9 * len(prefixes[0])
    assert len(result.runs[0].tasks()) >= 2
    assert "and then the library of Python" not in result.haystack


def test_a_short_corpus_goes_on_with_pythons_library(model: Path, tmp_path: Path, tree: Path) -> None:
    """A length beyond the user's files is still measured, and the report says what the text is."""
    request = wanted(model, tmp_path / "state", tasks=("code_file",), lengths=(32768,), samples=1)
    result, _, _ = evaluated(about(tree, request), code_oracle)
    assert "and then the library of Python" in result.haystack
    assert result.runs[0].outcomes


def test_events_count_what_was_computed(model: Path, tmp_path: Path) -> None:
    """Prompt tokens less those restored are what the run has cost."""
    result, engine, events = evaluated(wanted(model, tmp_path), sees_all)
    assert result.computed_tokens == sum(len(request.tokens) for request in engine.requests)
    assert len([event for event in events if isinstance(event, Finished)]) == len(engine.requests)
    assert not [event for event in events if isinstance(event, Notice)]
