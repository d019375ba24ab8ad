"""A download as a person and as a program sees it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from m3cli.model.pull import Trouble
from m3cli.report.progress import BytesConsole
from m3cli.report.text import amount, duration, printable, size

if TYPE_CHECKING:
    from rich.table import Table

    from m3cli.tasks.pull import Offer, Progress, PullPlan


class PullConsole(BytesConsole):
    """Renders a download on stderr. A context manager: the progress bar ends with it."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__("the same command goes on from here", quiet=quiet)
        self._started = time.monotonic()

    def __enter__(self) -> PullConsole:
        return self

    def plan(self, plan: PullPlan) -> None:
        """What there is, and what was chosen."""
        if not self._quiet:
            self._stderr.print(offers_table(plan))
            self._stderr.print(printable(chosen_line(plan)), markup=False)

    def consent(self, plan: PullPlan) -> bool:
        """Ask whether to download under the model's licence; shown with --quiet too, as it is a question."""
        self._stderr.print(printable(license_line(plan)), markup=False)
        question = f"Download {size(plan.missing_bytes)} and accept this licence? [y/N] "
        try:
            return self._stderr.input(question, markup=False).strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def show(self, event: Progress | Trouble) -> None:
        """Render one event."""
        if isinstance(event, Trouble):
            self.note(f"note: {event.sentence}")
            return
        self.advance(event.name.rpartition("/")[2], event.done, event.total)

    def done(self, plan: PullPlan, received: int) -> None:
        """Say how it ended."""
        files = amount(len(plan.chosen.quant.files), "file")
        seconds = duration(time.monotonic() - self._started)
        self.note(
            f"{files}, {size(plan.chosen.quant.nbytes)}, verified; {size(received)} received in {seconds}"
        )


def license_line(plan: PullPlan) -> str:
    """The licence, as stated by the card and by the model's header."""
    return f"licence: {' / '.join(plan.licenses) or 'none stated'} ({plan.repository.name})"


def chosen_line(plan: PullPlan) -> str:
    """What a run would download, and where to."""
    quant = plan.chosen.quant
    there = quant.nbytes - plan.missing_bytes
    had = f", of which {size(there)} are there" if there else ""
    return (
        f"{plan.repository.name} {quant.name}: {amount(len(quant.files), 'file')}, {size(quant.nbytes)}{had}"
        f", to {plan.target.root} ({size(plan.free_bytes)} free)"
    )


def offers_table(plan: PullPlan) -> Table:
    """One row a quant; the chosen one is marked."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "quant", "size", "files", "here", box=None, padding=(0, 2, 0, 0))
    for offer in plan.offers:
        chosen = offer.quant.name == plan.chosen.quant.name
        table.add_row(
            "*" if chosen else "",
            Text(printable(offer.quant.name)),
            size(offer.quant.nbytes),
            str(len(offer.quant.files)),
            Text(printable(_verdict(offer)), overflow="fold"),
        )
    return table


def _verdict(offer: Offer) -> str:
    if offer.problem:
        return f"broken: {offer.problem}"
    return offer.misfit or ("fits" if offer.facts else "fits; header not read")


def pull_object(plan: PullPlan, received: int | None) -> dict[str, Any]:
    """The choice, and what was received in bytes: null after a dry run."""
    quant = plan.chosen.quant
    return {
        "repository": plan.repository.name,
        "revision": plan.repository.revision,
        "commit": plan.repository.commit,
        "license": list(plan.licenses),
        "quant": quant.name,
        "bytes": quant.nbytes,
        "missing_bytes": plan.missing_bytes,
        "free_bytes": plan.free_bytes,
        "path": str(plan.path),
        "files": [
            {
                "name": file.name,
                "path": str(plan.target.path(file)),
                "bytes": file.nbytes,
                "digest": file.digest,
            }
            for file in quant.files
        ],
        "received_bytes": received,
        "quants": [
            {
                "name": offer.quant.name,
                "bytes": offer.quant.nbytes,
                "files": len(offer.quant.files),
                "fits": not offer.misfit,
                "misfit": offer.misfit or None,
                "header_read": offer.facts is not None,
                "problem": offer.problem or None,
            }
            for offer in plan.offers
        ],
    }
