"""Recipes: which type each tensor of a model gets, as a list of rules that people read and change.

    name = "mine"                     # without it, the name of the file
    description = "…"                 # may be left out
    file_type = "Q3_K_M"              # what the model file will say it is
    [[tensors]]                       # the first rule whose pattern is found in a tensor's name decides
    pattern = 'ffn_down_exps'         # a regular expression of Python's
    type = "Q4_K"                     # of quantize.kinds.WRITTEN, or "keep": as in the source
    reason = "…"                      # may be left out

The recipes that m3 brings for MiniMax-M3 are the files in recipes/: a model made by one takes at most 92 % of
the memory that its description names; KV cache and buffers have the rest. The uniform ones are made here.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from m3cli.errors import UsageError
from m3cli.model.ggml_types import FILE_TYPES
from quantize import kinds
from quantize.layout import lay_out
from quantize.patterns import alike, check, find

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from typing import NoReturn

    from m3cli.model.header import Header, Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEEP = "keep"

_SECONDS = 10.0  # to look for all patterns of a recipe in all names: far above what sane ones take
_LARGEST_FILE = 1 << 20  # bytes; room for a rule for each tensor of the largest models
_KEYS = ("name", "description", "file_type", "tensors")
_RULE_KEYS = ("pattern", "type", "reason")
_START_FROM = "m3 quantize recipe m3-q2 prints one to start from."

_UNIFORM = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K"),
    *("Q5_K", "Q6_K", "Q8_0"),
)
# Types that llama.cpp's mixture of the same name is not mainly of, or that have none → the nearest mixture.
_MIXTURES = {"IQ2_S": "IQ2_M", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors in whose name `pattern` is found get `type`, unless an earlier rule names them."""

    pattern: str
    type: str
    reason: str = ""


class Fit(NamedTuple):
    """What a recipe makes of a model: bytes of the file, and bits per weight of its tensors."""

    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules, tried from the first to the last. `file_type` is what the model file will say it is: "Q2_K"."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    file_type: str

    def types(self, tensors: Sequence[Tensor], quantizable: Collection[str]) -> dict[str, str]:
        """Return the type that each tensor gets, by name.

        Those not in `quantizable`, which llama.cpp's quantizer leaves as they are, keep theirs; one whose
        rows a type does not divide gets what llama.cpp takes in its place. Raises UsageError for a rule
        that decides about no tensor or wants the impossible, and for a tensor that no rule names.
        """
        result = {tensor.name: tensor.type for tensor in tensors}
        left = {tensor.name: tensor for tensor in tensors}
        deadline = time.monotonic() + _SECONDS
        for position, rule in enumerate(self.rules, 1):
            where = f"Rule {position} ({rule.pattern}) of recipe {self.name}"
            named = find(rule.pattern, left, where, deadline)
            if not named:
                self._useless(where, rule, list(result), deadline)
            taken = [left.pop(name) for name in named]
            changed = [tensor for tensor in taken if tensor.name in quantizable]
            if rule.type == KEEP:
                continue
            if not changed and any(tensor.type != rule.type for tensor in taken):
                raise UsageError(
                    f"{where} gives {_listing(named)} the type {rule.type}, but llama.cpp leaves norms, "
                    "router, indexer, biases and the like as they are.",
                    'Give the rule the type "keep", or remove it.',
                )
            for tensor in changed:
                result[tensor.name] = kinds.fallback(rule.type, tensor.dims[0])
        if forgotten := [name for name in left if name in quantizable]:
            raise UsageError(
                f"No rule of recipe {self.name} names {_listing(forgotten)}.",
                'Add a rule for it; one with the pattern ".*" at the end takes all that is left.',
            )
        return result

    def fit(self, header: Header, quantizable: Collection[str]) -> Fit:
        """Return how large the model of `header` becomes in one file. Raises UsageError like `types`."""
        types = self.types(header.tensors, quantizable)
        files = lay_out(header, types, "model.gguf", file_type=kinds.file_type(self.file_type))
        weights = sum(tensor.nbytes for file in files for tensor in file.tensors)
        elements = sum(tensor.elements for tensor in header.tensors)
        return Fit(sum(file.nbytes for file in files), 8 * weights / max(elements, 1))

    def toml(self) -> str:
        """Return the recipe as a file that `load_recipe` reads."""
        lines = [f"name = {_quoted(self.name)}"]
        if self.description:
            lines.append(f"description = {_quoted(self.description)}")
        lines.append(f"file_type = {_quoted(self.file_type)}")
        for rule in self.rules:
            # Without escapes a pattern is read as it is meant, and TOML has strings for that.
            plain = rule.pattern.isprintable() and "'" not in rule.pattern
            pattern = f"'{rule.pattern}'" if plain else _quoted(rule.pattern)
            lines += ["", "[[tensors]]", f"pattern = {pattern}", f"type = {_quoted(rule.type)}"]
            if rule.reason:
                lines.append(f"reason = {_quoted(rule.reason)}")
        return "\n".join(lines) + "\n"

    def _useless(self, where: str, rule: Rule, names: Sequence[str], deadline: float) -> NoReturn:
        if find(rule.pattern, names, where, deadline):
            raise UsageError(
                f"{where} decides about nothing: all tensors that it names are named by rules above it.",
                "Move the rule up or remove it.",
            )
        raise UsageError(
            f"{where} names no tensor of this model.",
            f"Correct or remove it; tensors are called {', '.join(alike(rule.pattern, names))}."
            if names
            else "Choose a model file that has tensors.",
        )


