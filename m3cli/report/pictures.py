"""Pictures in files: PNG and SVG by matplotlib, the same bytes each time and whatever settings there are."""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from m3cli.errors import MachineError, UsageError
from m3cli.report.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

_MOST_CHARACTERS = 80  # of a name


def check_plot(path: Path) -> None:
    """Raise UsageError for a name that is no picture's, MachineError where pictures cannot be drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"The plot {path} is named neither *.png nor *.svg.", "Give --plot such a name.")
    if not path.parent.is_dir():
        raise UsageError(f"There is no directory {path.parent} for the plot.", "Make it first.")
    _load_matplotlib()


def _load_matplotlib() -> None:
    """Import matplotlib for the first time. Raises MachineError.

    Not in the current directory, which may be a tree that somebody else wrote: a file matplotlibrc there
    would be read.
    """
    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)  # it speaks of its fonts and settings
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir("/")
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"Plots are drawn by matplotlib, which cannot be loaded: {str(error).rstrip('.')}.",
            "Install it with: pip install 'm3cli[plot]'",
        ) from error
    except UnicodeError as error:
        raise MachineError(
            f"Plots are drawn by matplotlib, which cannot read its settings: {error}.",
            "Repair the file matplotlibrc of your settings.",
        ) from error
    finally:
        os.fchdir(here)
        os.close(here)


@contextmanager
def own_settings() -> Iterator[None]:
    """Draw in here: with matplotlib's own settings, not those of the user. Raises MachineError."""
    _load_matplotlib()
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font lacks
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.hashsalt": "m3", "font.size": 9, "axes.axisbelow": True})
        yield


def picture(figure: Figure, suffix: str) -> bytes:
    """`figure` as a PNG or SVG file, by `suffix`, without the time."""
    buffer = io.BytesIO()
    kind = suffix.lower().removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def drawable(text: str) -> str:
    """`text` without what no font has: control characters, and bytes of a file's name that are no UTF-8."""
    return printable(text).encode("utf-8", "replace").decode()[:_MOST_CHARACTERS]
