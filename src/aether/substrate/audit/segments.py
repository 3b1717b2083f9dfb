"""Bytes of a segment file, pure (docs/formats.md "Segments"): a header, then one frame per group commit.

A frame carries its own length and CRC, so that the last write of a process that died is told apart from damage:
see `scan`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from aether.contract.limits import RECORD_BYTES_MAX, SEGMENT_BYTES_MAX, SEGMENT_FRAME_BYTES_MAX

SEGMENT_MAGIC: Final = b"AETHSEG1"
FRAME_MAGIC: Final = b"AEF1"
NAME_DIGITS: Final = 20
_HEADER: Final = struct.Struct(">8sQH")
_FRAME: Final = struct.Struct(">4sQII")
_U32: Final = struct.Struct(">I")
FRAME_HEADER_BYTES: Final = _FRAME.size + _U32.size
ENTRY_HEADER_BYTES: Final = _U32.size

Bytes = bytes | memoryview


class SegmentError(Exception):
    """A segment that does not hold, at byte `offset`; `code` is a failure name of docs/formats.md."""

    def __init__(self, code: str, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Frame:
    """One group commit: entries `first_index`.. in the bytes from `offset` to `end`."""

    first_index: int
    entries: tuple[bytes, ...]
    offset: int
    end: int


def name(first_index: int) -> str:
    return f"{first_index:0{NAME_DIGITS}d}"


def encode_header(first_index: int, origin: str) -> bytes:
    raw = origin.encode()
    head = _HEADER.pack(SEGMENT_MAGIC, first_index, len(raw)) + raw
    return head + _U32.pack(zlib.crc32(head))


def check_header(data: Bytes, first_index: int, origin: str) -> int:
    """The offset of the first frame; raises SegmentError SEGMENT_HEADER unless the header is exactly ours.

    A segment of the node's log may be of an earlier epoch than `origin`: the tree goes on when the key changes."""
    found = origin_of(data)
    expected = encode_header(first_index, found if found is not None and is_epoch_of(found, origin) else origin)
    if bytes(data[: len(expected)]) != expected:
        raise SegmentError("SEGMENT_HEADER", 0, f"the header is not that of entry {first_index} of {origin}")
    if len(data) > SEGMENT_BYTES_MAX:
        raise SegmentError("SEGMENT_HEADER", 0, f"the segment is longer than {SEGMENT_BYTES_MAX} bytes")
    return len(expected)


def is_epoch_of(origin: str, current: str) -> bool:
    """Whether `origin` is `current` or an earlier epoch of its log: `aether/<node>/<epoch>`."""
    log, _, epoch = origin.rpartition("/")
    present_log, _, present = current.rpartition("/")
    if origin == current:
        return True
    if log != present_log or not all(_is_epoch(text) for text in (epoch, present)):
        return False
    return 1 <= int(epoch) <= int(present)


def _is_epoch(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9 and text[0] != "0"


def origin_of(data: Bytes) -> str | None:
    """The origin that a header names, unchecked."""
    if len(data) < _HEADER.size:
        return None
    _, _, length = _HEADER.unpack_from(data, 0)
    try:
        return bytes(data[_HEADER.size : _HEADER.size + length]).decode("utf-8")
    except UnicodeDecodeError:
        return None


def encode_frame(first_index: int, entries: Sequence[bytes]) -> bytes:
    parts: list[bytes] = []
    for entry in entries:
        parts += (_U32.pack(len(entry)), entry)
    payload = b"".join(parts)
    head = _FRAME.pack(FRAME_MAGIC, first_index, len(entries), len(payload))
    return b"".join((head, _U32.pack(zlib.crc32(payload, zlib.crc32(head))), payload))


def frame_bytes(entries: Sequence[bytes]) -> int:
    """The length of the frame of `entries`."""
    return FRAME_HEADER_BYTES + sum(ENTRY_HEADER_BYTES + len(entry) for entry in entries)


def read_frame(data: Bytes, offset: int, first_index: int) -> Frame:
    """The frame of entries from `first_index` on at `offset`; raises SegmentError FRAME_BAD."""
    end = whole_frame(data, offset)
    if end is None:
        raise SegmentError("FRAME_BAD", offset, f"the frame of entry {first_index} is cut off or its check is wrong")
    _, index, count, _ = _FRAME.unpack_from(data, offset)
    if index != first_index:
        raise SegmentError("FRAME_BAD", offset, f"the frame is of entry {index}, not {first_index}")
    payload = bytes(data[offset + FRAME_HEADER_BYTES : end])
    return Frame(index, _entries(payload, count, offset), offset, end)


def whole_frame(data: Bytes, offset: int) -> int | None:
    """Where a frame that was written whole at `offset` ends: magic, bound and check hold. None where there is none."""
    start = offset + FRAME_HEADER_BYTES
    if len(data) < start:
        return None
    magic, _, _, length = _FRAME.unpack_from(data, offset)
    end = start + int(length)
    if magic != FRAME_MAGIC or end - offset > SEGMENT_FRAME_BYTES_MAX or end > len(data):
        return None
    (check,) = _U32.unpack_from(data, offset + _FRAME.size)
    return end if zlib.crc32(data[start:end], zlib.crc32(data[offset : offset + _FRAME.size])) == check else None


def scan(data: Bytes, offset: int, first_index: int) -> Iterator[Frame]:
    """The frames from `offset` to the end; raises SegmentError FRAME_BAD at the first that is not valid."""
    while offset < len(data):
        frame = read_frame(data, offset, first_index)
        yield frame
        offset, first_index = frame.end, first_index + len(frame.entries)


def is_torn(data: Bytes, offset: int) -> bool:
    """Whether the invalid bytes from `offset` to the end are one interrupted write.

    One write is in progress at a time, it is of one frame, and the next begins after its fdatasync: bytes beyond a
    frame's bound, or a frame written whole from there on (whatever it says), were durable once; then it is damage.
    What clients put into entries is no frame: its length would be control characters, which JSON escapes.
    """
    if len(data) - offset > SEGMENT_FRAME_BYTES_MAX:
        return False
    rest = bytes(data[offset:])
    at = rest.find(FRAME_MAGIC)
    while at >= 0:
        if whole_frame(rest, at) is not None:
            return False
        at = rest.find(FRAME_MAGIC, at + 1)
    return True


def _entries(payload: bytes, count: int, offset: int) -> tuple[bytes, ...]:
    entries: list[bytes] = []
    at = 0
    while at < len(payload):
        if len(payload) - at < ENTRY_HEADER_BYTES:
            raise SegmentError("FRAME_BAD", offset, "an entry's length is cut off")
        (length,) = _U32.unpack_from(payload, at)
        at += ENTRY_HEADER_BYTES
        if not 0 < length <= min(RECORD_BYTES_MAX, len(payload) - at):
            raise SegmentError("FRAME_BAD", offset, f"an entry's length of {length} does not fit")
        entries.append(payload[at : at + length])
        at += length
    if len(entries) != count or not entries:
        raise SegmentError("FRAME_BAD", offset, f"the frame holds {len(entries)} entries and announces {count}")
    return tuple(entries)
