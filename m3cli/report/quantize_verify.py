"""A comparison of two files of a model as a person and as a program sees it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from m3cli.report.text import amount, duration, fact_table, printable, size, stderr_console
from quantize.verify import Compared, Verified

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from quantize.divergence import Divergence, Estimate, Measured
    from quantize.verify import ModelFile, TensorError, VerifyPlan

_SILENCE = 300.0  # seconds; without a terminal, a line after each
_WORST = 10  # tensors that the table names


class VerifyConsole:
    """Renders a comparison on stderr. A context manager: the progress bar ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stderr = stderr_console()
        self._bar: Progress | None = None
        self._told = self._started = time.monotonic()
        self._stage = ""

    def __enter__(self) -> VerifyConsole:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self._end()
        if kind is KeyboardInterrupt:
            self.note("interrupted; nothing is kept")

    def note(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self._quiet:
            self._stderr.print(printable(line), style="dim", markup=False)

    def plan(self, plan: VerifyPlan) -> None:
        """What will be run, and what it takes of the disk."""
        if not plan.windows:
            self.note("note: without --text only the weights are compared")
            return
        self.note(
            f"text: {plan.text_tokens:,} tokens, of which {amount(plan.windows, 'window')} with "
            f"{amount(plan.positions, 'position')} that count"
        )
        self.note(
            f"the reference's predictions take {size(plan.temporary_bytes)} in {plan.directory} meanwhile "
            f"({size(plan.free_bytes)} free)"
        )

    def show(self, event: Compared | Measured | Verified) -> None:
        """Render one event."""
        if isinstance(event, Verified):
            self._end()
            self.note(f"compared in {duration(time.monotonic() - self._started)}")
        elif isinstance(event, Compared):
            self._advance("weights", event.done, event.total, printable(event.name))
        else:
            self._advance("reference" if event.reference else "new model", event.done, event.total, "")

    def _advance(self, stage: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._end()
            self._stage, self._stage_began, self._stage_first = stage, now, done
        if self._quiet:
            return
        if not self._stderr.is_terminal:
            if now - self._told > _SILENCE:
                self._told = now
                self.note(f"{stage}: {done:,} of {total:,}{self._left(now, done, total)}")
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
                console=self._stderr,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(stage, total=total, detail="")
        left = self._left(now, done, total).removeprefix(", ")
        self._bar.update(
            self._bar.task_ids[0], completed=done, detail="  ".join(filter(None, (left, detail)))
        )

    def _left(self, now: float, done: int, total: int) -> str:
        if done <= self._stage_first:
            return ""
        rate = (now - self._stage_began) / (done - self._stage_first)
        return f", {duration((total - done) * rate)} left"

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_tables(result: Verified, console: Console) -> None:
    """Print all there is to say, one table after the other."""
    console.print(_files(result))
    changed = sorted((t for t in result.tensors if t.error), key=lambda t: (-(t.error or 0), t.name))
    if changed:
        console.print("\nTensors that changed most:")
        console.print(_worst(changed))
    console.print("\nBy role:")
    console.print(_roles(result.tensors))
    divergence = result.divergence
    if divergence is not None:
        console.print(
            f"\nOn the text: {amount(divergence.positions, 'position')}, the second half of "
            f"{amount(divergence.windows, 'window')} of {divergence.window:,} tokens"
        )
        console.print(_divergence(divergence))


def _files(result: Verified) -> Table:
    looked = sum(tensor.looked_at for tensor in result.tensors)
    rows = sum(tensor.rows for tensor in result.tensors)
    sample = f"{looked:,} of {rows:,}, up to {result.rows:,} a tensor" if looked < rows else f"all {rows:,}"
    return fact_table(
        [
            ("reference", _file_line(result.reference)),
            ("new", _file_line(result.new)),
            ("size", f"{result.new.nbytes / max(result.reference.nbytes, 1):.1%} of the reference"),
            ("rows compared", sample),
        ]
    )


def _file_line(file: ModelFile) -> str:
    return f"{file.path}, {file.file_type}, {size(file.nbytes)}, {file.bits_per_weight:.2f} bits per weight"


def _worst(changed: Sequence[TensorError]) -> Table:
    """The first of the tensors that changed, by falling error."""
    table = _table("tensor", "from", "to", "bytes", "relative error")
    for tensor in changed[:_WORST]:
        nbytes = size(tensor.bytes_after)
        table.add_row(printable(tensor.name), tensor.before, tensor.after, nbytes, _percent(tensor.error))
    if len(changed) > _WORST:
        table.add_row(f"{len(changed) - _WORST:,} more: --json has them all", style="dim")
    return table


def _roles(tensors: Iterable[TensorError]) -> Table:
    """One row a role, by falling size of what it became."""
    table = _table("role", "tensors", "from", "to", "bytes", "mean error", "largest")
    groups: dict[str, list[TensorError]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.role].append(tensor)
    for role, group in sorted(groups.items(), key=lambda item: (-_bytes(item[1]), item[0])):
        errors = [tensor.error for tensor in group if tensor.error is not None]
        table.add_row(
            printable(role),
            f"{len(group):,}",
            _types(tensor.before for tensor in group),
            _types(tensor.after for tensor in group),
            size(_bytes(group)),
            _percent(sum(errors) / len(errors) if errors else None),
            _percent(max(errors, default=None)),
        )
    return table


def _bytes(group: Sequence[TensorError]) -> int:
    return sum(tensor.bytes_after for tensor in group)


def _types(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _divergence(divergence: Divergence) -> Table:
    quantiles = divergence.quantiles
    top = divergence.top_1
    return fact_table(
        [
            ("KL divergence, mean", f"{_estimate(divergence.mean_kl)} nats"),
            *((f"KL divergence, {name}", f"{value:.3g}") for name, value in quantiles.items()),
            ("same most likely token", f"{top.value:.2%} ± {top.error:.2%}"),
            ("perplexity, reference", _estimate(divergence.reference_perplexity)),
            ("perplexity, new", _estimate(divergence.new_perplexity)),
            ("perplexity, ratio", _estimate(divergence.perplexity_ratio)),
            ("change of p, RMS", f"{divergence.delta_p.value:.2%} ± {divergence.delta_p.error:.2%}"),
        ]
    )


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        is_text = name in ("tensor", "role", "from", "to")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table


def _percent(error: float | None) -> str:
    if error is None:
        return "not compared"
    if math.isinf(error):
        return "was all zero"
    return f"{error:.3%}" if error else "0"


def _estimate(estimate: Estimate) -> str:
    if estimate.value < 1e-3:
        return f"{estimate.value:.3g} ± {estimate.error:.2g}"
    digits = 2 if estimate.value > 10 else 4
    return f"{estimate.value:,.{digits}f} ± {estimate.error:,.{digits}f}"


def verify_object(result: Verified, max_kl: float | None = None) -> dict[str, Any]:
    """All tensors and the statistics. `divergence` is null without a text, as are numbers that are infinite.

    KL divergence is in nats, shares and errors are fractions; `error` beside a `value` is its standard error.
    `passed` says whether the mean divergence is at most `max_kl`; null if there is no such limit.
    """
    divergence = result.divergence
    return {
        "reference": _file_object(result.reference),
        "new": _file_object(result.new),
        "rows_per_tensor": result.rows or None,
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "layer": tensor.layer,
                "type_before": tensor.before,
                "type_after": tensor.after,
                "bytes_before": tensor.bytes_before,
                "bytes_after": tensor.bytes_after,
                "rows": tensor.rows,
                "rows_compared": tensor.looked_at,
                "relative_error": _finite(tensor.error),
            }
            for tensor in result.tensors
        ],
        "divergence": divergence
        and {
            "window": divergence.window,
            "windows": divergence.windows,
            "positions": divergence.positions,
            "kl_mean": _estimate_object(divergence.mean_kl),
            "kl_quantiles": {_key(name): value for name, value in divergence.quantiles.items()},
            "top_1_agreement": _estimate_object(divergence.top_1),
            "perplexity_reference": _estimate_object(divergence.reference_perplexity),
            "perplexity_new": _estimate_object(divergence.new_perplexity),
            "perplexity_ratio": _estimate_object(divergence.perplexity_ratio),
            "delta_p_rms": _estimate_object(divergence.delta_p),
        },
        "max_kl": _finite(max_kl),
        "passed": None if max_kl is None else result.passes(max_kl),
    }


def _file_object(file: ModelFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "bytes": file.nbytes,
        "file_type": file.file_type,
        "bits_per_weight": round(file.bits_per_weight, 4),
    }


def _estimate_object(estimate: Estimate) -> dict[str, float | None]:
    return {"value": _finite(estimate.value), "error": _finite(estimate.error)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _key(name: str) -> str:
    """`99.9 %` is `p99.9`."""
    return f"p{name.removesuffix(' %')}" if name.endswith("%") else name
