"""What was measured so far of an importance matrix, in a file that nothing can tear."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from m3cli.errors import MachineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(slots=True)
class Totals:
    """Of one tensor: float64 sums [n_mat, n_cols] and int64 counts [n_mat]."""

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]


class PartialMatrix:
    """Results so far, in `OUT.partial.npz`: one file, replaced as a whole, beside the output.

    An npz file of NumPy: `identity` is JSON as text, the others are `sums/TENSOR` and `counts/TENSOR`.
    """

    def __init__(self, out: Path, *, resume: bool) -> None:
        self.path = out.with_name(out.name + ".partial.npz")
        self._new = out.with_name(out.name + ".partial.new")
        self._out = out
        self.restart = f"Delete {self.path} to start anew."
        self.refuse_existing_output()
        if not out.parent.is_dir():
            raise UsageError(f"The directory {out.parent} does not exist.", "Make it, or name another --out.")
        if os.path.lexists(self.path) and not resume:
            raise UsageError(
                f"There is an unfinished importance matrix in {self.path}.",
                f"Continue it with --resume. {self.restart}",
            )

    def refuse_existing_output(self) -> None:
        """Raise UsageError when the output exists."""
        if os.path.lexists(self._out):
            raise UsageError(f"{self._out} already exists.", "Delete it, or name another file with --out.")

    def read(
        self, identity: Mapping[str, object]
    ) -> tuple[int, str, dict[str, Totals], dict[str, float | None]]:
        """How many windows are done, the digest of their text, what they gave, and sensitivities.

        Nothing of all this without a file.

        Raises UsageError when it is damaged, or was begun with something else than `identity`.
        """
        if not os.path.lexists(self.path):
            return 0, "", {}, {}
        try:
            # An open one, because NumPy does not close a file that it finds to be broken.
            with self.path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                found = json.loads(str(file["identity"]))
                names = [key.removeprefix("sums/") for key in file.files if key.startswith("sums/")]
                done, text = int(found["done"]), str(found["text"])
                sensitivities = dict(found["sensitivities"])
                totals = {name: Totals(file[f"sums/{name}"], file[f"counts/{name}"]) for name in names}
        except (OSError, EOFError, ValueError, TypeError, LookupError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"{self.path} is no unfinished importance matrix, or it is damaged.", self.restart
            ) from error
        for name, value in identity.items():
            if found.get(name) != value:
                raise self.mismatch(name.replace("_", " "))
        return done, text, totals, sensitivities

    def mismatch(self, what: str) -> UsageError:
        """The refusal to go on with results that were begun with another `what`."""
        return UsageError(
            f"The unfinished importance matrix in {self.path} was begun with another {what}.",
            f"Use the options that it was begun with. {self.restart}",
        )

    def write(self, identity: Mapping[str, object], totals: Mapping[str, Totals]) -> None:
        """Replace the file. Raises MachineError when the disk is full or does not let itself be written."""
        arrays: dict[str, Any] = {"identity": np.array(json.dumps(identity))}
        for name, each in totals.items():
            arrays |= {f"sums/{name}": each.sums, f"counts/{name}": each.counts}
        try:
            with self._new.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            self._new.replace(self.path)
        except OSError as error:
            raise MachineError(
                f"{self.path} cannot be written: {error.strerror or error}.",
                "Free some space or check the permissions, then continue with --resume.",
            ) from error
        finally:
            self._new.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete what is not needed any more."""
        for path in (self.path, self._new):
            path.unlink(missing_ok=True)
