"""One engine for many clients: who is next, who has to wait, and what ends a job."""

from __future__ import annotations

import threading
import time
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.engine.events import Finished, Loaded, Prefilled, Request, Stopped, Token
from m3cli.engine.fake import FakeEngine
from m3cli.errors import DoesNotFitError, EngineCrashError, MachineError
from m3cli.serve.scheduler import BusyError, ClosingError, Job, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.engine.events import Event

DEADLINE = 20.0  # seconds; only to fail rather than hang
PATIENCE = 4  # times that a job may be passed over


def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.001)


def prompt_of(request: Request) -> str:
    return bytes(list(request.tokens)).decode()


class Gate:
    """A place where a thread waits until it is opened."""

    def __init__(self, *, open: bool = False) -> None:  # noqa: A002
        self._open = threading.Event()
        self.reached = threading.Event()
        if open:
            self.open()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()
        self.reached.clear()

    def pass_through(self) -> None:
        self.reached.set()
        assert self._open.wait(DEADLINE), "nobody opened the gate"

    def wait_reached(self) -> None:
        assert self.reached.wait(DEADLINE), "nobody came to the gate"


class GatedEngine(FakeEngine):
    """A FakeEngine that waits before its first event, before it is loaded, and before each token.

    A stop opens the last of these gates, as it ends a computation; closing ends all at once.
    """

    def __init__(self, script: str | Callable[[Request], str] = "", **options: int) -> None:
        super().__init__(script, **options)  # type: ignore[arg-type]
        self.start = Gate(open=True)
        self.loading = Gate(open=True)
        self.gate = Gate(open=True)
        self.stops = 0

    def generate(self, request: Request) -> Iterator[Event]:
        self.start.pass_through()
        for event in super().generate(request):
            if isinstance(event, Loaded):
                self.loading.pass_through()
            if isinstance(event, Token):
                self.gate.pass_through()
            if self.closed:
                raise EngineCrashError("It was killed.")
            yield event

    def stop(self) -> None:
        self.stops += 1
        super().stop()
        self.gate.open()

    def close(self) -> None:
        super().close()
        for gate in (self.start, self.loading, self.gate):
            gate.open()


class Asked:
    """A job and what was delivered of it."""

    def __init__(self, tokens: list[int] | str, n_ctx: int = 64, max_tokens: int = 100) -> None:
        ids = list(tokens.encode()) if isinstance(tokens, str) else tokens
        self.heard: list[Event | Exception] = []
        self.ended = threading.Event()
        self.threads: set[str] = set()
        self.job = Job(Request(array("i", ids), max_tokens), n_ctx, self._deliver)

    def _deliver(self, item: Event | Exception) -> None:
        assert not self.ended.is_set(), "something came behind the end"
        self.threads.add(threading.current_thread().name)
        self.heard.append(item)
        if isinstance(item, (Finished, Stopped, Exception)):
            self.ended.set()

    @property
    def last(self) -> Event | Exception:
        """What ended the job; waited for."""
        assert self.ended.wait(DEADLINE), "the job did not end"
        return self.heard[-1]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.heard if isinstance(event, Token))


class Clients:
    """A scheduler, its engine, and jobs in the order in which they were submitted."""

    def __init__(self, engine: GatedEngine, most_waiting: int = 100) -> None:
        self.engine = engine
        self.opening = Gate(open=True)
        self.opened: list[int] = []
        self.fails: Exception | None = None
        self.scheduler = Scheduler(self._open, most_waiting=most_waiting)

    def _open(self, n_ctx: int) -> GatedEngine:
        self.opened.append(n_ctx)
        self.opening.pass_through()
        if self.fails is not None:
            raise self.fails
        return self.engine

    def ask(self, tokens: list[int] | str, n_ctx: int = 64, max_tokens: int = 100) -> Asked:
        asked = Asked(tokens, n_ctx, max_tokens)
        self.scheduler.submit(asked.job)
        return asked

    def ask_and_hold(self, tokens: list[int] | str) -> Asked:
        """Ask, and have the engine wait before the first token."""
        self.engine.gate.close()
        asked = self.ask(tokens)
        self.engine.gate.wait_reached()
        return asked

    @property
    def order(self) -> list[str]:
        """The prompts that the engine was asked, in order."""
        return list(map(prompt_of, self.engine.requests))

    def idle(self) -> None:
        until(lambda: self.scheduler.running == self.scheduler.waiting == 0)


