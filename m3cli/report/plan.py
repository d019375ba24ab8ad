"""A plan as tables and bars for people, or as one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.plan.planner import NoPlan
from m3cli.report.text import duration, printable, size

if TYPE_CHECKING:
    from rich.console import Console

    from m3cli.plan.planner import Place
    from m3cli.tasks.plan import PlanReport

_BAR = 30  # characters
_PARTS = (
    ("weights", "█", "cyan"),
    ("kv", "▓", "magenta"),
    ("compute", "▒", "yellow"),
    ("other", "░", "blue"),
)


def show_plan(report: PlanReport, costs: dict[str, float], console: Console) -> None:
    """Configuration, memory and time, or why there is none and what would fit."""
    from rich.table import Table
    from rich.text import Text

    machine = report.machine
    console.print(
        Text.assemble((printable(report.model), "bold"), " on ", (printable(machine.name), "bold")),
        f"{report.prompt:,} tokens of prompt in a context of {report.n_ctx:,}",
        sep="\n",
    )
    result = report.result
    if isinstance(result, NoPlan):
        console.print()
        console.print(f"does not fit: {printable(result.reason)}", markup=False, style="red")
        for alternative in result.alternatives:
            console.print(f"  · {printable(alternative)}", markup=False)
        return
    configuration = result.configuration
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("KV cache", f"keys {configuration.type_k}, values {configuration.type_v}"),
        ("ubatch", f"{configuration.n_ubatch:,} tokens"),
        ("layers on devices", f"{configuration.gpu_layers} of {report.shape.layers + 1}"),
        ("experts in RAM", f"of {configuration.cpu_experts} layers" if configuration.cpu_experts else "-"),
        ("threads", f"{machine.cores}, the physical cores"),
        ("saved context", size(result.state_bytes)),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print()
    memory = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("memory", "", "weights", "KV", "compute", "other", "used", "of"):
        memory.add_column(heading, justify="left" if heading in ("memory", "") else "right")
    for place in result.places:
        memory.add_row(
            printable(place.name),
            _bar(place),
            *(size(getattr(place, name)) for name, _, _ in _PARTS),
            size(place.used),
            size(place.room),
        )
    console.print(memory)
    console.print()
    speed = result.speed
    times = Table.grid(padding=(0, 2))
    times.add_row("load", duration(speed.load))
    times.add_row("prefill", f"{duration(speed.prefill)}, {speed.prefill_rate:,.0f} tokens/s")
    times.add_row("answer", f"{duration(speed.decode)}, {speed.decode_rate:,.1f} tokens/s")
    source = "as the last run of this model took" if report.measured else "not measured with this model yet"
    times.add_row("", f"between {1 / speed.band:.0%} and {speed.band:.0%} of these times: {source}")
    for name, cost in costs.items():
        times.add_row(name, f"{cost:.4f}")
    console.print(times)
    console.print(
        "exact: weights, KV cache, compute buffers of one device. Estimates: all times, other.", style="dim"
    )
    if machine.estimated:
        names = ", ".join(name.replace("_", " ") for name in machine.estimated)
        console.print(f"assumed, not known: {names}", style="dim")
    for sentence in result.reasons:
        console.print(f"· {sentence}", markup=False)
    for sentence in result.warnings:
        console.print(f"warning: {sentence}", markup=False, style="yellow")


def plan_object(report: PlanReport, costs: dict[str, float]) -> dict[str, Any]:
    """The same as one object; sizes in bytes, times in seconds."""
    result = report.result
    found: dict[str, Any] = {
        "model": report.model,
        "machine": asdict(report.machine),
        "prompt_tokens": report.prompt,
        "n_ctx": report.n_ctx,
        "fits": not isinstance(result, NoPlan),
    }
    if isinstance(result, NoPlan):
        return {**found, "reason": result.reason, "alternatives": list(result.alternatives)}
    return {
        **found,
        "configuration": asdict(result.configuration),
        "memory": [{**asdict(place), "used": place.used} for place in result.places],
        "state_bytes": result.state_bytes,
        "streamed_bytes": result.streamed,
        "speed": asdict(result.speed),
        "measured": report.measured,
        "costs": costs,
        "reasons": list(result.reasons),
        "warnings": list(result.warnings),
    }


def _bar(place: Place) -> Any:
    from rich.text import Text

    bar = Text()
    scale = _BAR / max(place.room, place.used, 1)
    for name, letter, style in _PARTS:
        bar.append(letter * round(getattr(place, name) * scale), style)
    bar.append("·" * max(0, _BAR - len(bar)), "dim")
    return bar
