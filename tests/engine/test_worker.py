from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from m3cli.engine.worker import read_frame, write_frame
from m3cli.model.tokens import pack_ids, unpack_ids

MESSAGES = st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none())


@given(st.lists(st.tuples(MESSAGES, st.binary())))
def test_frames_come_out_as_they_went_in(frames: list[tuple[dict[str, object], bytes]]) -> None:
    """Any sequence of frames is read back in order, and then the stream ends."""
    stream = io.BytesIO()
    for message, payload in frames:
        write_frame(stream, message, payload)
    stream.seek(0)
    assert [read_frame(stream) for _ in frames] == frames
    assert read_frame(stream) is None


@given(MESSAGES, st.binary(), st.data())
def test_a_frame_that_was_cut_off_is_the_end(
    message: dict[str, object], payload: bytes, data: st.DataObject
) -> None:
    """A peer that died while writing is the same as one that wrote nothing."""
    stream = io.BytesIO()
    write_frame(stream, message, payload)
    whole = stream.getvalue()
    size = data.draw(st.integers(0, len(whole) - 1))
    assert read_frame(io.BytesIO(whole[:size])) is None


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_travel_as_little_endian_int32(ids: list[int]) -> None:
    """Ids survive the trip, four bytes each."""
    payload = pack_ids(ids)
    assert payload == b"".join(each.to_bytes(4, "little", signed=True) for each in ids)
    assert unpack_ids(payload).tolist() == ids
