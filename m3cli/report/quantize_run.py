"""A quantization as a person and as a program sees it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.report.progress import BytesConsole
from m3cli.report.text import amount, duration, fact_table, printable, size
from quantize.choose import Choice
from quantize.events import Converted, Progress
from quantize.solve import Measuring

if TYPE_CHECKING:
    from rich.console import Console

    from quantize.quantizer import QuantizePlan
    from quantize.solve import Solved


class RunConsole(BytesConsole):
    """Renders the events of a quantization on stderr. A context manager: the progress bar ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__("give the same command again to go on", quiet=quiet)

    def __enter__(self) -> RunConsole:
        return self

    def show(self, event: Measuring | Choice | Progress | Converted) -> None:
        """Render one event."""
        if isinstance(event, Measuring):
            self.count("measuring", event.tensor, event.done, event.total)
        elif isinstance(event, Choice):
            self.end()
            for line in explanation(event.solved) if event.solved else ():
                self.note(line)
        elif isinstance(event, Converted):
            total = size(sum(file.stat().st_size for file in event.files))
            self.note(f"wrote {amount(len(event.files), 'file')}, {total}, in {duration(event.seconds)}")
        else:
            if event.done == event.resumed and event.resumed:  # the first
                self.note(f"going on at {size(event.resumed)} of {size(event.total)}")
            self.advance(event.tensor, event.done, event.total)


def explanation(solved: Solved) -> list[str]:
    """Why the recipe is what it is, in sentences."""
    lines = []
    for share in solved.shares:
        types = ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in share.types)
        lines.append(f"{share.role}: {types}; {size(share.nbytes)}, {share.cost:.0%} of what is lost")
    above = f"{solved.cost / solved.bound - 1:.1%} above the least that is possible" if solved.bound else ""
    if solved.measured and solved.sensitivities:
        lines.append(f"predicted KL divergence {solved.cost:.4f} nats a token{above and ', '}{above}")
        percent = solved.price * solved.total_bytes / 100
        lines.append(f"1% more room would lower it by {min(percent, solved.cost):.4f}")
    elif above:
        lines.append(f"what is lost is {above} in this size")
    if not solved.measured:
        lines.append("errors are those that each type typically makes: nothing was measured")
    if not solved.sensitivities:
        lines.append(
            "how much each tensor matters is taken from other models; m3 quantize imatrix measures it"
        )
    return lines


def show_plan(planned: QuantizePlan, choice: Choice, console: Console) -> None:
    """What would be written, and the recipe if one was found."""
    tensors = ", ".join(f"{count:,} {kind} ({size(nbytes)})" for kind, count, nbytes in planned.tensors)
    console.print(
        fact_table(
            [
                ("source", f"{size(planned.source_bytes)}, {planned.parameters:,} weights"),
                ("types", "the best for the budget" if choice.solved else printable(choice.name)),
                ("tensors", tensors),
                ("bits", f"{planned.bits_per_weight:.2f} a weight"),
                *[("file", f"{printable(file.name)}, {file.nbytes:,} bytes") for file in planned.files],
                ("to write", f"{size(planned.total_bytes)}; {size(planned.free_bytes)} free there"),
            ]
        )
    )
    if choice.solved:
        console.print()
        console.print(choice.solved.recipe.toml(), markup=False, highlight=False, soft_wrap=True)


def quantize_object(planned: QuantizePlan, choice: Choice, done: Converted | None) -> dict[str, Any]:
    """The plan, the choice, and where and in how long it was carried out: null after a dry run."""
    solved, tensors = choice.solved, choice.source.header.tensors
    known = solved is not None and solved.measured and solved.sensitivities
    return {
        **asdict(planned),
        "tensors": [
            {"type": name, "count": count, "nbytes": nbytes} for name, count, nbytes in planned.tensors
        ],
        "total_bytes": planned.total_bytes,
        "bits_per_weight": round(planned.bits_per_weight, 4),
        "types": {tensor.name: choice.types.get(tensor.name, tensor.type) for tensor in tensors},
        "choice": choice.name,
        "budget": solved
        and {
            "recipe": solved.recipe.toml(),
            "predicted_kl": solved.cost if known else None,
            "least_kl": solved.bound if known else None,
            "kl_per_gb": solved.price * 1e9 if known else None,
            "measured": solved.measured,
            "sensitivities": solved.sensitivities,
            "roles": [{**share._asdict(), "types": dict(share.types)} for share in solved.shares],
        },
        "written": done and [str(file) for file in done.files],
        "seconds": done and round(done.seconds, 3),
    }
