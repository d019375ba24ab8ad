"""A recipe for a budget: the types that fit into so many bytes and together change the model least."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from m3cli.errors import UsageError
from m3cli.model.header import DEFAULT_ALIGNMENT
from quantize import kinds
from quantize.budget import Option, allocate, smallest
from quantize.layout import OutTensor, lay_out
from quantize.measure import measure, possible_types, typical
from quantize.quantizer import is_covered
from quantize.recipes import Recipe, Rule
from quantize.roles import role_of
from quantize.sensitivity import typical_sensitivity

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from m3cli.model.header import Header, Tensor
    from quantize.budget import Allocation
    from quantize.importance import Importance
    from quantize.measure import Measured
    from quantize.native import Native
    from quantize.quantizer import Output

_FILE_TYPES = {
    "Q3_K": "Q3_K_M",
    "Q4_K": "Q4_K_M",
    "Q5_K": "Q5_K_M",
    "MXFP4": "MXFP4_MOE",
}  # that are called otherwise than tensors


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of the whole output, and the types that tensors may get for it."""

    nbytes: int
    candidates: tuple[str, ...] = kinds.WRITTEN


@dataclass(frozen=True, slots=True)
class Measuring:
    """`done` of `total` tensors have been quantized, on a sample, to every candidate; now comes `tensor`."""

    done: int
    total: int
    tensor: str


class Share(NamedTuple):
    """What became of the tensors of one role, such as `ffn_down_exps`.

    `types` counts them by type; `cost` is their part of the whole, 0 to 1.
    """

    role: str
    types: tuple[tuple[str, int], ...]
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Solved:
    """The recipe, and how it came about. `total_bytes` are those of the output.

    `cost` is the predicted KL divergence from the source, in nats a token, and no recipe of these
    candidates within the budget has one below `bound`. `price` is what it would fall by for another
    byte. If not `measured`, the file holds no data, and errors are those that each type typically makes;
    without `sensitivities` of this model, those of other models are taken for it.
    """

    recipe: Recipe
    types: Mapping[str, str]
    total_bytes: int
    cost: float
    bound: float
    price: float
    shares: tuple[Share, ...]
    measured: bool
    sensitivities: bool


