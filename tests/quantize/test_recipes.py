"""Recipes: the built-in ones on the real model's tensors, the file format, and what is wrong with a rule."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3cli.errors import UsageError
from m3cli.model.ggml_types import FILE_TYPES
from m3cli.model.header import Header, Tensor, read_header
from m3cli.report.text import size
from quantize import kinds
from quantize.names import mappings
from quantize.recipes import KEEP, Recipe, Rule, built_in, load_recipe
from scripts.make_shape_gguf import MINIMAX_M3, write_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

M3 = [recipe for recipe in built_in() if recipe.name.startswith("m3-")]
UNIFORM = [recipe for recipe in built_in() if recipe.name.startswith("uniform-")]
MEMORY = (96, 110, 128, 160, 192, 256, 320, 384, 512)  # GiB
MATRICES = frozenset(each.name for each in mappings(MINIMAX_M3) if each.role == "matrix")


@pytest.fixture(scope="module")
def m3_header(tmp_path_factory: pytest.TempPathFactory) -> Header:
    """Header of MiniMax-M3 as it is converted: BF16, with what must stay exact in F32."""
    path = tmp_path_factory.mktemp("m3") / "m3.gguf"
    write_shape("minimax-m3", "BF16", path)
    return read_header(path)


def tensor(name: str, kind: str = "BF16", columns: int = 256) -> Tensor:
    return Tensor(name, (columns, 4), kind, 0, 0, columns * 4 * 2)


TENSORS = [
    tensor("token_embd.weight"),
    tensor("blk.0.attn_norm.weight", "F32"),
    *[tensor(f"blk.{i}.{role}.weight") for i in range(2) for role in ("attn_q", "attn_k", "ffn_down")],
    tensor("blk.1.ffn_gate_inp.weight", "F32"),
    tensor("output.weight"),
]
QUANTIZABLE = {each.name for each in TENSORS if each.type == "BF16"}


def recipe(*rules: tuple[str, str]) -> Recipe:
    return Recipe("mine", "", tuple(Rule(*rule) for rule in rules), "Q4_K_M")


def test_names_are_unique_and_found() -> None:
    """Every built-in recipe is found by its name, in any case."""
    names = [each.name for each in built_in()]
    assert len(set(names)) == len(names)
    assert {"uniform-q4_k", "uniform-iq1_s", "m3-iq2", "m3-q2", "m3-q3", "m3-q4", "m3-q5"} <= set(names)
    assert all(load_recipe(each.name.upper()) == each for each in built_in())
    with pytest.raises(UsageError, match=r"no recipe m3_q3\. Did you mean m3-q3\?.*uniform-q8_0"):
        load_recipe("m3_q3")


@pytest.mark.parametrize("chosen", built_in(), ids=lambda each: each.name)
def test_a_recipe_is_written_as_it_is_read(chosen: Recipe, tmp_path: Path) -> None:
    """The file that is printed is read as the same recipe; those that m3 brings are such files."""
    path = tmp_path / "mine.toml"
    path.write_text(chosen.toml(), "utf-8")
    assert load_recipe(str(path)) == chosen
    if chosen in M3:
        brought = Path(__file__).parents[2] / "quantize" / "recipes" / f"{chosen.name}.toml"
        assert brought.read_text("utf-8") == chosen.toml()


@pytest.mark.parametrize("chosen", M3, ids=lambda each: each.name)
def test_a_recipe_for_m3_is_as_described(chosen: Recipe, m3_header: Header) -> None:
    """Size, memory and the need of an importance matrix are facts of the real model's tensors."""
    fit = chosen.fit(m3_header, MATRICES)
    memory = next(each for each in MEMORY if fit.nbytes <= 0.92 * each * 2**30)
    types = chosen.types(m3_header.tensors, MATRICES)
    needs = any(kinds.needs_importance(kind, name) for name, kind in types.items())
    bits = f"{fit.bits_per_weight:.2f} bits a weight"
    end = "; needs an importance matrix." if needs else "."
    assert chosen.description == f"MiniMax-M3 in {size(fit.nbytes)}, {bits}, for {memory} GiB of memory{end}"


