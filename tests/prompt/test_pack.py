"""Packing: budgets hold to the token, nothing is lost without a record."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3cli.corpus.chunks import chunk_document
from m3cli.corpus.types import Chunk, Document
from m3cli.errors import DoesNotFitError, UsageError
from m3cli.model.catalog import demo_model
from m3cli.model.header import read_header
from m3cli.model.tokenizer import load_tokenizer
from m3cli.model.tokens import ByteTokenizer, Tokenizer
from m3cli.prompt.export import FORMATS
from m3cli.prompt.layout import PromptLayout, number_lines, numbered
from m3cli.prompt.pack import pack_chunks, split_chunks
from m3cli.prompt.template import Template, pack_template
from m3cli.prompt.tree import compact_tree

LAYOUTS = {"prompt": PromptLayout(), **FORMATS}
# What a file would have to say to break out of each form.
HOSTILE = [
    "</file>\n",
    '<file path="x">\n',
    "]]>",
    "]]",
    ">",
    "]>",
    "]]>]]>",
    "</document></documents>",
    "```\n",
    "````\n",
    "`````python\n",
    '"}\n]}',
    "\\",
    '"',
    "==> a.py:1 (3 lines follow) <==\n",
    "\x00\x0b\x1b",
    "\r\n",
    "\n",
    "é漢🙂",
]
TEXTS = (
    st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20)), min_size=1, max_size=30)
    .map("".join)
    .filter(bool)
)
DOCUMENTS = st.dictionaries(
    st.sampled_from(["a.py", "b/c.py", "b/d e.md", 'q"<&>.txt', "`tick`.md"]), TEXTS, min_size=1
)


def count(texts: list[str]) -> list[int]:
    return [len(ids) for ids in ByteTokenizer().encode_batch(texts)]


def chunks_of(documents: dict[str, str], target: int = 16) -> list[Chunk]:
    return [
        chunk
        for path, text in sorted(documents.items())
        for chunk in chunk_document(Document(path, text, "utf-8"), target)
    ]


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(1, 3000), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(["", "é logic"]))
def test_a_budget_is_never_exceeded(
    documents: dict[str, str], budget: int, layout: str, question: str
) -> None:
    """In every layout the packed text takes at most the budget, and the stated count is the true one."""
    chunks = chunks_of(documents)
    try:
        pack = pack_chunks(chunks, count, budget=budget, question=question, layout=LAYOUTS[layout])
    except DoesNotFitError:
        assert budget < 2000
        return
    assert pack.tokens == len("".join(pack.parts).encode()) <= budget


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    tokenizer = load_tokenizer(read_header(demo_model().path))
    assert tokenizer is not None
    return tokenizer


TEMPLATES = [
    "{% for file in files %}<{{ file.path|xml }}>{{ file.text }}\n{% endfor %}{{ tree }}",
    "{{ omitted }}{% for file in files %}{{ file.text }}{{ file.text }}{% endfor %}",
    "{{ query }}: {{ files|map(attribute='text')|join|tojson }}",
]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    DOCUMENTS,
    st.integers(1, 1500),
    st.sampled_from([*sorted(LAYOUTS), *TEMPLATES]),
    st.sampled_from(["", "é logic"]),
    st.booleans(),
)
def test_a_budget_holds_for_the_text_as_a_whole(
    smollm2: Tokenizer, documents: dict[str, str], budget: int, form: str, question: str, lines: bool
) -> None:
    """Counted by a real model's tokenizer, as one text, a pack has no more tokens than were allowed."""
    chunks = chunks_of(documents)
    chunks = list(numbered(chunks)) if lines else chunks
    try:
        if form in LAYOUTS:
            pack = pack_chunks(
                chunks, smollm2.count_batch, budget=budget, question=question, layout=LAYOUTS[form]
            )
        else:
            pack = pack_template(
                Template(form, "t"), chunks, smollm2.count_batch, budget=budget, question=question
            )
    except DoesNotFitError:
        assert budget < 1000
        return
    assert pack.tokens <= budget
    assert len(smollm2.encode("".join(pack.parts))) <= budget


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(60, 3000), st.sampled_from(sorted(FORMATS)))
def test_parts_hold_everything_and_keep_their_limit(
    documents: dict[str, str], limit: int, layout: str
) -> None:
    """Split packs together are the corpus in its order, and none is larger than was asked for."""
    chunks = chunks_of(documents)
    try:
        packs = split_chunks(chunks, count, limit=limit, layout=FORMATS[layout])
    except DoesNotFitError:
        assert limit < 600
        return
    assert [chunk for pack in packs for chunk in pack.chunks] == chunks
    for pack in packs:
        assert pack.tokens == len("".join(pack.parts).encode()) <= limit
        if layout == "json":
            json.loads("".join(pack.parts))
    if len(packs) > 1:
        whole = pack_chunks(chunks, count, layout=FORMATS[layout])
        assert whole.tokens > limit


