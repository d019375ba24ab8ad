"""Budgets: never exceeded, predicted to the byte, and spent where it matters."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.errors import UsageError
from m3cli.model.ggml_types import FILE_TYPES
from m3cli.model.header import Header, read_header
from quantize import kinds
from quantize.choose import Choice, QuantizeRequest, choose
from quantize.events import Converted
from quantize.importance import Importance
from quantize.layout import lay_out
from quantize.native import Native
from quantize.quantizer import Output, Quantization
from quantize.recipes import load_recipe
from quantize.roles import role_of
from quantize.solve import Budget, Measuring, Solved, Solver
from scripts.make_shape_gguf import write_shape

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

LARGE = 10**12


class Model:
    """A header, what of it can be quantized, and budgets for it: nothing is measured, no weight is read."""

    def __init__(self, path: Path, quantizable: Collection[str] | None = None) -> None:
        self.header: Header = read_header(path)
        if quantizable is None:
            with Native(1) as native:
                quantizable = native.quantizable(self.header)
        self.quantizable = frozenset(quantizable)

    def solver(
        self,
        nbytes: int,
        candidates: tuple[str, ...] = kinds.WRITTEN,
        *,
        split: int = 0,
        importance: Importance | None = None,
        extra: Mapping[str, str | int] | None = None,
    ) -> Solver:
        return Solver(
            self.header,
            self.quantizable,
            Budget(nbytes, candidates),
            importance,
            Output(Path("found.gguf"), split),
            extra or {},
            assume_importance=True,
        )

    def solve(
        self,
        nbytes: int,
        candidates: tuple[str, ...] = kinds.WRITTEN,
        *,
        split: int = 0,
        importance: Importance | None = None,
    ) -> Solved:
        solver = self.solver(nbytes, candidates, split=split, importance=importance)
        *before, solved = solver.run(Native(1))  # which never starts: there is nothing to ask
        assert isinstance(solved, Solved)
        assert all(isinstance(each, Measuring) for each in before)
        return solved

    def minimum(self, candidates: tuple[str, ...] = kinds.WRITTEN, *, split: int = 0) -> int:
        """Bytes of the output with the smallest of `candidates` everywhere."""
        types = {}
        for tensor in self.header.tensors:
            if tensor.name in self.quantizable:
                possible = [kinds.fallback(kind, tensor.dims[0]) for kind in candidates] + [tensor.type]
                types[tensor.name] = min(possible, key=kinds.bits)
        return self.nbytes(types, split)

    def nbytes(self, types: Mapping[str, str], split: int = 0) -> int:
        files = lay_out(self.header, types, "found.gguf", file_type=0, split_max_bytes=split)
        return sum(file.nbytes for file in files)


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Path) -> Model:
    return Model(tiny_gguf)


@pytest.fixture(scope="module")
def m3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of MiniMax-M3's shape with a hole in the place of its weights."""
    path = tmp_path_factory.mktemp("m3") / "m3.gguf"
    write_shape("minimax-m3", "BF16", path, vocabulary=False)
    return path


candidate_sets = st.lists(st.sampled_from(kinds.WRITTEN), min_size=1, unique=True).map(tuple)


@settings(max_examples=60)
@given(candidate_sets, st.integers(0, 30_000_000), st.sampled_from([0, 300_000, 1_000_000, 3_000_000]))
def test_a_budget_is_never_exceeded(tiny: Model, candidates: tuple[str, ...], spare: int, split: int) -> None:
    """Any budget from the minimum on has a solution within it, of the size that is said, by its own rules."""
    budget = tiny.minimum(candidates, split=split) + spare
    solved = tiny.solve(budget, candidates, split=split)
    assert solved.total_bytes == tiny.nbytes(solved.types, split) <= budget
    assert set(solved.types) == tiny.quantizable
    assert 0 <= solved.bound <= solved.cost
    for tensor in tiny.header.tensors:
        if kind := solved.types.get(tensor.name):
            assert kind in {tensor.type, *(kinds.fallback(each, tensor.dims[0]) for each in candidates)}
    ruled = solved.recipe.types(tiny.header.tensors, tiny.quantizable)
    assert {name: ruled[name] for name in solved.types} == solved.types


