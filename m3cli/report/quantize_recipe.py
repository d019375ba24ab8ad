"""Recipes for quantization as a person and as a program sees them."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from m3cli.errors import UsageError
from m3cli.report.text import printable, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from quantize.recipes import Fit, Recipe


def recipe_table(recipes: Sequence[Recipe], fits: Sequence[Fit | UsageError | None]) -> Table:
    """One row a recipe; with columns on the model if one was given, which is when `fits` are not None."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("name", no_wrap=True)
    with_model = any(fit is not None for fit in fits)
    if with_model:
        table.add_column("bytes", justify="right", no_wrap=True)
        table.add_column("bits a weight", justify="right", no_wrap=True)
    table.add_column("description" if not with_model else "", overflow="fold")
    for recipe, fit in zip(recipes, fits, strict=True):
        note = recipe.description
        numbers = ["", ""]
        if isinstance(fit, UsageError):
            note = f"does not match: {fit.message}"
        elif fit is not None:
            numbers = [f"{fit.nbytes:,}", f"{fit.bits_per_weight:.3f}"]
        table.add_row(recipe.name, *(numbers if with_model else ()), Text(printable(note)))
    return table


def fit_line(fit: Fit) -> str:
    """Size of the model that a recipe makes."""
    return f"{fit.nbytes:,} bytes ({size(fit.nbytes)}), {fit.bits_per_weight:.3f} bits a weight"


def recipe_object(recipe: Recipe, fit: Fit | UsageError | None) -> dict[str, Any]:
    """A recipe and what it makes of the model: null without one, or where it does not match."""
    matched = None if isinstance(fit, UsageError) else fit
    return {
        "name": recipe.name,
        "description": recipe.description,
        "file_type": recipe.file_type,
        "tensors": [asdict(rule) for rule in recipe.rules],
        "nbytes": matched and matched.nbytes,
        "bits_per_weight": matched and round(matched.bits_per_weight, 4),
        "problem": str(fit) if isinstance(fit, UsageError) else None,
    }