@contextmanager
def clients(engine: GatedEngine | None = None, most_waiting: int = 100) -> Iterator[Clients]:
    made = Clients(engine or GatedEngine("."), most_waiting)
    try:
        yield made
    finally:
        made.opening.open()
        made.engine.start.open()
        made.engine.loading.open()
        made.engine.gate.open()
        made.scheduler.close(DEADLINE)


def test_a_job_hears_every_event_from_one_thread() -> None:
    """What the engine streams is delivered in order, the end last, by the thread that owns the engine."""
    with clients(GatedEngine("Yes.")) as all_:
        asked = all_.ask("abc")
        last = asked.last
        expected = list(FakeEngine("Yes.").generate(asked.job.request))
        assert asked.heard == expected
        assert isinstance(last, Finished)
        assert asked.threads == {"engine"}
        all_.idle()


def test_jobs_are_answered_one_after_the_other() -> None:
    """While one is answered the others wait, and all are counted."""
    with clients() as all_:
        assert (all_.scheduler.running, all_.scheduler.waiting) == (0, 0)
        first = all_.ask_and_hold("a")
        others = [all_.ask("b"), all_.ask("c")]
        assert (all_.scheduler.running, all_.scheduler.waiting) == (1, 2)
        assert not any(other.heard for other in others)
        all_.engine.gate.open()
        assert all(isinstance(asked.last, Finished) for asked in (first, *others))
        all_.idle()


def test_jobs_that_share_nothing_are_answered_in_their_order() -> None:
    """Nobody is preferred without a reason."""
    with clients() as all_:
        asked = [all_.ask_and_hold("0"), *map(all_.ask, "12345")]
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in asked)
        assert all_.order == list("012345")


def test_the_job_that_shares_most_is_next() -> None:
    """After each answer, it is the one whose prompt begins most as what the KV cache holds."""
    with clients() as all_:
        asked = [all_.ask_and_hold("aaaa"), *map(all_.ask, ["b", "aa-", "aaab", "aa-?", "aaac"])]
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in asked)
        # Of equals the oldest; "aa-?" shares three with "aa-" once that was answered.
        assert all_.order == ["aaaa", "aaab", "aaac", "aa-", "aa-?", "b"]


def test_what_was_generated_is_shared_too() -> None:
    """The next question of a conversation goes on behind its last answer."""
    with clients(GatedEngine(lambda request: "said" if prompt_of(request) == "ask " else ".")) as all_:
        asked = [all_.ask_and_hold("ask "), *map(all_.ask, ["ask other", "ask said more"])]
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in asked)
        assert all_.order == ["ask ", "ask said more", "ask other"]


def test_what_a_stopped_job_has_computed_is_shared() -> None:
    """The cache of an answer that was left is as good as that of another."""
    with clients(GatedEngine("words")) as all_:
        first = all_.ask_and_hold("aaaa")
        asked = [all_.ask("b"), all_.ask("aaab")]
        all_.scheduler.cancel(first.job)
        assert isinstance(first.last, Stopped)
        assert all(isinstance(each.last, Finished) for each in asked)
        assert all_.order == ["aaaa", "aaab", "b"]


def test_nobody_is_passed_over_for_long() -> None:
    """However much others share, the oldest job is next when four were preferred to it."""
    with clients() as all_:
        asked = [all_.ask_and_hold("aaaa"), *map(all_.ask, ["b", *["aaaa"] * 8])]
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in asked)
        assert all_.order == ["aaaa", *["aaaa"] * PATIENCE, "b", *["aaaa"] * 4]
        assert [each.job.passed_over for each in asked] == [0, PATIENCE, *[0] * 8]


