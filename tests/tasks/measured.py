"""Models about which it is on record how much context they use well, and trees that are longer than that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m3cli.model.catalog import resolve
from m3cli.model.digest import model_digest
from m3cli.tasks.context import ContextRequest
from m3cli.tasks.evaluate.effective import variant_of
from m3cli.tasks.evaluate.results import Outcome, Run
from m3cli.tasks.evaluate.store import remember
from m3cli.tasks.model import open_model

if TYPE_CHECKING:
    from pathlib import Path

    from m3cli.tasks.evaluate.difference import Difference


def measured(state_dir: Path, *, good: int, longest: int, gains: dict[str, Difference] | None = None) -> None:
    """Have it on record that the demo model uses `good` tokens well, of `longest` that were tried."""
    with open_model(resolve(None, {})) as model:
        config = ContextRequest(None, model.ref).run.engine_config(model.header, model.shape, 0)
        variant = variant_of(model_digest(model.header), model.shape, config)
    outcomes = tuple(
        Outcome(
            "code_file",
            "code",
            "whole",
            length,
            str(i),
            "?",
            ("x",),
            0.5,
            float(length <= good),
            "",
            1,
            0,
            1,
            0.0,
        )
        for length in (512, good, longest)
        for i in range(50)
    )
    remember(state_dir, variant, Run("f16", "f16", "full", "whole", outcomes).groups(), gains or {})


def long_tree(tree: Path) -> Path:
    """With some 5,000 tokens."""
    for number in range(12):
        lines = "".join(f"value_{number}_{i} = {i}\n" for i in range(30))
        (tree / f"file_{number}.py").write_text(lines)
    return tree