@pytest.mark.parametrize("chosen", M3, ids=lambda each: each.name)
def test_a_recipe_for_m3_spares_what_matters(chosen: Recipe, m3_header: Header) -> None:
    """Routed experts are low, their down projections a step above; the rest is high or exact."""
    types = chosen.types(m3_header.tensors, MATRICES)
    assert list(types) == [each.name for each in m3_header.tensors]

    def lowest(pattern: str) -> float:
        return min(kinds.bits(kind) for name, kind in types.items() if re.search(pattern, name))

    gate_up = {types[name] for name in types if re.search(r"ffn_(gate|up)_exps", name)}
    down = {types[name] for name in types if "ffn_down_exps" in name}
    assert len(gate_up) == len(down) == 1
    low, high = (kinds.bits(kind) for kind in (*gate_up, *down))
    assert low < high <= lowest(r"(attn_(q|k|v|output)|_shexp|ffn_(gate|up|down))\.weight")
    assert lowest(r"attn_(q|k|v|output)\.") >= kinds.bits("Q5_K")
    assert lowest(r"_shexp|ffn_(gate|up|down)\.|^output\.") >= kinds.bits("Q6_K")
    assert lowest(r"^token_embd") >= kinds.bits("Q4_K")
    exact = {
        name: kind for name, kind in types.items() if re.search(r"indexer|_norm\.|gate_inp|probs_b", name)
    }
    assert len(exact) == 60 * 4 + 57 * 4 + 57 * 2 + 1
    assert set(exact.values()) == {"F32"}


def test_facts_that_reasons_name(m3_header: Header) -> None:
    """Shares of the weights that stand in the M3 recipes."""
    total = sum(each.elements for each in m3_header.tensors)
    experts = sum(each.elements for each in m3_header.tensors if "_exps." in each.name)
    attention = sum(each.elements for each in m3_header.tensors if re.search(r"attn_(q|k|v|out)", each.name))
    assert (round(100 * experts / total), round(100 * attention / total, 1)) == (97, 1.5)
    assert m3_header.get_int("minimax-m3.expert_used_count") == 4
    assert m3_header.get_int("minimax-m3.expert_count") == 128
    assert m3_header.get_int("minimax-m3.leading_dense_block_count") == 3


def test_the_steps_of_the_m3_recipes(m3_header: Header) -> None:
    """They stand by rising size, and there is one for each memory that people have."""
    sizes = [each.fit(m3_header, MATRICES).nbytes for each in M3]
    assert sizes == sorted(sizes)
    described = " ".join(each.description for each in M3)
    assert all(f"for {memory} GiB" in described for memory in MEMORY)


@pytest.mark.parametrize("chosen", UNIFORM, ids=lambda each: each.name)
def test_a_uniform_recipe_is_uniform_and_can_be_made(chosen: Recipe, m3_header: Header) -> None:
    """All matrices get one type, but where ggml would abort for want of an importance matrix."""
    types = chosen.types(m3_header.tensors, MATRICES)
    kind = chosen.name.removeprefix("uniform-").upper()
    matrices = {types[name] for name in MATRICES - {"token_embd.weight", "output.weight"}}
    ends = {types["token_embd.weight"], types["output.weight"]}
    assert matrices == {kind}
    assert ends == ({"Q4_K"} if kind in ("IQ1_S", "IQ2_XXS", "IQ2_XS") else {kind})
    assert {types[each.name] for each in m3_header.tensors if each.name not in MATRICES} == {"F32"}
    assert ("needs an importance matrix" in chosen.description) == kinds.needs_importance(kind, "")
    assert f"{kinds.bits(kind):g} bits" in chosen.description


def test_llama_cpp_agrees_on_what_is_quantizable(m3_header: Header) -> None:
    """The tensors that these tests call quantizable are those that llama.cpp's quantizer changes."""
    from quantize.native import Native

    with Native() as native:
        assert native.quantizable(m3_header) == MATRICES


def test_the_first_rule_decides() -> None:
    """Rules are tried in order; what is not quantizable keeps its type; keep keeps that of the source."""
    chosen = recipe(("blk.1.*down", "Q8_0"), ("attn_k", KEEP), ("^output", "F16"), (".", "Q4_K"))
    types = chosen.types(TENSORS, QUANTIZABLE)
    assert types == {
        "token_embd.weight": "Q4_K",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.attn_q.weight": "Q4_K",
        "blk.0.attn_k.weight": "BF16",
        "blk.0.ffn_down.weight": "Q4_K",
        "blk.1.attn_q.weight": "Q4_K",
        "blk.1.attn_k.weight": "BF16",
        "blk.1.ffn_down.weight": "Q8_0",
        "blk.1.ffn_gate_inp.weight": "F32",
        "output.weight": "F16",
    }


def test_rows_that_no_block_divides() -> None:
    """A tensor gets what llama.cpp takes in the place of a type that its rows do not allow."""
    tensors = [tensor("a.weight", columns=576), tensor("b.weight", columns=80), tensor("c.weight")]
    types = recipe((".*", "Q4_K")).types(tensors, {each.name for each in tensors})
    assert types == {"a.weight": "Q5_0", "b.weight": "F16", "c.weight": "Q4_K"}