@cache
def built_in() -> tuple[Recipe, ...]:
    """The recipes that m3 brings, of each sort those with the fewest bits first."""
    directory = resources.files("quantize").joinpath("recipes")
    files = [file for file in directory.iterdir() if file.name.endswith(".toml")]
    brought = [_parse(file.read_bytes(), file.name, file.name) for file in files]
    return (*map(_uniform, _UNIFORM), *sorted(brought, key=_fewest_bits))


def load_recipe(name_or_path: str) -> Recipe:
    """Return the built-in recipe of this name, or read a file: what ends in .toml or has a separator.

    Raises UsageError for a name that there is not and a file that is no recipe.
    """
    if name_or_path.endswith(".toml") or any(mark and mark in name_or_path for mark in (os.sep, os.altsep)):
        return _read(name_or_path)
    recipes = {recipe.name: recipe for recipe in built_in()}
    if name_or_path.lower() not in recipes:
        raise UsageError(
            f"There is no recipe {name_or_path}.",
            f"{kinds.closest(name_or_path.lower(), tuple(recipes))} A file's name ends in .toml.",
        )
    return recipes[name_or_path.lower()]


def _fewest_bits(recipe: Recipe) -> tuple[float, str]:
    return min(kinds.bits(rule.type) for rule in recipe.rules if rule.type != KEEP), recipe.name


def _uniform(kind: str) -> Recipe:
    name, file_type = f"uniform-{kind.lower()}", _MIXTURES.get(kind, kind)
    size = f"{kinds.bits(kind):g} bits a weight"
    needs = "; needs an importance matrix" if kinds.needs_importance(kind, "") else ""
    rest = Rule(".*", kind)
    if not kinds.needs_importance(kind, "output.weight"):
        return Recipe(name, f"All matrices in {kind}, {size}{needs}.", (rest,), file_type)
    ends = Rule(
        r"^(token_embd|output)\.weight$",
        "Q4_K",
        f"Importance matrices rarely cover these, and without one nothing can be quantized to {kind}.",
    )
    description = f"All matrices but embeddings and output in {kind}, {size}{needs}."
    return Recipe(name, description, (ends, rest), file_type)


def _listing(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def _quoted(text: str) -> str:
    """A basic string of TOML, which has the escapes of JSON; but JSON lets one control character stand."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(name: str) -> Recipe:
    path = Path(name)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            raise UsageError(f"{name} is no recipe: not a small regular file.", _START_FROM)
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        words = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"The recipe {name} cannot be read: {words}.", "m3 quantize recipe lists those that need no file."
        ) from error
    return _parse(data, name, path.stem.encode("utf-8", "replace").decode())


def _parse(data: bytes, place: str, name: str) -> Recipe:
    """Make a recipe of the content of the file `place`; `name` is for one that does not say its own."""
    try:
        values: dict[str, object] = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{place} is not valid TOML: {error}.", f"Correct it; {_START_FROM}") from error
    _check_keys(values, _KEYS, place)
    file_type = _text(values, "file_type", place)
    if not file_type:
        raise UsageError(
            f"{place} lacks the key file_type.",
            'Add what the model file is to say it is, such as file_type = "Q4_K_M".',
        )
    try:
        file_type = FILE_TYPES[kinds.file_type(file_type)]
    except UsageError as error:
        raise UsageError(f"{place} has the file_type {file_type}, which there is not.", error.hint) from error
    rules = values.get("tensors")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise UsageError(
            f"{place} has no rules: nothing under [[tensors]].",
            "Write [[tensors]], then pattern = and type =, for each.",
        )
    return Recipe(
        _text(values, "name", place) or name,
        _text(values, "description", place),
        tuple(_rule(rule, f"Rule {position} of {place}") for position, rule in enumerate(rules, 1)),
        file_type,
    )


def _rule(values: Mapping[str, object], where: str) -> Rule:
    _check_keys(values, _RULE_KEYS, where)
    pattern, kind = _text(values, "pattern", where), _text(values, "type", where)
    for key, value in (("pattern", pattern), ("type", kind)):
        if not value:
            raise UsageError(
                f"{where} lacks the key {key}.",
                "A rule has a pattern, a type and, if you like, a reason.",
            )
    check(pattern, where)
    if kind.lower() == KEEP:
        kind = KEEP
    elif kind.upper() in kinds.WRITTEN:
        kind = kind.upper()
    else:
        raise UsageError(
            f"{where} has the type {kind}, to which m3 does not quantize a tensor.",
            kinds.closest(kind, (*kinds.WRITTEN, KEEP)),
        )
    return Rule(pattern, kind, _text(values, "reason", where))


def _check_keys(values: Mapping[str, object], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UsageError(f"{where} has the key {key}, which m3 does not know.", kinds.closest(key, known))


def _text(values: Mapping[str, object], key: str, where: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise UsageError(f"{where} has a {key} that is no string.", f'Write it as {key} = "…".')
    return value