def test_one_client_cannot_push_another_back_for_ever() -> None:
    """Jobs that come later and share all of their prompt do not keep one that shares nothing waiting."""
    with clients() as all_:
        first, other = all_.ask_and_hold("aaaa"), all_.ask("b")

        def deliver(item: Event | Exception) -> None:
            if isinstance(item, Finished) and not other.ended.is_set():
                all_.scheduler.submit(Job(first.job.request, 64, deliver))

        all_.scheduler.submit(Job(first.job.request, 64, deliver))
        all_.scheduler.submit(Job(first.job.request, 64, deliver))
        all_.engine.gate.open()
        assert isinstance(other.last, Finished)
        assert all_.order.index("b") == 1 + PATIENCE


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=14))
def test_every_choice_has_its_reason(prompts: list[list[int]]) -> None:
    """Next is who shares most with the last one answered, or the oldest; nobody is passed over much."""
    with clients(GatedEngine(".")) as all_:
        first = all_.ask_and_hold([0, 0, 0])
        asked = [all_.ask(prompt) for prompt in prompts]
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in (first, *asked))

        def shared(one: list[int], other: list[int]) -> int:
            return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))

        left = [(each.job.request, number) for number, each in enumerate(asked)]
        order = []
        held = [0, 0, 0, ord(".")]
        for request in all_.engine.requests[1:]:
            number = next(number for known, number in left if known is request)
            best = max(shared(list(known.tokens), held) for known, _ in left)
            oldest = left[0][1]
            assert number == oldest or shared(list(request.tokens), held) == best
            left = [(known, other) for known, other in left if other != number]
            order.append(number)
            held = [*request.tokens, ord(".")]
        assert left == []
        passed = [sum(other > number for other in order[: order.index(number)]) for number in order]
        assert max(passed) <= PATIENCE


def test_the_queue_is_bounded() -> None:
    """Who comes when too many wait is told so at once, and can come again later."""
    with clients(most_waiting=2) as all_:
        asked = [all_.ask_and_hold("a"), all_.ask("b"), all_.ask("c")]
        for _ in range(3):
            for refused in (lambda: all_.ask("d"), all_.scheduler.check_room):
                with pytest.raises(BusyError, match="2 wait already"):
                    refused()
        assert all_.scheduler.waiting == 2
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in asked)
        all_.idle()
        all_.scheduler.check_room()
        assert isinstance(all_.ask("d").last, Finished)
        assert all_.order == list("abcd")


def test_a_job_that_waits_can_be_cancelled() -> None:
    """It ends at once, the engine never hears of it, and its place is free."""
    with clients(most_waiting=2) as all_:
        asked = [all_.ask_and_hold("a"), all_.ask("b"), all_.ask("c")]
        all_.scheduler.cancel(asked[1].job)
        assert asked[1].heard == [Stopped(0, 0)]
        assert all_.scheduler.waiting == 1
        asked.append(all_.ask("d"))
        all_.engine.gate.open()
        assert all(isinstance(asked[i].last, Finished) for i in (0, 2, 3))
        assert all_.order == list("acd")
        assert all_.engine.stops == 0


def test_a_job_that_is_answered_can_be_cancelled() -> None:
    """The engine is told to stop, and goes on with the next."""
    with clients(GatedEngine("many words")) as all_:
        first, second = all_.ask_and_hold("a"), all_.ask("b")
        all_.scheduler.cancel(first.job)
        assert isinstance(first.last, Stopped)
        assert len(first.text) < len("many words")
        assert isinstance(second.last, Finished)
        assert second.text == "many words"
        assert all_.engine.stops >= 1


def test_cancelling_twice_ends_a_job_once() -> None:
    """A client that leaves is noticed in more than one place."""
    with clients(GatedEngine("many words")) as all_:
        first, second = all_.ask_and_hold("a"), all_.ask("b")
        for job in (second.job, second.job, first.job, first.job, second.job):
            all_.scheduler.cancel(job)
        assert isinstance(first.last, Stopped)
        assert second.heard == [Stopped(0, 0)]
        all_.idle()
        assert all_.order == ["a"]


def test_cancelling_what_has_ended_stops_nobody_else() -> None:
    """The next answer is not that of who left."""
    with clients(GatedEngine("words")) as all_:
        first = all_.ask("a")
        assert isinstance(first.last, Finished)
        all_.idle()
        all_.scheduler.cancel(first.job)
        second = all_.ask_and_hold("b")
        all_.scheduler.cancel(first.job)
        assert all_.engine.stops == 0
        all_.engine.gate.open()
        assert isinstance(second.last, Finished)
        assert second.text == "words"
        assert isinstance(first.heard[-1], Finished)


def test_a_job_can_be_cancelled_while_the_model_is_opened() -> None:
    """The engine hears of it as soon as there is one."""
    with clients(GatedEngine("words")) as all_:
        all_.opening.close()
        first = all_.ask("a")
        all_.opening.wait_reached()
        all_.scheduler.cancel(first.job)
        assert not first.ended.is_set()
        all_.opening.open()
        assert isinstance(first.last, Stopped)
        assert first.text == ""