@pytest.mark.parametrize("kind", [KEEP, "F32"])
def test_a_rule_for_what_is_never_quantized(kind: str) -> None:
    """It is right where it says what happens anyway."""
    chosen = recipe(("_norm|gate_inp", kind), (".*", "Q4_K"))
    assert chosen.types(TENSORS, QUANTIZABLE)["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("rules", "message", "hint"),
    [
        (
            [("ffn_dwn", "Q4_K"), (".*", "Q4_K")],
            r"Rule 1 \(ffn_dwn\) of recipe mine names no tensor of this model\.",
            r"Correct or remove it; tensors are called blk\.0\.ffn_down\.weight, \w",
        ),
        (
            [("attn_q", "Q4_K")],
            r"No rule of recipe mine names token_embd\.weight and 5 more\.",
            r'the pattern "\.\*" at the end',
        ),
        (
            [("attn_", "Q4_K"), ("attn_q", "Q8_0"), (".*", "Q4_K")],
            r"Rule 2 \(attn_q\) of recipe mine decides about nothing: all tensors that it names",
            r"Move the rule up",
        ),
        (
            [("_norm", "Q8_0"), (".*", "Q4_K")],
            r"Rule 1 \(_norm\) of recipe mine gives blk\.0\.attn_norm\.weight the type Q8_0, but llama\.cpp",
            'type "keep"',
        ),
        (
            [("_norm|gate_inp", "F16"), (".*", "Q4_K")],
            r"gives blk\.0\.attn_norm\.weight and 1 more the type F16, but",
            'type "keep"',
        ),
    ],
)
def test_rules_that_cannot_be_meant(rules: list[tuple[str, str]], message: str, hint: str) -> None:
    """A rule without effect, or a tensor without a rule, is a mistake, and the message says which."""
    with pytest.raises(UsageError) as caught:
        recipe(*rules).types(TENSORS, QUANTIZABLE)
    assert re.search(message, caught.value.message)
    assert re.search(hint, caught.value.hint)


def test_a_model_without_tensors() -> None:
    """There is nothing that a rule could name."""
    with pytest.raises(UsageError, match=r"names no tensor of this model\. Choose a model file"):
        recipe((".*", "Q4_K")).types([], set())


GOOD = 'file_type = "Q4_K_M"\n[[tensors]]\npattern = ".*"\ntype = "q4_k"\n'


