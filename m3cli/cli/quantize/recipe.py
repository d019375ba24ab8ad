"""`m3 quantize recipe`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from m3cli.cli import options, values
from m3cli.cli.quantize.app import quantize
from m3cli.errors import UsageError

if TYPE_CHECKING:
    from m3cli.model.header import Header
    from quantize.recipes import Fit, Recipe


@quantize.command("recipe")
def recipe(
    name: Annotated[str | None, typer.Argument(metavar="[NAME|FILE.toml]", show_default=False)] = None,
    model: options.Model = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,  # noqa: ARG001 - read from sys.argv by m3cli.cli.app
) -> None:
    """Show the recipes that there are, or print one: which type each tensor gets, and why.

    With a model, also how large each recipe makes it, to the byte.

    Example:  m3 quantize recipe m3-q3 > mine.toml
    """
    from m3cli.report.output import write_json, write_stdout
    from m3cli.report.quantize_recipe import fit_line, recipe_object, recipe_table
    from m3cli.report.text import stderr_console
    from quantize.recipes import built_in, load_recipe

    if name is None:
        recipes = built_in()
        fits = _fits(recipes, model)
        if json:
            write_json([recipe_object(each, fit) for each, fit in zip(recipes, fits, strict=True)])
        else:
            values.stdout_console().print(recipe_table(recipes, fits))
        return
    chosen = load_recipe(name)
    fit = _fits((chosen,), model)[0]
    if isinstance(fit, UsageError):
        raise fit
    if json:
        write_json(recipe_object(chosen, fit))
        return
    write_stdout([chosen.toml().encode()])
    if fit is not None and not quiet:
        stderr_console().print(fit_line(fit), markup=False)


def _fits(recipes: tuple[Recipe, ...], model: str | None) -> list[Fit | UsageError | None]:
    """What each recipe makes of the model, or why it cannot; None without a model."""
    if model is None:
        return [None] * len(recipes)
    from m3cli.model.catalog import resolve
    from m3cli.model.header import read_header
    from m3cli.settings import load_settings
    from quantize.native import Native

    settings = load_settings({"model": model})
    path = resolve(settings.model, settings.models).path
    header = read_header(path)
    with Native() as native:
        quantizable = native.quantizable(header)
    return [_fit(recipe, header, quantizable) for recipe in recipes]


def _fit(recipe: Recipe, header: Header, quantizable: frozenset[str]) -> Fit | UsageError:
    try:
        return recipe.fit(header, quantizable)
    except UsageError as error:
        return error