def test_a_job_can_be_cancelled_before_the_engine_has_begun() -> None:
    """A stop that comes before the generation is repeated when that has begun."""
    with clients(GatedEngine("words")) as all_:
        assert isinstance(all_.ask("a").last, Finished)  # the engine is there
        all_.engine.start.close()
        second = all_.ask("b")
        all_.engine.start.wait_reached()
        all_.scheduler.cancel(second.job)
        all_.engine.start.open()
        assert isinstance(second.last, Stopped)
        assert second.text == ""


def test_closing_ends_what_runs_and_what_waits() -> None:
    """The running job is stopped in order, those that wait are told, and nothing more is taken."""
    with clients(GatedEngine("many words")) as all_:
        first, second, third = all_.ask_and_hold("a"), all_.ask("b"), all_.ask("c")
        all_.scheduler.close(DEADLINE)
        assert isinstance(first.heard[-1], Stopped)
        for other in (second, third):
            (error,) = other.heard
            assert isinstance(error, ClosingError)
        assert (all_.scheduler.running, all_.scheduler.waiting) == (0, 0)
        assert all_.order == ["a"]
        for refused in (lambda: all_.ask("d"), all_.scheduler.check_room):
            with pytest.raises(ClosingError):
                refused()
        assert not all_.scheduler.alive
        all_.scheduler.close(DEADLINE)


def test_closing_waits_for_what_has_to_be_saved() -> None:
    """A job that is being opened when the server ends is ended by the engine, not left without an end."""
    with clients(GatedEngine("words")) as all_:
        all_.opening.close()
        first = all_.ask("a")
        all_.opening.wait_reached()
        closing = threading.Thread(target=all_.scheduler.close, args=(DEADLINE,))
        closing.start()

        def refused() -> bool:
            try:
                all_.scheduler.cancel(all_.ask("b").job)
            except ClosingError:
                return True
            return False

        until(refused)
        assert closing.is_alive()
        assert not first.ended.is_set()
        all_.opening.open()
        closing.join(DEADLINE)
        assert not closing.is_alive()
        assert isinstance(first.heard[-1], Stopped)


def test_closing_does_not_wait_for_a_model_that_has_computed_nothing() -> None:
    """There is nothing to save while a model is loaded, which may take long."""
    with clients(GatedEngine("words")) as all_:
        all_.engine.loading.close()
        first, second = all_.ask("a"), all_.ask("b")
        all_.engine.loading.wait_reached()
        all_.scheduler.close(DEADLINE)
        assert all_.engine.closed
        assert isinstance(first.last, ClosingError)
        assert isinstance(second.last, ClosingError)
        assert not all_.scheduler.alive


def test_closing_at_once_saves_nothing() -> None:
    """Who does not want to wait ends the engine in the middle of an answer."""
    with clients(GatedEngine("words")) as all_:
        first = all_.ask_and_hold("a")
        all_.scheduler.close(0.0)
        assert isinstance(first.last, ClosingError)
        assert all_.engine.stops == 0
        until(lambda: not all_.scheduler.alive)


def test_an_idle_scheduler_closes() -> None:
    """With nothing to do there is nothing to wait for."""
    with clients() as all_:
        all_.scheduler.close(DEADLINE)
        assert not all_.opened
        with pytest.raises(ClosingError):
            all_.ask("a")


class Failing(GatedEngine):
    """Fails with the error of a prompt, before its first token or behind it."""

    def __init__(self, errors: dict[str, BaseException], *, behind: bool) -> None:
        super().__init__("word")
        self._errors = errors
        self._behind = behind

    def generate(self, request: Request) -> Iterator[Event]:
        error = self._errors.get(prompt_of(request))
        for event in super().generate(request):
            if error is not None and isinstance(event, Token if self._behind else Loaded):
                yield event
                raise error
            yield event