def test_a_short_file(tmp_path: Path) -> None:
    """Name, description and reasons may be left out; types may be in lower case, lines end in any way."""
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(str(path)) == Recipe("mine", "", (Rule(".*", "Q4_K"),), "Q4_K_M")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[tensors]]", "[tensors"), r"mine\.toml is not valid TOML"),
        (("[[tensors]]", "[tensors]"), r"has no rules: nothing under \[\[tensors\]\]"),
        (('[[tensors]]\npattern = ".*"\ntype = "q4_k"', "tensors = []"), "has no rules"),
        (('[[tensors]]\npattern = ".*"\ntype = "q4_k"', "tensors = [1]"), "has no rules"),
        (('file_type = "Q4_K_M"', ""), r"lacks the key file_type\. Add .* file_type = \"Q4_K_M\""),
        (("Q4_K_M", "Q4_K_N"), r"mine\.toml has the file_type Q4_K_N, .* Did you mean Q4_K_[SM]\?"),
        (("file_type", "filetype"), r"has the key filetype, which m3 does not know\. Did you mean file_type"),
        (("pattern", "patern"), r"Rule 1 of .* has the key patern, .* Did you mean pattern\?"),
        (('pattern = ".*"', ""), r"Rule 1 of .* lacks the key pattern\. A rule has a pattern, a type and"),
        (('pattern = ".*"', 'pattern = ""'), "Rule 1 of .* lacks the key pattern"),
        (('pattern = ".*"', "pattern = 3"), r"has a pattern that is no string\. Write it as pattern ="),
        (('type = "q4_k"', ""), "lacks the key type"),
        (("q4_k", "Q4_K_M"), r"has the type Q4_K_M, to which m3 does not .* Did you mean Q4_K\?"),
        (("q4_k", "NVFP4"), r"has the type NVFP4, to which m3 does not quantize"),
        (("q4_k", "Q8_K"), r"has the type Q8_K, to which .* IQ1_S, .* F32, keep\."),
        ((".*", "blk(.0"), r"Rule 1 of .* no regular expression: missing \)"),
        ((".*", "*"), "no regular expression: nothing to repeat"),
        ((".*", "a{9999999999999}"), "no regular expression"),
        ((".*", "[[a]"), "no regular expression: .*[Nn]ested set"),
        ((".*", "(?R)"), "no regular expression"),
        ((".*", "a" * 1001), r"a pattern of 1,001 characters; 1,000 are the most"),
        ((".*", "(" * 450 + ")" * 450), "no regular expression"),
        ((".*", "(.+)+x"), "repeats a group, which m3 does not allow"),
        ((".*", "(?:(?:a+)b){30}"), "repeats a group"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    """What is wrong is said with the file, the rule and the key, and what would be right."""
    assert change[0] in GOOD
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert re.search(message, str(caught.value))
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """No file, a directory, a huge file, no text: each is one sentence."""
    with pytest.raises(UsageError, match=r"none\.toml cannot be read: No such file"):
        load_recipe(str(tmp_path / "none.toml"))
    with pytest.raises(UsageError, match="no recipe: not a small regular file"):
        load_recipe(f"{tmp_path}/")
    huge = tmp_path / "huge.toml"
    with huge.open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(UsageError, match="not a small regular file"):
        load_recipe(str(huge))
    huge.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_recipe(str(huge))
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe("a\0b.toml")


@pytest.mark.parametrize("pattern", ["(|.)" * 100 + "[!%]", ".*" * 300 + "[!%]", r"\w?" * 200 + "[!%]"])
def test_patterns_that_would_take_for_ever(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for a pattern ends, with a message, even where the library would try 2^100 ways."""
    monkeypatch.setattr("quantize.recipes._SECONDS", 0.2)
    tensors = [tensor("blk.10.ffn_gate_exps_and_a_long_name.weight")] * 3
    start = time.monotonic()
    with pytest.raises(UsageError, match="takes too long"):
        recipe((pattern, "Q4_K")).types(tensors, {each.name for each in tensors})
    assert time.monotonic() - start < 30


def test_repeated_characters_and_escaped_brackets_are_no_groups(tmp_path: Path) -> None:
    """Only a group that is really repeated is refused."""
    path = tmp_path / "mine.toml"
    for pattern in (r"\)*", r"[)]+", r"[^])]{2}", r"(a|b)?", r"(a)\+", r"blk\.(1|2)\.[a-z_]+", r"\d{2}"):
        path.write_text(GOOD.replace("'", "").replace('".*"', f"'{pattern}'"))
        assert load_recipe(str(path)).rules[0].pattern == pattern


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
PATTERNS = st.sampled_from([".*", r"blk\.(1|2)\.", "it's", "a\tb", '"', "ä\u2028", "\x7f"]) | st.text(
    "abc.\\d'\"_", min_size=1, max_size=20
).filter(lambda text: not text.endswith("\\") and "\\a" not in text)
RULES = st.builds(Rule, PATTERNS, st.sampled_from([*kinds.WRITTEN, KEEP]), TEXT)


@given(
    chosen=st.builds(
        Recipe,
        TEXT.filter(bool),
        TEXT,
        st.lists(RULES, min_size=1, max_size=5).map(tuple),
        st.sampled_from(list(FILE_TYPES.values())),
    )
)
def test_any_recipe_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, chosen: Recipe
) -> None:
    """Quotes, control characters and text in any script survive being written and read."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(chosen.toml().encode())
    try:
        again = load_recipe(str(path))
    except UsageError as error:
        assert "no regular expression" in error.message  # noqa: PT017 - which is another matter
    else:
        assert again == chosen


@given(
    data=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: GOOD.encode() + text.encode("utf-8", "replace"))
)
def test_any_file_is_a_recipe_or_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """No content ends in anything but a recipe or a UsageError with a hint."""
    path = tmp_path_factory.getbasetemp() / "hostile.toml"
    path.write_bytes(data)
    try:
        load_recipe(str(path))
    except UsageError as error:
        assert error.hint  # noqa: PT017 - both ends are allowed


def test_a_recipe_with_a_rule_for_each_tensor_is_quick(m3_header: Header) -> None:
    """What a budget's recipe may look like is done in a moment: 593 rules, 1,100 tensors."""
    names: Sequence[str] = sorted(MATRICES)
    rules = tuple(Rule(f"^{re.escape(name)}$", "Q4_K") for name in names)
    start = time.process_time()
    types = replace(recipe(), rules=rules).types(m3_header.tensors, MATRICES)
    assert time.process_time() - start < 5
    assert {types[name] for name in names} == {"Q4_K"}
