"""Importance matrices: what is in the file, and that nothing interrupts a computation for good."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

from m3cli.errors import CorpusError, EngineCrashError, MachineError, ModelError, UsageError
from m3cli.model.header import read_header
from quantize.calibration import token_windows
from quantize.imatrix import (
    Computed,
    ImatrixComputation,
    ImatrixRequest,
    ModelLoaded,
    Planned,
    Probing,
    Progress,
    Saved,
    Unused,
    _unused,
)
from quantize.importance import Entry, Importance, read_importance
from quantize.native import Native
from tests.engine.test_activations import measure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from m3cli.engine.process import WorkerClient
    from quantize.imatrix import ImatrixEvent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worker() -> Iterator[WorkerClient]:
    from m3cli.engine.process import WorkerClient

    with WorkerClient("measuring") as client:
        yield client


@pytest.fixture
def request_(tiny_gguf: Path, tmp_path: Path) -> ImatrixRequest:
    """Six windows of 32 tokens out of the README."""
    return ImatrixRequest(
        tiny_gguf,
        (str(ROOT / "README.md"),),
        tmp_path / "out.imatrix.gguf",
        window=32,
        windows=6,
        threads=1,
        save_every=3600,
        output_tensor=False,
        sensitivities=False,
    )


def run(request: ImatrixRequest) -> list[ImatrixEvent]:
    return list(ImatrixComputation(request).run())


def assert_same(got: Path, want: Path) -> None:
    """Two files say the same, up to the rounding of float32."""
    first, second = read_importance(got), read_importance(want)
    assert list(first.entries) == list(second.entries)
    assert (first.chunk_count, first.chunk_size) == (second.chunk_count, second.chunk_size)
    for name, entry in first.entries.items():
        assert entry.counts.tolist() == second.entries[name].counts.tolist()
        np.testing.assert_allclose(entry.sums, second.entries[name].sums, rtol=1e-6)


def test_the_file_holds_what_was_measured(request_: ImatrixRequest, worker: WorkerClient) -> None:
    """In llama.cpp's format, as its own reader sees it, with the sums and counts of all windows."""
    events = run(request_)
    assert [type(event) for event in events] == [Planned, ModelLoaded, *[Progress] * 6, Computed]
    windows = token_windows(request_.data, request_.model, 32, 6)
    assert events[0] == Planned(6, 32, windows.tokens, 0)
    computed = events[-1]
    assert isinstance(computed, Computed)
    assert (computed.windows, computed.tokens) == (6, 6 * 32)

    reader = gguf.GGUFReader(request_.out)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == list(request_.data)
    assert reader.fields["imatrix.chunk_count"].contents() == 6
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    there = {tensor.name: tensor.data for tensor in reader.tensors}
    want = measure(worker, request_.model, [list(ids) for ids in windows.ids])
    assert len(there) == 2 * len(want) == 2 * computed.tensors
    for name, (sums, counts) in want.items():
        np.testing.assert_allclose(there[f"{name}.in_sum2"], sums, rtol=1e-5)
        assert there[f"{name}.counts"].ravel().tolist() == counts
    assert [path.name for path in request_.out.parent.iterdir() if "out." in path.name] == [request_.out.name]


def test_progress_says_how_fast_and_how_long(request_: ImatrixRequest) -> None:
    steps = [event for event in run(request_) if isinstance(event, Progress)]
    assert [(step.done, step.total) for step in steps] == [(done, 6) for done in range(1, 7)]
    for step in steps:
        assert step.seconds_left * step.tokens_per_second == pytest.approx((6 - step.done) * 32)


# Runs a computation, and says so when something was saved and two windows more are done, which are lost.
_VICTIM = """
import sys
from pathlib import Path
from quantize.imatrix import ImatrixComputation, ImatrixRequest, Progress, Saved
model, data, out = sys.argv[1:]
request = ImatrixRequest(
    Path(model), (data,), Path(out), window=32, windows=6, threads=1, save_every=0,
    output_tensor=False, sensitivities=False,
)
saved = 0
for event in ImatrixComputation(request).run():
    if isinstance(event, Saved):
        saved = saved or event.windows
    if isinstance(event, Progress) and saved and event.done == saved + 2:
        print("ready", flush=True)
        sys.stdin.read()
"""


