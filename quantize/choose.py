"""What a user asks for → the type of each tensor: by a mixture of llama.cpp's, a recipe, or a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from m3cli.errors import UsageError
from m3cli.model.header import read_header
from quantize import kinds
from quantize.importance import read_importance
from quantize.native import Native
from quantize.quantizer import SourceModel, check_output, check_source, provenance
from quantize.recipes import load_recipe
from quantize.solve import Budget, Measuring, Solved, Solver

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from quantize.quantizer import Output


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What to quantize, into which file, and one of `mixture`, `recipe` and `budget`, which is in bytes.

    `candidates` are the types that a budget may be spent on, None for all. `assume_importance` plans for an
    importance matrix that is yet to be computed; nothing can be written then.
    """

    source: Path
    output: Output
    mixture: str | None = None
    recipe: str | None = None
    budget: int | None = None
    imatrix: Path | None = None
    candidates: tuple[str, ...] | None = None
    assume_importance: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The types that were chosen, by tensor, and how the choice is called; `solved` if it is for a budget.

    A tensor that is not in `types` keeps its own.
    """

    source: SourceModel
    types: Mapping[str, str]
    name: str
    file_type: int
    solved: Solved | None = None


def choose(request: QuantizeRequest) -> Iterator[Measuring | Choice]:
    """Choose, which for a budget means to measure; ends with the Choice.

    Raises UsageError when what is asked for contradicts itself or cannot be had, ModelError for a file that
    is no model or no importance matrix, EngineCrashError when llama.cpp dies.
    """
    asked = [each for each in (request.mixture, request.recipe, request.budget) if each is not None]
    if len(asked) != 1:
        raise UsageError(
            "Nothing says what to quantize to."
            if not asked
            else "More than one thing says what to quantize to.",
            "Give one of --type, --recipe and --budget.",
        )
    if request.candidates is not None and request.budget is None:
        raise UsageError("--candidates are what a budget is spent on.", "Give --budget too, or leave it out.")
    check_output(request.output.path)
    header = read_header(request.source)
    importance = read_importance(request.imatrix) if request.imatrix is not None else None
    source = SourceModel(
        header,
        importance,
        request.imatrix.name if request.imatrix is not None else "",
        assume_importance=request.assume_importance,
    )
    with Native(request.output.threads) as native:
        if request.mixture is not None:
            file_type = kinds.file_type(request.mixture)
            known = importance is not None or request.assume_importance
            types = native.types(header, file_type, importance=known)
            yield Choice(source, types, request.mixture.upper(), file_type)
            return
        quantizable = native.quantizable(header)
        if request.recipe is not None:
            recipe = load_recipe(request.recipe)
            types = recipe.types(header.tensors, quantizable)
            yield Choice(source, types, recipe.name, kinds.file_type(recipe.file_type))
            return
        check_source(header, quantizable, allow_requantize=request.output.allow_requantize)
        assert request.budget is not None
        budget = Budget(request.budget, request.candidates or kinds.WRITTEN)
        solver = Solver(
            header,
            quantizable,
            budget,
            importance,
            request.output,
            provenance(source),
            assume_importance=request.assume_importance,
        )
        for event in solver.run(native):
            if isinstance(event, Measuring):
                yield event
            else:
                recipe = event.recipe
                yield Choice(source, event.types, recipe.name, kinds.file_type(recipe.file_type), event)
