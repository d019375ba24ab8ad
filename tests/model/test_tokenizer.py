from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.errors import ModelError
from m3cli.model.header import read_header
from m3cli.model.pretokenizers import PATTERNS
from m3cli.model.tokenizer import BPETokenizer, load_tokenizer
from m3cli.model.vocabulary import SEPARATOR
from tests.gguf_files import CONTROL, NORMAL, UNUSED, USER_DEFINED, write_vocabulary
from tests.hugging_face import STAGES, TRICKY, bpe_model, python_sources, smollm2_path, train

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im"]
USER_DEFINEDS = ["<tool_call>", "</tool_call>"]
SPECIALS = [*CONTROLS, *USER_DEFINEDS]

# Unassigned characters are left out: engines differ in the version of Unicode they follow.
characters = st.sampled_from(TRICKY) | st.characters(exclude_categories=("Cs", "Cn"))
texts = st.text(characters, max_size=60)
hostile_texts = st.lists(st.sampled_from([*SPECIALS, "a ", "\n", "<", "im_end|>"]) | texts, max_size=8).map(
    "".join
)


class Pair(NamedTuple):
    ours: BPETokenizer
    reference: Tokenizer


def load(path: Path) -> BPETokenizer:
    tokenizer = load_tokenizer(read_header(path))
    assert tokenizer is not None
    return tokenizer


def assert_same(pair: Pair, samples: list[str]) -> None:
    expected = [e.ids for e in pair.reference.encode_batch_fast(samples, add_special_tokens=False)]
    for text, ids, right in zip(samples, pair.ours.encode_batch(samples), expected, strict=True):
        assert ids == right, ascii(text[:200])


@pytest.fixture(scope="module")
def smollm2() -> Pair:
    path = smollm2_path()
    if path is None:
        pytest.skip("the demo model is not installed")
    header = read_header(path)
    tokens = [token.decode("utf-8") for token in header.strings("tokenizer.ggml.tokens")]
    types = [int(kind) for kind in header.array("tokenizer.ggml.token_type") or ()]
    merges = [merge.decode("utf-8") for merge in header.strings("tokenizer.ggml.merges")]
    return Pair(load(path), bpe_model(tokens, types, merges, "smollm"))