def test_a_killed_computation_goes_on(request_: ImatrixRequest, tmp_path: Path) -> None:
    """After SIGKILL it goes on from what was saved, and gives what one without it gives."""
    want = replace(request_, out=tmp_path / "want.gguf")
    run(want)
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(request_.model), request_.data[0], str(request_.out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == "ready\n"
    victim.kill()
    victim.communicate()
    assert not request_.out.exists()
    # What a kill in the middle of saving leaves behind.
    request_.out.with_name(request_.out.name + ".partial.new").write_bytes(b"PK\3\4 half of it")
    with pytest.raises(UsageError, match=r"unfinished importance matrix.*Continue it with --resume"):
        ImatrixComputation(request_)
    computation = ImatrixComputation(replace(request_, resume=True))
    assert 1 <= computation.planned.resumed <= 3
    done = [event.done for event in computation.run() if isinstance(event, Progress)]
    assert done == list(range(computation.planned.resumed + 1, 7))
    assert_same(request_.out, want.out)
    assert len(list(request_.out.parent.glob("out.imatrix.gguf*"))) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_loses_nothing(request_: ImatrixRequest, tmp_path: Path, number: int) -> None:
    """Ctrl-C or SIGTERM saves the windows that are done; --resume may even ask for more of them."""
    want = replace(request_, out=tmp_path / "want.gguf", windows=8)
    run(want)
    events = []
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - raised by what goes on after the signal
        for event in ImatrixComputation(request_).run():
            events.append(event)
            if isinstance(event, Progress) and event.done == 2:
                os.kill(os.getpid(), number)
    saved = events[-1]
    assert isinstance(saved, Saved)
    assert saved.windows == 2
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = run(replace(request_, windows=8, resume=True))
    assert resumed[0] == replace(run_planned(want), resumed=2)
    assert_same(request_.out, want.out)


def test_sensitivities_are_measured_and_kept(request_: ImatrixRequest, tmp_path: Path) -> None:
    """Every tensor that can be quantized has one; an interrupted run goes on with those it has."""
    want = replace(request_, out=tmp_path / "want.gguf", sensitivities=True, output_tensor=True)
    computed = run(want)[-1]
    importance = read_importance(want.out)
    with Native() as native:
        quantizable = native.quantizable(read_header(request_.model))
    assert set(importance.sensitivities) == quantizable
    assert isinstance(computed, Computed)
    assert computed.sensitivities == len(quantizable)
    assert all(value > 0 for value in importance.sensitivities.values())

    begun = replace(want, out=request_.out)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - raised by what goes on after the signal
        for event in ImatrixComputation(begun).run():
            if isinstance(event, Probing) and event.done == 5:
                os.kill(os.getpid(), signal.SIGINT)
    events = run(replace(begun, resume=True))
    probed = [event for event in events if isinstance(event, Probing)]
    assert (probed[0].done, probed[-1].done) == (6, len(quantizable))
    assert not any(isinstance(event, Progress) for event in events)
    assert read_importance(begun.out).sensitivities == importance.sensitivities
    assert_same(begun.out, want.out)


def run_planned(request: ImatrixRequest) -> Planned:
    return ImatrixComputation(replace(request, out=request.out.with_name("other.gguf"))).planned


def test_a_worker_that_dies_is_an_error(
    request_: ImatrixRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved before is there for the next run."""
    from m3cli.engine.process import WorkerProcess

    want = replace(request_, out=tmp_path / "want.gguf")
    run(want)
    pids = []
    begin = WorkerProcess.__init__

    def noted(self: WorkerProcess, *arguments: Any) -> None:
        begin(self, *arguments)
        pids.append(self.pid)

    monkeypatch.setattr(WorkerProcess, "__init__", noted)
    with pytest.raises(EngineCrashError, match="SIGSEGV while computing the importance matrix"):  # noqa: PT012
        for event in ImatrixComputation(replace(request_, save_every=0)).run():
            if isinstance(event, Saved):
                os.kill(pids[-1], signal.SIGSEGV)
    run(replace(request_, resume=True))
    assert_same(request_.out, want.out)


@pytest.fixture
def interrupted(request_: ImatrixRequest) -> ImatrixRequest:
    """A request of which one window is done."""
    computation = ImatrixComputation(replace(request_, save_every=0)).run()
    assert any(isinstance(event, Saved) for event in computation)
    computation.close()
    return replace(request_, resume=True)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"window": 48}, "window"),
        ({"data": (str(ROOT / "CHANGELOG.md"),)}, "text"),
        ({"output_tensor": True}, "output tensor"),
    ],
)
def test_results_of_something_else_are_not_gone_on_with(
    interrupted: ImatrixRequest, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(UsageError, match=f"begun with another {what}"):
        ImatrixComputation(replace(interrupted, **changes))


def test_another_model_is_noticed(interrupted: ImatrixRequest, tmp_path: Path) -> None:
    """By its content, not by its name."""
    copy = tmp_path / "copy.gguf"
    shutil.copy(interrupted.model, copy)
    assert ImatrixComputation(replace(interrupted, model=copy)).planned.resumed == 1
    with copy.open("r+b") as file:
        file.seek(read_header(copy).tensors[0].offset)
        file.write(b"other")
    with pytest.raises(UsageError, match="begun with another model"):
        ImatrixComputation(replace(interrupted, model=copy))


def test_fewer_windows_than_are_done_are_refused(interrupted: ImatrixRequest) -> None:
    list(ImatrixComputation(replace(interrupted, out=interrupted.out.with_name("all.gguf"))).run())
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for event in ImatrixComputation(interrupted).run():
            if isinstance(event, Progress) and event.done == 3:
                os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(UsageError, match="3 windows are done already"):
        ImatrixComputation(replace(interrupted, windows=2))


@pytest.mark.parametrize("content", [b"", b"no npz file", None])
def test_damaged_results_are_refused(interrupted: ImatrixRequest, content: bytes | None) -> None:
    """Whether it never was such a file or was cut short."""
    path = interrupted.out.with_name(interrupted.out.name + ".partial.npz")
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UsageError, match=f"damaged. Delete {re.escape(str(path))}"):
        ImatrixComputation(interrupted)


def test_a_flipped_bit_is_noticed(interrupted: ImatrixRequest) -> None:
    path = interrupted.out.with_name(interrupted.out.name + ".partial.npz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        ImatrixComputation(interrupted)


def test_a_full_disk_is_an_error(request_: ImatrixRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and nothing half-written stays."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"out\.imatrix\.gguf\.partial\.npz .*: No space left on device"):
        run(replace(request_, save_every=0))
    assert not list(request_.out.parent.glob("out.imatrix.gguf*"))


def test_experts_without_a_token_are_told(request_: ImatrixRequest, tmp_path: Path) -> None:
    """By layer and number, with what to do about it."""
    model = tmp_path / "partial.gguf"
    shutil.copy(request_.model, model)
    bias = next(t for t in read_header(model).tensors if t.name == "blk.2.exp_probs_b.bias")
    with model.open("r+b") as file:
        file.seek(bias.offset + 3 * 4)
        file.write(np.float32(-1000).tobytes())  # the router never chooses expert 3
    computed = run(replace(request_, model=model))[-1]
    assert isinstance(computed, Computed)
    assert [(each.experts, each.total) for each in computed.unused if each.layer == 2] == [
        ((3,), bias.dims[0])
    ]
    assert "6 windows are few" in computed.advice
    assert "more varied text" in replace(computed, windows=50).advice
    assert replace(computed, windows=50, unused=()).advice == ""


def test_unused_experts_stand_in_the_order_of_layers() -> None:
    entry = Entry(np.ones((3, 2), np.float32), np.array([0, 4, 0]))
    full = Entry(np.ones((1, 2), np.float32), np.array([4]))
    entries = {"blk.10.ffn_up_exps.weight": entry, "blk.2.ffn_up_exps.weight": entry, "blk.3.attn_q": full}
    assert _unused(Importance(entries, (), 32, 1)) == (Unused(2, (0, 2), 3), Unused(10, (0, 2), 3))


@pytest.mark.parametrize("window", [15, 1_000_000])
def test_windows_that_cannot_be_computed_are_refused(request_: ImatrixRequest, window: int) -> None:
    with pytest.raises(UsageError, match=r"A window of .* tokens cannot be taken"):
        ImatrixComputation(replace(request_, window=window))


def test_wrong_input_is_one_sentence_and_a_hint(
    request_: ImatrixRequest, smollm2: str, tmp_path: Path
) -> None:
    """Nothing is computed before all of it was looked at."""
    (tmp_path / "there.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match="already exists"):
        ImatrixComputation(replace(request_, out=tmp_path / "there.gguf"))
    with pytest.raises(UsageError, match=r"The directory .* does not exist"):
        ImatrixComputation(replace(request_, out=tmp_path / "nowhere" / "out.gguf"))
    with pytest.raises(ModelError, match=r"there\.gguf"):
        ImatrixComputation(replace(request_, model=tmp_path / "there.gguf"))
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(CorpusError, match="a window takes"):
        ImatrixComputation(replace(request_, data=(str(tmp_path / "short.txt"),)))