def test_a_document_that_fits_is_not_torn_by_a_split() -> None:
    """What does not fit into the rest of a part begins the next one; only what is larger is cut."""
    documents = {"a.py": "a = 1\n" * 20, "b.py": "b = 2\n" * 20, "c.py": "c = 3\n" * 200}
    packs = split_chunks(chunks_of(documents), count, limit=300, layout=FORMATS["plain"])
    assert [pack.paths for pack in packs[:3]] == [["a.py"], ["b.py", "c.py"], ["c.py"]]
    assert {span.path for pack in packs for span in pack.spans if span.whole} == {"a.py", "b.py"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for %}", "line 1"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ files[0].__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_fails_says_why(source: str, words: str) -> None:
    """A syntax error names the line; the sandbox lets nothing out."""
    with pytest.raises(UsageError, match=words):
        pack_template(Template(source, "my.j2"), chunks_of({"a.py": "x"}), count)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(1, 3000))
def test_every_chunk_is_in_or_recorded_as_left_out(documents: dict[str, str], budget: int) -> None:
    """Packed and omitted chunks together are the corpus, both in corpus order."""
    chunks = chunks_of(documents)
    try:
        pack = pack_chunks(chunks, count, budget=budget, question="logic")
    except DoesNotFitError:
        return
    order = {id(chunk): i for i, chunk in enumerate(chunks)}
    packed, omitted = [order[id(c)] for c in pack.chunks], [order[id(c)] for c in pack.omitted]
    assert packed == sorted(packed)
    assert omitted == sorted(omitted)
    assert sorted(packed + omitted) == list(range(len(chunks)))


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_json_gives_the_texts_back(documents: dict[str, str]) -> None:
    """The JSON form parses, and holds every text exactly."""
    parsed = json.loads("".join(pack_chunks(chunks_of(documents), count, layout=FORMATS["json"]).parts))
    assert {file["path"]: file["text"] for file in parsed["files"]} == documents


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_xml_is_well_formed_and_verbatim(documents: dict[str, str]) -> None:
    """The XML form parses whatever a file says, and gives its text back but for what XML cannot hold."""
    root = ElementTree.fromstring(
        "".join(pack_chunks(chunks_of(documents), count, layout=FORMATS["xml"]).parts)
    )
    found = {d.get("path"): d.text for d in root}
    for path, text in documents.items():
        legal = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
        assert found[path] == "\n" + re.sub("\r\n?", "\n", legal)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_markdown_fences_hold(documents: dict[str, str]) -> None:
    """No line of a file can close the fence around it."""
    packed = "".join(pack_chunks(chunks_of(documents), count, layout=FORMATS["markdown"]).parts)
    found = []
    lines = iter(packed.split("\n"))
    for line in lines:
        if fence := re.match("(`{3,})", line):
            body = []
            for inside in lines:
                if inside == fence[1]:
                    break
                body.append(inside)
            found.append("\n".join(body) + "\n")
    assert found == [t if t.endswith("\n") else t + "\n" for _, t in sorted(documents.items())]


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_plain_headers_count_their_lines(documents: dict[str, str]) -> None:
    """A reader who trusts the first header's count finds every file, whatever the files say."""
    rest = "".join(pack_chunks(chunks_of(documents), count, layout=FORMATS["plain"]).parts)
    found = {}
    while rest:
        header, _, rest = rest.lstrip("\n").partition("\n") if not found else rest[1:].partition("\n")
        match = re.fullmatch(r"==> (.*):1 \((\d+) lines follow\) <==", header)
        assert match
        body = re.match(rf"(?:[^\n]*\n){{{match[2]}}}", rest)
        assert body
        found[match[1]] = body[0]
        rest = rest[body.end() :]
    assert found == {p: t if t.endswith("\n") else t + "\n" for p, t in documents.items()}


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS)
def test_no_line_of_a_file_can_be_a_tag_of_the_prompt(documents: dict[str, str]) -> None:
    """In what the model reads, exactly the files that there are open and close, at line starts."""
    packed = "".join(pack_chunks(chunks_of(documents), count).parts)
    tags = [line for line in packed.split("\n") if line.startswith("<")]
    assert len(tags) == 2 * len(documents)
    assert tags[1::2] == ["</file>"] * len(documents)
    assert all(re.match(r"\d+: ", line) for line in packed.split("\n")[:-1] if not line.startswith("<"))


def test_lines_are_numbered_as_editors_number_them() -> None:
    """Only a newline ends a line; a form feed or a lone carriage return does not."""
    assert number_lines(Chunk("a", 9, 11, "a\x0cb\n\nc\rd")) == "9: a\x0cb\n10: \n11: c\rd\n"
    gap = Chunk("a", 9, 30, "def f():\n⋮\nx = 1\n", (9, 0, 30))
    assert number_lines(gap) == "9: def f():\n⋮\n30: x = 1\n"


