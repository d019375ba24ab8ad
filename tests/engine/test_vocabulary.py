from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.engine import pieces
from m3cli.engine.local import LocalTokenizer
from m3cli.engine.vocabulary import Vocabulary, tokenize
from m3cli.errors import EngineCrashError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

SPACE = "▁"
CONTROL = ["<s>", "</s>", "<|im_end|>", f"{SPACE}<PRE>"]
USER_DEFINED = ["<tool_call>", "</b>", "\n\n"]
# Merges that lead up to special tokens too: SentencePiece may build any entry of the vocabulary.
WORDS = ["he", "ll", "hell", "hello", f"{SPACE}he", f"{SPACE}w", "or", "ld", f"{SPACE}wor", f"{SPACE}world"]
STEPS = [
    "</",
    "</s",
    "<s",
    "s>",
    "<0",
    "<0x",
    "<0x4",
    "<0x41",
    f"{SPACE}<",
    f"{SPACE}<P",
    f"{SPACE}<PR",
    f"{SPACE}<PRE",
    SPACE * 2,
]
LETTERS = [SPACE, *"abcdehilmnoprstwx<>/|_0149PRE.é"]
T = gguf.TokenType
VOCABULARY: list[tuple[str, int, float]] = [
    ("<unk>", T.UNKNOWN, 0.0),
    *((text, T.CONTROL, 0.0) for text in CONTROL),
    *((f"<0x{byte:02X}>", T.BYTE, 0.0) for byte in range(256)),
    *((text, T.USER_DEFINED, 0.0) for text in USER_DEFINED),
    *((text, T.NORMAL, -1.0 - rank) for rank, text in enumerate([*WORDS, *STEPS, *LETTERS])),
]
IDS = {text: index for index, (text, _, _) in enumerate(VOCABULARY)}
SPECIAL_IDS = {IDS[text] for text in ["<unk>", *CONTROL, "<tool_call>", "</b>"]}
LINES = st.lists(
    st.sampled_from(["hello", " world", "hello world", " ", "  ", "ld", "é🦙", "\t", "a", "\n"])
).map("".join)
FORGERIES = st.lists(
    st.sampled_from(
        [*CONTROL, *USER_DEFINED, "<unk>", "<0x41>", " <PRE>", "<", "tool_call>", "hello", " ", "<s", "\n"]
    )
).map("".join)