ERRORS = [
    EngineCrashError("It died."),
    DoesNotFitError("It does not fit."),
    MachineError("No."),
    RuntimeError("a defect"),
    KeyError("a defect"),
    AssertionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("behind", [False, True])
def test_an_engine_that_fails_fails_one_job(error: Exception, behind: bool) -> None:
    """The error is the last that the job hears, and the next job is answered."""
    with clients(Failing({"aaaa": error}, behind=behind)) as all_:
        asked = [all_.ask_and_hold("aaa"), *map(all_.ask, ["aaaa", "b", "aab"])]
        all_.engine.gate.open()
        assert asked[1].last is error
        assert any(isinstance(event, Token) for event in asked[1].heard) == behind
        assert all(isinstance(asked[i].last, Finished) for i in (0, 2, 3))
        # Nothing is known of what the cache of a failed answer holds, so nobody shares anything with it.
        assert all_.order == ["aaa", "aaaa", "b", "aab"]
        all_.idle()


def test_an_engine_that_is_interrupted_fails_one_job() -> None:
    """Even what is meant to end a program does not end the thread that answers."""
    with clients(Failing({"a": KeyboardInterrupt()}, behind=False)) as all_:
        error = all_.ask("a").last
        assert isinstance(error, Exception)
        assert "KeyboardInterrupt" in str(error)
        assert isinstance(all_.ask("b").last, Finished)
        assert all_.scheduler.alive


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_engine_that_cannot_be_opened_fails_one_job(error: Exception) -> None:
    """The next job tries again."""
    with clients() as all_:
        all_.fails = error
        failed = all_.ask("b")
        assert failed.last is error
        all_.idle()
        all_.fails = None
        assert isinstance(all_.ask("c").last, Finished)


def test_a_prompt_beyond_the_context_is_refused_by_the_engine() -> None:
    """What the engine says of it reaches the client."""
    with clients(GatedEngine(".", n_ctx=4)) as all_:
        assert isinstance(all_.ask("abcde").last, DoesNotFitError)
        assert isinstance(all_.ask("abcd").last, Finished)


def test_each_job_has_the_engine_of_its_context() -> None:
    """For a larger context there is another engine, and stopping means the one that runs."""
    small, large = GatedEngine("small"), GatedEngine("large")
    opened: list[int] = []

    def open_engine(n_ctx: int) -> GatedEngine:
        opened.append(n_ctx)
        return small if n_ctx <= 64 else large

    scheduler = Scheduler(open_engine, most_waiting=10)
    try:
        large.gate.close()
        asked = [Asked("a", 64), Asked("b", 65), Asked("c", 64)]
        for each in asked:
            scheduler.submit(each.job)
        large.gate.wait_reached()
        scheduler.cancel(asked[1].job)
        assert isinstance(asked[1].last, Stopped)
        assert isinstance(asked[2].last, Finished)
        assert [asked[0].text, asked[2].text] == ["small", "small"]
        assert small.stops == 0
        assert large.stops >= 1
        assert opened == [64, 65, 64]
    finally:
        scheduler.close(DEADLINE)


def test_a_job_that_is_cancelled_while_a_larger_context_is_made_ends() -> None:
    """The engine that was there before is stopped in vain; the one that is made hears of it too."""
    small, large, making = GatedEngine("small"), GatedEngine("large"), Gate()

    def open_engine(n_ctx: int) -> GatedEngine:
        if n_ctx <= 64:
            return small
        making.pass_through()
        return large

    scheduler = Scheduler(open_engine, most_waiting=10)
    try:
        first, second = Asked("a", 64), Asked("b", 65)
        scheduler.submit(first.job)
        assert isinstance(first.last, Finished)
        scheduler.submit(second.job)
        making.wait_reached()
        scheduler.cancel(second.job)
        making.open()
        assert isinstance(second.last, Stopped)
        assert second.text == ""
        assert large.requests
    finally:
        making.open()
        scheduler.close(DEADLINE)


def test_a_prompt_of_nothing_shares_nothing() -> None:
    """An empty prompt is the engine's to refuse, and disturbs no order."""
    with clients() as all_:
        asked = [all_.ask_and_hold("aa"), *map(all_.ask, ["", "ab"])]
        all_.engine.gate.open()
        assert all(isinstance(each.last, Finished) for each in asked)
        assert all_.order == ["aa", "ab", ""]


def test_progress_reaches_a_job_as_it_is_made() -> None:
    """A long prompt is told of batch by batch, not at its end."""
    with clients(GatedEngine("word", n_batch=2)) as all_:
        asked = all_.ask_and_hold("abcdef")
        done = [event.done for event in asked.heard if isinstance(event, Prefilled)]
        assert done == [0, 2, 4, 6]
        assert not asked.ended.is_set()