def test_what_matches_the_question_is_kept() -> None:
    """Over the budget, the relevant excerpt is packed, under a tree that names every file."""
    documents = {f"m{i}.py": f"def unrelated_{i}():\n    return {i}\n" * 8 for i in range(30)}
    documents["net/retry.py"] = "def retry(call):\n    return call()\n"
    pack = pack_chunks(chunks_of(documents, 64), count, budget=4000, question="where is the retry logic?")
    assert pack.strategy == "select"
    assert "net/retry.py" in pack.paths
    assert "".join(pack.parts).startswith("<tree>\n")
    assert pack.tokens_needed > 4000
    assert {c.path for c in pack.chunks} | {c.path for c in pack.omitted} == set(documents)


def test_without_a_question_every_file_is_begun_before_any_is_finished() -> None:
    """A selection without a question takes the first chunks of the files first."""
    documents = {name: "".join(f"line {i}\n" for i in range(100)) for name in ("a.txt", "b.txt", "c.txt")}
    pack = pack_chunks(chunks_of(documents), count, budget=1000)
    assert pack.paths == ["a.txt", "b.txt", "c.txt"]
    assert all(chunk.start_line < 30 for chunk in pack.chunks)


def test_whole_that_does_not_fit_says_the_numbers() -> None:
    """`whole` over the budget is an error that states both sizes."""
    chunks = chunks_of({"a.py": "x = 1\n" * 100})
    needed = pack_chunks(chunks, count).tokens
    with pytest.raises(DoesNotFitError, match=rf"takes {needed:,} tokens, and there is room for 500\."):
        pack_chunks(chunks, count, budget=500, strategy="whole")


def test_select_of_a_corpus_that_fits_takes_all_of_it() -> None:
    """Asking for a selection with room for everything leaves nothing out."""
    pack = pack_chunks(
        chunks_of({"a.py": "x = 1\n" * 50}), count, budget=10_000, strategy="select", question="x"
    )
    assert pack.omitted == ()


def test_the_tree_is_as_deep_as_fits() -> None:
    """Where the full tree is too long, deep directories become counts; where nothing fits, it is empty."""
    paths = ["README.md", "src/a.py", "src/net/b.py", "src/net/c.py", "tests/t.py"]
    assert compact_tree(paths, lambda _: True).splitlines() == [
        "README.md",
        "src/",
        " a.py",
        " net/",
        "  b.py",
        "  c.py",
        "tests/",
        " t.py",
    ]
    assert compact_tree(paths, lambda text: len(text.splitlines()) <= 6).splitlines() == [
        "README.md",
        "src/",
        " a.py",
        " net/ (2 files)",
        "tests/",
        " t.py",
    ]
    assert compact_tree(paths, lambda text: len(text.splitlines()) <= 3).splitlines() == [
        "README.md",
        "src/ (3 files)",
        "tests/ (1 file)",
    ]
    assert compact_tree(paths, lambda _: False) == ""


def test_a_name_in_the_tree_is_no_tag() -> None:
    """A file whose name spells a tag or a fence does not open one in the tree."""
    documents = {'<file path="a.py">': "x\n", "```": "y\n", "big.txt": "z\n" * 500}
    for name, layout in (("prompt", LAYOUTS["prompt"]), ("markdown", LAYOUTS["markdown"])):
        pack = pack_chunks(chunks_of(documents), count, budget=1500, strategy="select", layout=layout)
        packed = "".join(pack.parts)
        if name == "prompt":
            tree = packed[: packed.index("</tree>\n")]
            assert "&lt;file path=" in tree
            assert not re.search(r"^ *<file", tree, re.MULTILINE)
        else:
            assert packed.startswith("## Files\n\n````\n")


def test_very_deep_trees_are_shown_as_far_as_people_look() -> None:
    """A tree of a thousand levels is cut, not an error."""
    assert compact_tree(["a/" * 1500 + "x"], lambda _: True).count("\n") == 65


def test_an_excerpt_that_fits_without_the_tree_is_taken() -> None:
    """When tree and excerpt do not fit together, the excerpt wins; the error names its full price."""
    documents = {f"directory{i}/file{i}.py": "value = 1\n" * 20 for i in range(12)}
    chunks = chunks_of(documents, 64)
    with pytest.raises(DoesNotFitError) as caught:
        pack_chunks(chunks, count, budget=1, question="value")
    smallest = int(re.search(r"takes ([\d,]+)", caught.value.message)[1].replace(",", ""))
    assert pack_chunks(chunks, count, budget=smallest, question="value").tokens <= smallest
    with pytest.raises(DoesNotFitError):
        pack_chunks(chunks, count, budget=smallest - 1, question="value")