@pytest.mark.parametrize("split", [0, 300_000, 1_000_000])
@pytest.mark.parametrize(
    "candidates", [("Q4_K", "Q8_0"), ("Q8_0", "Q4_K"), ("BF16", "IQ1_S", "Q6_K"), kinds.WRITTEN]
)
def test_the_minimum_is_enough(tiny: Model, candidates: tuple[str, ...], split: int) -> None:
    """A budget of the smallest types works, in whatever order they are named; one byte less is refused."""
    minimum = tiny.minimum(candidates, split=split)
    solved = tiny.solve(minimum, candidates, split=split)
    assert solved.total_bytes == minimum
    with pytest.raises(UsageError, match="is too small: the model takes"):
        tiny.solver(minimum - 1, candidates, split=split)


def test_the_minimum_that_is_said_can_be_given(tiny: Model) -> None:
    """Whoever gives the size that the error names is not refused again."""
    with pytest.raises(UsageError) as refused:
        tiny.solver(1_500_000)
    found = re.search(r"the model takes ([\d.,]+) (\w+)", str(refused.value))
    assert found is not None
    units = {"bytes": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    said = round(float(found[1].replace(",", "")) * units[found[2]])
    assert tiny.solve(said).total_bytes <= said < tiny.minimum() * 1.01


def test_what_the_file_says_beside_counts(tiny: Model) -> None:
    """Keys that the output will have more than the source are in the budget."""
    minimum = tiny.minimum()
    tiny.solver(minimum)
    with pytest.raises(UsageError, match="too small"):
        tiny.solver(minimum, extra={"quantize.imatrix.dataset": "x" * 1000})


def test_more_bytes_never_cost_more(tiny: Model) -> None:
    """The predicted divergence falls with the budget, from the minimum to where nothing is lost."""
    minimum = tiny.minimum()
    costs = [tiny.solve(minimum + spare).cost for spare in range(0, 26_000_000, 650_000)]
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(costs))
    assert costs[0] > 100 * costs[len(costs) // 2]
    best = tiny.solve(LARGE)
    assert (best.cost, best.bound, best.price) == (0, 0, 0)  # and no bound below zero


def test_a_sensitive_tensor_gets_more_bits(tiny: Model) -> None:
    """What matters ten thousand times as much has the better type; the others make room for it."""
    budget, name = 3_500_000, "blk.2.ffn_up_exps.weight"
    plain = tiny.solve(budget)
    sensitive = Importance({}, (), 512, 4, {name: 500.0})
    found = tiny.solve(budget, importance=sensitive)
    assert (plain.sensitivities, found.sensitivities) == (False, True)
    assert kinds.bits(found.types[name]) > kinds.bits(plain.types[name])
    others = [(plain.types[each], found.types[each]) for each in plain.types if each != name]
    assert all(kinds.bits(after) <= kinds.bits(before) for before, after in others)
    # and a rule of its own, while its role goes by another
    assert any("(2)" in rule.pattern and rule.type == found.types[name] for rule in found.recipe.rules)


def test_candidates_are_respected(tiny: Model) -> None:
    """Only these types, and what tensors have already, occur; unknown ones are refused."""
    found = tiny.solve(5_000_000, ("Q4_K", "Q6_K"))
    assert set(found.types.values()) <= {"Q4_K", "Q6_K", "F32"}
    assert {"Q4_K", "Q6_K"} <= set(found.types.values())
    with pytest.raises(UsageError, match=r"There is no type Q4_L\."):
        tiny.solver(5_000_000, ("Q4_K", "Q4_L"))


def test_shares_add_up(tiny: Model) -> None:
    """Roles count each tensor once, and their parts of the loss are the whole."""
    found = tiny.solve(4_000_000)
    assert sum(count for share in found.shares for _, count in share.types) == len(found.types)
    assert sum(share.cost for share in found.shares) == pytest.approx(1)
    assert {share.role for share in found.shares} == {role_of(name)[1] for name in found.types}
    weights = {t.name: t for t in tiny.header.tensors}
    experts = next(share for share in found.shares if share.role == "ffn_up_exps")
    assert experts.nbytes == sum(
        weights[name].elements * kinds.bits(kind) / 8
        for name, kind in found.types.items()
        if "ffn_up_exps" in name
    )


@pytest.mark.parametrize("kind", kinds.WRITTEN)
def test_every_type_has_a_file_type(tiny: Model, kind: str, tmp_path: Path) -> None:
    """What the file will say it is, is a mixture that there is; the recipe can be saved and read again."""
    least = tiny.minimum((kind,))
    found = tiny.solve(least, (kind,))
    assert found.recipe.file_type in FILE_TYPES.values()
    saved = tmp_path / "r.toml"
    saved.write_text(found.recipe.toml(), "utf-8")
    assert load_recipe(str(saved)) == found.recipe


def test_what_is_written_is_what_was_said(tiny_gguf: Path, tmp_path: Path) -> None:
    """Measured and written: size and types are the promised ones; the saved recipe makes the same file."""
    output = Output(tmp_path / "b.gguf")
    request = QuantizeRequest(tiny_gguf, output, budget=5_000_000, candidates=("Q3_K", "Q4_K", "Q8_0"))
    *measuring, choice = choose(request)
    assert isinstance(choice, Choice)
    assert choice.solved is not None
    assert choice.solved.measured
    names = [t.name for t in read_header(tiny_gguf).tensors if t.name in choice.types]
    assert measuring == [Measuring(i, len(names), name) for i, name in enumerate(names)]
    *_, made = Quantization(choice.source, choice.types, output, choice.file_type).run()
    assert isinstance(made, Converted)
    assert choice.solved.total_bytes == output.path.stat().st_size <= 5_000_000
    after = {tensor.name: tensor.type for tensor in read_header(output.path).tensors}
    assert {name: after[name] for name in choice.types} == choice.types

    saved = tmp_path / "saved.toml"
    saved.write_text(choice.solved.recipe.toml(), "utf-8")
    again = QuantizeRequest(tiny_gguf, Output(tmp_path / "r.gguf"), recipe=str(saved))
    *_, by_recipe = choose(again)
    assert isinstance(by_recipe, Choice)
    list(Quantization(by_recipe.source, by_recipe.types, again.output, by_recipe.file_type).run())
    assert (tmp_path / "r.gguf").read_bytes() == output.path.read_bytes()


def test_names_that_begin_otherwise(tmp_path: Path) -> None:
    """Encoder and decoder of T5 are told apart, and a rule for some layers names these."""
    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5")
    names = [f"{side}.blk.{i}.attn_q.weight" for side in ("enc", "dec") for i in range(12)]
    for name in names:
        writer.add_tensor(name, np.ones((64, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Model(tmp_path / "t5.gguf", names)
    matters = Importance({}, (), 512, 4, {"enc.blk.1.attn_q.weight": 50.0, "dec.blk.11.attn_q.weight": 50.0})
    found = model.solve(model.minimum(("Q4_K",)) + 9_000, ("Q4_K", "Q6_K"), importance=matters)
    assert [name for name, kind in found.types.items() if kind != "Q4_K"] == list(matters.sensitivities)
    assert found.recipe.types(model.header.tensors, names) == found.types


def test_minimax_m3_in_138_gb(m3_path: Path, tmp_path: Path) -> None:
    """426 billion weights that are not there yet: the budget is used up, and the experts pay for it."""
    budget = 138_000_000_000
    output = Output(tmp_path / "m.gguf")
    *_, choice = choose(QuantizeRequest(m3_path, output, budget=budget, assume_importance=True))
    assert isinstance(choice, Choice)
    solved = choice.solved
    assert solved is not None
    assert not solved.measured
    planned = Quantization(choice.source, choice.types, output, choice.file_type).planned
    assert planned.total_bytes == solved.total_bytes
    assert budget * 0.995 < solved.total_bytes <= budget
    assert solved.cost <= solved.bound * 1.01
    bits: dict[str, list[float]] = {}
    for name, kind in choice.types.items():
        bits.setdefault(role_of(name)[1], []).append(kinds.bits(kind))
    experts = [b for each, values in bits.items() if each.endswith("_exps") for b in values]
    others = [b for each, values in bits.items() if not each.endswith("_exps") for b in values]
    assert len(experts) == 3 * 57
    assert max(experts) < 3.5
    assert min(others) > 4
    header = read_header(m3_path)
    ruled = solved.recipe.types(header.tensors, set(choice.types))
    assert {name: ruled[name] for name in choice.types} == choice.types


def test_a_tensor_stays_where_nothing_is_gained(m3_path: Path) -> None:
    """With room for everything, BF16 weights stay BF16: F16 has the same size and loses something."""
    model = Model(m3_path)
    assert set(model.solve(LARGE).types.values()) == {"BF16"}
