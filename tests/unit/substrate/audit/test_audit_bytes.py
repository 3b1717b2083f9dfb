"""Bytes of segments and entry bundles: what was written reads back, anything else is refused where it stands."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.substrate.audit import segments
from aether.substrate.audit.segments import SegmentError
from aether.substrate.audit.tiles import decode_bundle, encode_bundle
from tests.support.hostile import changed_bytes

ORIGIN = "aether/node_a/2"
ENTRIES = st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=5)
FRAME = segments.encode_frame(7, [b"one", b"two"])


@settings(max_examples=80, deadline=None)
@given(st.lists(ENTRIES, max_size=4), st.integers(0, 1 << 40))
def test_frames_and_bundles_read_back(groups: list[list[bytes]], first: int) -> None:
    data, index = segments.encode_header(first, ORIGIN), first
    for group in groups:
        data += segments.encode_frame(index, group)
        index += len(group)
    start = segments.check_header(data, first, ORIGIN)
    assert [list(frame.entries) for frame in segments.scan(data, start, first)] == groups
    whole = [entry for group in groups for entry in group]
    assert decode_bundle(encode_bundle(whole)) == whole


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=120) | changed_bytes(FRAME) | changed_bytes(segments.encode_header(7, ORIGIN) + FRAME))
def test_any_bytes_are_frames_or_refused_where_they_stand(data: bytes) -> None:
    for read in (
        lambda: segments.check_header(data, 7, ORIGIN),
        lambda: list(segments.scan(data, 0, 7)),
    ):
        try:
            read()
        except SegmentError as error:
            assert error.code in ("SEGMENT_HEADER", "FRAME_BAD") and 0 <= error.offset <= len(data)
    assert segments.is_torn(data, 0) == all(segments.whole_frame(data, at) is None for at in range(len(data)))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_bundle_or_refused(data: bytes) -> None:
    try:
        entries = decode_bundle(data)
    except ValueError:
        return
    assert encode_bundle(entries) == data


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(alphabet="aether/node_012²٣", max_size=20))
def test_an_epoch_is_of_one_log(text: str, other: str) -> None:
    for found in (text, other, f"aether/node_a/{other}"):
        if segments.is_epoch_of(found, ORIGIN):
            assert found in ("aether/node_a/1", ORIGIN)


def test_no_bytes() -> None:
    with pytest.raises(SegmentError):
        segments.read_frame(b"", 0, 0)