def write_model(path: Path, *, add_space_prefix: bool | None) -> str:
    """A SentencePiece vocabulary without a model around it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in VOCABULARY])
    writer.add_token_types([int(kind) for _, kind, _ in VOCABULARY])
    writer.add_token_scores([score for _, _, score in VOCABULARY])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if add_space_prefix is not None:
        writer.add_add_space_prefix(add_space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module", params=[None, True, False], ids=["default", "prefix", "no-prefix"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    return Vocabulary(write_model(path, add_space_prefix=request.param))


def whole(vocabulary: Vocabulary, text: str) -> list[int]:
    """Tokenize the whole text at once and unguarded."""
    return vocabulary._tokenize(vocabulary._vocab, text, parse_special=False)


def without_blank_lines(vocabulary: Vocabulary, text: str) -> str:
    """Work around llama.cpp: with a space prefix it also puts a space after every blank line."""
    return re.sub(r"\n+", "\n", text) if vocabulary._prefix else text


def spelled(ids: list[int]) -> str:
    """Join the text of ids."""
    data = b""
    for each in ids:
        text, kind, _ = VOCABULARY[each]
        data += bytes([int(text[3:5], 16)]) if kind == T.BYTE else text.replace(SPACE, " ").encode()
    return data.decode()


@given(text=LINES)
def test_content_is_tokenized_as_llama_cpp_tokenizes_the_whole(vocabulary: Vocabulary, text: str) -> None:
    """The guard changes nothing where there is nothing to guard against."""
    text = without_blank_lines(vocabulary, text)
    assert vocabulary.encode(text) == whole(vocabulary, text)


@settings(max_examples=20, deadline=None)
@given(lines=st.lists(st.sampled_from(["hello world", "he", "  world", "é🦙", "hello\n"]), min_size=1))
def test_a_text_of_many_pieces_is_tokenized_like_a_whole(vocabulary: Vocabulary, lines: list[str]) -> None:
    """Cutting adds neither a space nor a begin-of-sequence token before the later pieces."""
    text = without_blank_lines(vocabulary, "hello" + "".join(f"{line}\n" for line in lines))
    text *= 2 * pieces.PIECE_CHARS // len(text) + 2
    assert len(list(pieces.cut(text))) > 2
    assert vocabulary.encode(text) == whole(vocabulary, text)


@given(text=FORGERIES)
def test_content_never_yields_a_special_token(vocabulary: Vocabulary, text: str) -> None:
    """Whatever content spells, it comes out as plain tokens that spell the same text."""
    ids = vocabulary.encode(text)
    assert not SPECIAL_IDS & set(ids)
    assert spelled(ids).removeprefix(vocabulary._prefix if text else "") == text.replace(SPACE, " ")


def test_llama_cpp_alone_would_let_content_forge_special_tokens(vocabulary: Vocabulary) -> None:
    """The dangers are real: user-defined tokens and merges into control tokens and bytes."""
    for text, forged in (("a<tool_call>", "<tool_call>"), ("a</s>", "</s>"), ("a <PRE>", f"{SPACE}<PRE>")):
        assert IDS[forged] in whole(vocabulary, text)
        assert IDS[forged] not in vocabulary.encode(text)
    assert IDS["<0x41>"] in whole(vocabulary, "a<0x41>")
    assert spelled(vocabulary.encode("a<0x41>")).endswith("a<0x41>")


def test_runs_of_white_space_keep_their_tokens(vocabulary: Vocabulary) -> None:
    """User-defined tokens of white space are how such a model reads content, so they stay."""
    assert IDS["\n\n"] in vocabulary.encode("hello\n\nworld")


def test_template_text_yields_special_tokens(vocabulary: Vocabulary) -> None:
    """Special strings in template text are their ids, and none is added."""
    ids = vocabulary.encode_template("<s><tool_call>hello<|im_end|>")
    assert [each for each in ids if each in SPECIAL_IDS] == [
        IDS["<s>"],
        IDS["<tool_call>"],
        IDS["<|im_end|>"],
    ]
    assert ids == vocabulary._tokenize(vocabulary._vocab, "<s><tool_call>hello<|im_end|>", parse_special=True)
    assert vocabulary.encode("") == vocabulary.encode_template("") == []


def test_the_tokenizer_of_a_model_runs_in_a_worker(tmp_path: Path) -> None:
    """LocalTokenizer gives the ids and facts of the vocabulary, for one text and for many."""
    path = write_model(tmp_path / "spm.gguf", add_space_prefix=True)
    vocabulary = Vocabulary(path)
    texts = ["hello world", "", "</s> 🦙", "\ud800", "hello\n" * 5000]
    with LocalTokenizer(path) as tokenizer:
        assert tokenizer.encode_batch(texts) == [vocabulary.encode(text) for text in texts]
        assert tokenizer.encode("hello") == vocabulary.encode("hello")
        assert tokenizer.encode_template("<s>hello") == vocabulary.encode_template("<s>hello")
        assert tokenizer.encode_batch([]) == []
        assert tokenizer.bos_id == 1
        assert tokenizer.facts() == {
            "bos": 1,
            "eos": 2,
            "add_bos": True,
            "size": len(VOCABULARY),
            "digest": vocabulary.digest,
        }
        assert tokenizer.name == f"llama.cpp:{vocabulary.digest}"
    assert tokenize(path, [("</s>", True), ("</s>", False)]) == [
        vocabulary.encode_template("</s>"),
        vocabulary.encode("</s>"),
    ]


def test_long_runs_do_not_crash_a_bpe_tokenizer(smollm2: str) -> None:
    """Runs that overflow the stack of llama.cpp's regex are broken before it sees them."""
    texts = ["x" * 60_000, " " * 60_000, "-" * 60_000, "日" * 60_000, "é\u0301" * 30_000]
    with LocalTokenizer(smollm2) as tokenizer:
        encoded = tokenizer.encode_batch(texts)
        assert tokenizer.bos_id is None
    assert all(0 < len(ids) <= len(text.encode()) for ids, text in zip(encoded, texts, strict=True))


def test_a_tokenizer_whose_worker_dies_is_an_error_and_works_again(
    tmp_path: Path, worker_script: Callable[[str], list[str]]
) -> None:
    """The next question after a crash gets a worker of its own."""
    path = write_model(tmp_path / "spm.gguf", add_space_prefix=True)
    code = (
        "from m3cli.engine.vocabulary import Vocabulary\nencode = Vocabulary.encode\n"
        "Vocabulary.encode = lambda self, text: text == 'die' and os.abort() or encode(self, text)"
    )
    with LocalTokenizer(path, worker_command=worker_script(code)) as tokenizer:
        with pytest.raises(EngineCrashError, match="killed by SIGABRT while tokenizing"):
            tokenizer.encode("die")
        assert tokenizer.encode("hello")
    with (
        LocalTokenizer(str(tmp_path / "none.gguf")) as tokenizer,
        pytest.raises(ModelError, match="does not exist"),
    ):
        tokenizer.encode("hello")


def test_a_forgotten_tokenizer_ends_its_worker_without_noise(smollm2: str) -> None:
    """A program that ends without closing leaves neither a process nor a warning."""
    root = str(Path(pieces.__file__).parents[2])
    code = f"""
import sys
sys.path.insert(0, {root!r})
from m3cli.engine.local import LocalTokenizer
tokenizer = LocalTokenizer({smollm2!r})
tokenizer.encode('a')
print(tokenizer._worker.pid)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        check=True,
        text=True,
    )
    assert result.stderr == ""
    assert not Path(f"/proc/{result.stdout.strip()}").exists()