class Solver:
    """Finds the recipe for `budget`; `extra` are the keys that the output will have beside the source's.

    With `assume_importance` it is a forecast of what there will be with an importance matrix: nothing is
    measured, and errors are those that each type typically makes.

    Raises UsageError for a candidate that is no type, and for a budget that is too small even with the
    smallest types, before anything is measured.
    """

    def __init__(
        self,
        header: Header,
        quantizable: Collection[str],
        budget: Budget,
        importance: Importance | None,
        output: Output,
        extra: Mapping[str, str | int],
        *,
        assume_importance: bool = False,
    ) -> None:
        self._assumed = assume_importance
        self._header, self._budget, self._importance = header, budget, importance
        self._output, self._extra = output, extra
        self._tensors = {tensor.name: tensor for tensor in header.tensors if tensor.name in quantizable}
        self._alignment = header.get_int("general.alignment") or DEFAULT_ALIGNMENT
        unknown = [kind for kind in budget.candidates if kind not in kinds.WRITTEN]
        if unknown:
            raise UsageError(f"There is no type {unknown[0]}.", kinds.closest(unknown[0], kinds.WRITTEN))
        least = self._total(self._least_types())
        if least > budget.nbytes:
            known = importance is not None or assume_importance
            smaller = "" if known else ", or an importance matrix with --imatrix, which allows smaller types"
            raise UsageError(
                f"The budget of {budget.nbytes:,} bytes is too small: the model takes {least:,} bytes with "
                "the smallest types that it can have.",
                f"Give more{smaller}.",
            )

    def run(self, native: Native) -> Iterator[Measuring | Solved]:
        """Measure each tensor, then choose; ends with Solved. Raises what Native.errors raises."""
        options: dict[str, list[Option]] = {}
        measured = False
        for each in self._measured(native):
            tensor = each.tensor
            yield Measuring(len(options), len(self._tensors), tensor.name)
            measured = measured or each.measured
            weight = self._sensitivity(tensor.name)
            options[tensor.name] = [
                Option(kind, self._nbytes(tensor, kind), weight * error)
                for kind, error in each.errors.items()
            ]
        allocation, total = self._allocate(options)
        types = {name: option.type for name, option in allocation.chosen.items()}
        nbytes = Counter[str]()
        for option in allocation.chosen.values():
            nbytes[option.type] += option.nbytes
        largest = max(nbytes, key=lambda kind: nbytes[kind])
        yield Solved(
            Recipe(
                _text(self._output.path.stem),
                f"Found for {_text(self._header.path.name)} and a budget of {self._budget.nbytes:,} bytes.",
                tuple(self._rules(allocation)),
                _FILE_TYPES.get(largest, largest),
            ),
            types,
            total,
            allocation.cost,
            allocation.bound,
            allocation.price,
            tuple(_shares(allocation)),
            measured,
            self._importance is not None and bool(self._importance.sensitivities),
        )

    def _measured(self, native: Native) -> Iterator[Measured]:
        if not self._assumed:
            return measure(native, self._header, self._tensors, self._budget.candidates, self._importance)
        return (typical(tensor, self._possible(tensor)) for tensor in self._tensors.values())

    def _allocate(self, options: Mapping[str, Sequence[Option]]) -> tuple[Allocation, int]:
        """The choice, and the bytes of the output; where it is cut into parts depends on the choice."""
        least = smallest(options)
        room = least + self._budget.nbytes - self._total(self._least_types())
        while True:
            allocation = allocate(options, max(room, least))
            total = self._total({name: option.type for name, option in allocation.chosen.items()})
            if total <= self._budget.nbytes or room <= least:
                return allocation, total
            room -= total - self._budget.nbytes

    def _least_types(self) -> dict[str, str]:
        return {name: self._smallest(tensor) for name, tensor in self._tensors.items()}

    def _total(self, types: Mapping[str, str]) -> int:
        files = lay_out(
            self._header,
            types,
            self._output.path.name,
            file_type=0,
            split_max_bytes=self._output.split_max_bytes,
            extra=self._extra,
        )
        return sum(file.nbytes for file in files)

    def _possible(self, tensor: Tensor) -> list[str]:
        there = self._assumed or is_covered(tensor, self._importance)
        return possible_types(tensor, self._budget.candidates, with_importance=there)

    def _smallest(self, tensor: Tensor) -> str:
        return min(self._possible(tensor), key=lambda kind: self._nbytes(tensor, kind))

    def _nbytes(self, tensor: Tensor, kind: str) -> int:
        return OutTensor(tensor, kind, self._alignment).padded

    def _rules(self, allocation: Allocation) -> Iterator[Rule]:
        """A rule for each role and type; the most frequent type of a role comes last and names no layers."""
        by_role: dict[str, dict[str, list[str]]] = {}
        for name, option in allocation.chosen.items():
            by_role.setdefault(role_of(name)[1], {}).setdefault(option.type, []).append(name)
        for each, by_kind in by_role.items():
            *some, (most, rest) = sorted(by_kind.items(), key=lambda item: (len(item[1]), item[0]))
            for kind, names in some:
                layers = "|".join(str(role_of(name)[0]) for name in names)
                pattern = rf"^blk\.({layers})\.{re.escape(each)}\.weight$"
                yield Rule(pattern, kind, self._reason(allocation, names))
            inside = "" if role_of(rest[0])[0] is None else r"blk\.\d+\."
            yield Rule(rf"^{inside}{re.escape(each)}\.weight$", most, self._reason(allocation, rest))

    def _reason(self, allocation: Allocation, names: Sequence[str]) -> str:
        share = sum(allocation.chosen[name].cost for name in names) / (allocation.cost or 1.0)
        matters = sum(self._sensitivity(name) for name in names) / len(names)
        return f"sensitivity {matters:.2g}; {share:.1%} of what the model loses is lost here"

    def _sensitivity(self, tensor: str) -> float:
        measured = self._importance.sensitivities if self._importance is not None else {}
        if tensor in measured:
            return measured[tensor]
        is_output = tensor == "token_embd.weight" and "output.weight" not in self._tensors
        return typical_sensitivity("output.weight" if is_output else tensor)


def _text(name: str) -> str:
    """A file's name without what is no Unicode."""
    return name.encode("utf-8", "replace").decode()


def _shares(allocation: Allocation) -> Iterator[Share]:
    by_role: dict[str, list[Option]] = {}
    for name, option in allocation.chosen.items():
        by_role.setdefault(role_of(name)[1], []).append(option)
    for each, chosen in by_role.items():
        counts = Counter(option.type for option in chosen)
        yield Share(
            each,
            tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            sum(option.nbytes for option in chosen),
            sum(option.cost for option in chosen) / allocation.cost if allocation.cost else 0.0,
        )
