from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.pieces import RUN_CHARS, cut, encode_plain

SPECIAL = {1000: "<s>", 1001: "<<tool>>", 1002: "▁<pre>", 1003: "\ufb01x"}
TEXTS = st.lists(
    st.sampled_from([*"<s>tol/ ▁é\n", *SPECIAL.values(), " <pre>", "<tool", "ool>>", "\ufb01", "fix"])
).map("".join)


def greedy(piece: str) -> list[int]:
    """Match special strings first, as llama.cpp does; characters otherwise, `fix` normalized to `ﬁx`."""
    piece = piece.replace(" ", "▁").replace("fix", "\ufb01x")
    ids = []
    while piece:
        for token, text in SPECIAL.items():
            if piece.startswith(text):
                ids.append(token)
                piece = piece[len(text) :]
                break
        else:
            ids.append(ord(piece[0]) % 1000)
            piece = piece[1:]
    return ids


@given(st.text(), st.integers(1, 20), st.booleans())
def test_pieces_joined_are_the_text(text: str, limit: int, break_runs: bool) -> None:
    """Cutting loses nothing and keeps to the limit."""
    pieces = list(cut(text, limit=limit, break_runs=break_runs))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_a_text_is_cut_after_a_line_that_a_word_follows() -> None:
    """Indentation and blank lines stay with what precedes them as long as there is a better place."""
    assert list(cut("one\ntwo\n\n  three", limit=9)) == ["one\n", "two\n\n", "  three"]
    assert list(cut("one two three", limit=9)) == ["one two", " three"]


def test_long_runs_are_broken_where_asked() -> None:
    """No run of white space or of anything else is longer than the tokenizer can stand."""
    text = "x" * (3 * RUN_CHARS + 1) + " " * (2 * RUN_CHARS) + "-" * RUN_CHARS
    pieces = list(cut(text, limit=10**6, break_runs=True))
    assert "".join(pieces) == text
    runs = [run for piece in pieces for run in re.findall(r"x+|\s+|-+", piece)]
    assert max(map(len, runs)) == RUN_CHARS
    assert list(cut(text, limit=10**6)) == [text]


@given(TEXTS)
def test_no_special_id_ever_comes_out(text: str) -> None:
    """Special strings, alone, nested, after a space or made by normalization, stay text."""
    ids = encode_plain(text, greedy, SPECIAL)
    assert not SPECIAL.keys() & set(ids)
    assert len(ids) == len(text)


@given(TEXTS)
def test_innocent_ids_stay_unless_they_are_spelled(text: str) -> None:
    """An id that ordinary text also yields is left where nothing spells it."""
    ids = encode_plain(text, greedy, SPECIAL, innocent={1003})
    assert not {1000, 1001, 1002} & set(ids)
    assert (1003 in ids) <= ("fix" in text)