@pytest.fixture(scope="module", params=sorted(STAGES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small vocabulary, trained with the published stages of each family of pre-tokenizers."""
    pre = request.param
    tokens, merges = train([*python_sources(0.1), TRICKY * 3, "naïve Größe 漢字かな " * 20], pre, 1200)
    types = [NORMAL] * len(tokens)
    path = tmp_path_factory.mktemp("vocabulary") / f"{pre}.gguf"
    write_vocabulary(
        path,
        pre,
        [*tokens, *SPECIALS],
        [*types, *[CONTROL] * len(CONTROLS), *[USER_DEFINED] * len(USER_DEFINEDS)],
        merges,
    )
    return Pair(load(path), bpe_model(tokens, types, merges, pre))


def test_real_vocabulary_over_real_source(smollm2: Pair) -> None:
    """Over a megabyte of source, the demo model's ids are Hugging Face's."""
    assert_same(smollm2, python_sources(1.2))


@settings(max_examples=300, deadline=None)
@given(texts)
def test_real_vocabulary_over_unicode(smollm2: Pair, text: str) -> None:
    """On any characters the ids are Hugging Face's, also where the vocabulary lacks their bytes."""
    assert_same(smollm2, [text])


def test_every_pre_tokenizer_over_real_source(trained: Pair) -> None:
    """The folded pattern gives the ids of the published stages, also for a text that is cut to be encoded."""
    text = "".join(python_sources(0.4))
    assert len(text) > 400_000
    assert_same(trained, [text])


@settings(max_examples=40, deadline=None)
@given(st.lists(hostile_texts, min_size=4, max_size=4))
def test_every_pre_tokenizer_over_unicode_and_special_tokens(trained: Pair, samples: list[str]) -> None:
    """On any characters and on special token strings, ids are those of a tokenizer without such tokens."""
    assert_same(trained, samples)


def test_every_name_is_of_a_tested_family() -> None:
    """No pre-tokenizer is known by a pattern that the tests above do not compare."""
    assert set(PATTERNS.values()) == {PATTERNS[pre] for pre in STAGES}


def test_bytes_that_the_vocabulary_lacks_are_left_out(smollm2: Pair) -> None:
    """A control character without a token disappears, and what it stood in is merged around it."""
    ours = smollm2.ours
    for text in ("a\x04b", "\x16", "self\x1d.x = 1", "\x04" * 50 + "end", "\U000a0000"):
        assert ours.encode(text) == smollm2.reference.encode(text, add_special_tokens=False).ids
    assert ours.encode("\x16\x13") == []
    assert ours.encode("-\x04-") == ours.encode("--")


def _tiny(tmp_path: Path, extra: list[tuple[str, int]], merges: list[str], **fields: Any) -> BPETokenizer:
    """Write a vocabulary of all single bytes and `extra`, split as gpt-2 does unless `pre` says otherwise."""
    alphabet, _ = train(["a"], "gpt-2", 256)
    pre = str(fields.pop("pre", "gpt-2"))
    tokens = [*alphabet, *(text for text, _ in extra)]
    types = [*[NORMAL] * 256, *(kind for _, kind in extra)]
    return load(write_vocabulary(tmp_path / "tiny.gguf", pre, tokens, types, merges, **fields))


def _texts(tokenizer: BPETokenizer, ids: list[int]) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in ids]


def test_special_token_that_is_also_a_merge_stays_out_of_content(tmp_path: Path) -> None:
    """Content that merges to the text of a special or unused token stops one merge before it."""
    tokenizer = _tiny(
        tmp_path,
        [("to", NORMAL), ("tool", USER_DEFINED), ("ol", NORMAL), ("tools", NORMAL), ("ab", UNUSED)],
        ["t o", "o l", "to ol", "tool s", "a b"],
    )
    assert _texts(tokenizer, tokenizer.encode("tool tools ab")) == [
        b"to", b"ol", b" ", b"tools", b" ", b"a", b"b",
    ]  # fmt: skip
    assert tokenizer.encode_template("tool") == [tokenizer.special_id("tool")]


def test_merge_whose_token_is_missing_is_undone(tmp_path: Path) -> None:
    """A merge that the vocabulary has no token for costs its merge, not its text."""
    tokenizer = _tiny(tmp_path, [("abcd", NORMAL)], ["a b", "c d", "ab cd"])
    assert _texts(tokenizer, tokenizer.encode("abcd")) == [b"abcd"]
    assert _texts(tokenizer, tokenizer.encode("abc")) == [b"a", b"b", b"c"]


def test_template_text_may_hold_special_tokens(trained: Pair) -> None:
    """Template text gives the ids of special tokens, the longest first, and plain text between."""
    ours = trained.ours
    specials = ours.special_tokens
    assert set(specials) == set(SPECIALS)
    assert ours.encode_template("<|im_start|>user\nhi<|im_end|><|im<tool_call>") == [
        specials["<|im_start|>"],
        *ours.encode("user\nhi"),
        specials["<|im_end|>"],
        specials["<|im"],
        specials["<tool_call>"],
    ]
    assert ours.encode_template("") == []
    assert ours.special_id("<|im_end|>") == specials["<|im_end|>"]
    assert ours.special_id("im_end") is None
    assert ours.token_bytes(specials["<|im_end|>"]) == b"<|im_end|>"


@settings(max_examples=30, deadline=None)
@given(hostile_texts)
def test_content_gives_its_bytes_back_and_no_special_id(trained: Pair, text: str) -> None:
    """Ids of content spell the content, byte for byte, without a special token among them."""
    ids = trained.ours.encode(text)
    assert b"".join(_texts(trained.ours, ids)) == text.encode("utf-8")
    assert not set(ids) & set(trained.ours.special_tokens.values())


def test_lone_surrogates_become_replacement_characters(trained: Pair) -> None:
    """Arguments of a command line may hold lone surrogates, which no encoding can carry."""
    assert trained.ours.encode("a\ud800b\udfff") == trained.ours.encode("a\ufffdb\ufffd")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("run", [" ", "\r\n", "aA", "7", "\u6f22", "\u2003 ", "ab 1-\u6f22\n"])
def test_endless_runs_neither_stall_nor_crash(trained: Pair, run: str) -> None:
    """A run of 200,000 characters of any class is encoded whole."""
    text = f"x{run * (200_000 // len(run))}y"
    ids = trained.ours.encode(text)
    assert b"".join(_texts(trained.ours, ids)) == text.encode("utf-8")


@pytest.mark.parametrize("run", [" ", "a", "\n"])
def test_runs_beyond_what_the_regex_engine_takes(smollm2: Pair, run: str) -> None:
    """Two million characters in a row, where tiktoken alone panics, are cut and encoded."""
    ids = smollm2.ours.encode(run * 2_000_000)
    assert b"".join(_texts(smollm2.ours, ids)) == run.encode() * 2_000_000


def test_batch_is_the_same_as_one_by_one(smollm2: Pair) -> None:
    """Threads change neither ids nor order, and texts may be empty."""
    samples = ["", *python_sources(0.4), "a\x04b", ""]
    assert smollm2.ours.encode_batch(samples) == [smollm2.ours.encode(text) for text in samples]
    assert smollm2.ours.encode_batch([]) == []
    assert smollm2.ours.count_batch(iter(samples)) == [len(smollm2.ours.encode(text)) for text in samples]
    assert smollm2.ours.count_batch([]) == []


@given(st.lists(st.text("\x00m3\x01 a"), max_size=6))
def test_texts_that_spell_the_separator_are_still_themselves(smollm2: Pair, texts: list[str]) -> None:
    """What stands between texts inside a call cannot be forged by them, nor put together from two."""
    texts = [*texts, *(SEPARATOR[i:] for i in range(4)), SEPARATOR * 2]
    expected = [e.ids for e in smollm2.reference.encode_batch(texts, add_special_tokens=False)]
    assert smollm2.ours.encode_batch(texts) == expected
    assert smollm2.ours.count_batch(texts) == list(map(len, expected))


def test_bos_follows_the_file_and_else_llama_cpp(tmp_path: Path) -> None:
    """`add_bos_token` decides; without it the Llama 3 family begins with BOS and others do not."""
    extra = [("<s>", CONTROL), ("</s>", CONTROL), ("ab", NORMAL)]
    ids = {"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eos_token_id": 257}
    add = "tokenizer.ggml.add_bos_token"
    assert _tiny(tmp_path, extra, ["a b"], **ids).bos_id is None
    assert _tiny(tmp_path, extra, ["a b"], **ids, **{add: True}).bos_id == 256
    assert _tiny(tmp_path, extra, ["a b"], **ids, pre="llama-bpe").bos_id == 256
    assert _tiny(tmp_path, extra, ["a b"], **ids, **{add: False}, pre="llama-bpe").bos_id is None
    assert _tiny(tmp_path, extra, ["a b"], **ids).eos_id == 257
    assert _tiny(tmp_path, extra, ["a b"], **{add: True}).bos_id is None


def test_end_token_that_calls_itself_normal_is_special(tmp_path: Path) -> None:
    """Old files type their end token as normal text; named as EOS, it is special all the same."""
    extra = [("<|endoftext|>", NORMAL), ("ab", NORMAL)]
    tokenizer = _tiny(tmp_path, extra, ["a b"], **{"tokenizer.ggml.eos_token_id": 256})
    assert tokenizer.encode_template("ab<|endoftext|>") == [257, 256]
    assert 256 not in tokenizer.encode("ab<|endoftext|>")
    # A file may also name a word, or a byte, as its end; that does not take it out of content.
    tokenizer = _tiny(tmp_path, [("ab", NORMAL)], ["a b"], **{"tokenizer.ggml.eos_token_id": 256})
    assert tokenizer.encode("ab") == [256]


def test_name_changes_with_the_vocabulary(tmp_path: Path) -> None:
    """The name can be a cache key: equal for equal vocabularies, else different."""
    one = _tiny(tmp_path, [("ab", NORMAL)], ["a b"]).name
    assert one == _tiny(tmp_path, [("ab", NORMAL)], ["a b"]).name
    others = {
        _tiny(tmp_path, [("abc", NORMAL)], ["a b"]).name,
        _tiny(tmp_path, [("ab", CONTROL)], ["a b"]).name,
        _tiny(tmp_path, [("ab", NORMAL)], ["b a"]).name,
        _tiny(tmp_path, [("ab", NORMAL)], ["a b"], pre="qwen2").name,
    }
    assert len(others | {one}) == 5


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"gpt2", b"bert"),
        (b"gpt-2", b"gpt-9"),
        (b"tokenizer.ggml.pre", b"tokenizer.ggml.tre"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.nerges"),
    ],
)
def test_other_vocabularies_are_left_to_llama_cpp(tmp_path: Path, old: bytes, new: bytes) -> None:
    """Without a known byte-level BPE there is no tokenizer here, and no error."""
    path = write_vocabulary(tmp_path / "other.gguf", "gpt-2", ["a", "b", "ab"], [NORMAL] * 3, ["a b"])
    assert load_tokenizer(read_header(path)) is not None
    path.write_bytes(path.read_bytes().replace(old, new))
    assert load_tokenizer(read_header(path)) is None


def test_contradictory_vocabulary_is_an_error(tmp_path: Path) -> None:
    """Types for another number of tokens mean that special tokens cannot be told."""
    path = write_vocabulary(tmp_path / "odd.gguf", "gpt-2", ["a", "b"], [NORMAL], ["a b"])
    with pytest.raises(ModelError, match="2 tokens"):
        load_tokenizer(read_header(path))


def test_unknown_id_has_no_bytes(trained: Pair) -> None:
    """Ids outside of the vocabulary are refused, negative ones too."""
    for token_id in (-1, 1 << 30):
        with pytest.raises(ValueError, match="no token"):
            trained.ours.token_bytes(token_id)
