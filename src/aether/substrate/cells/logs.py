"""Reading what the keeper keeps of an executable's output: history and follow, one stream or both in order.

The files and their order of writes are described in `aether.spawner.joblog`; this side only reads, never blocks
and never holds more than one page. A byte's offset in a data file is its offset in the stream; a cursor is an
offset in one stream, or for both a position: the bytes of both streams before it, in arrival order. Bytes that
were dropped are skipped and counted, never shown as zeros: a page is read between two looks at the header, and
read again when the header changed meanwhile.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from aether.contract.errors import AetherError
from aether.contract.limits import LOG_READ_BYTES_MAX

Stream = Literal["stdout", "stderr", "all"]
STREAMS: Final = ("stdout", "stderr")
MAGIC: Final = b"AETHLOG1"
HEADER: Final = struct.Struct("<IqQQQQQQQQ")
HEADER_BYTES: Final = 128
RECORD: Final = struct.Struct("<qqQQII")
EOF_FLAGS: Final = 3
READ_TRIES: Final = 8
POLL_S_MIN: Final = 0.02
POLL_S_MAX: Final = 0.25
UNWRITTEN_S_MAX: Final = 2.0
"""A log that nobody writes for this long is over; a keeper that died is back much sooner."""
_OFFSET_MAX: Final = (1 << 53) - 1
"""An index that names more was not written by a keeper, and pread(2) could not take it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of one stream; `wall_us` is their arrival (epoch microseconds), None when read without the index."""

    stream: str
    offset: int
    data: bytes
    wall_us: int | None


@dataclass(frozen=True, slots=True)
class Page:
    """A bounded piece. `cursor` is where the next begins; `ended`: nothing will follow."""

    chunks: tuple[Chunk, ...]
    cursor: int
    dropped_bytes: int
    ended: bool

    @property
    def data(self) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class _Header:
    flags: int
    totals: tuple[int, int]
    holes: tuple[tuple[int, int], tuple[int, int]]
    records_hole: tuple[int, int]
    records: int


@dataclass(frozen=True, slots=True)
class _Record:
    wall_us: int
    position: int
    offset: int
    length: int
    stream: int


class ExecLog:
    """The output of executable `exec_id`, whose files lie in `directory` (`logs/jobs/<cell>`)."""

    def __init__(self, directory: Path, exec_id: str) -> None:
        self._index_path = directory / f"{exec_id}.index"
        self._data_paths = tuple(directory / f"{exec_id}.{stream}" for stream in STREAMS)

    def read(self, stream: Stream, cursor: int, bytes_max: int = LOG_READ_BYTES_MAX) -> Page:
        """At most `bytes_max` bytes from `cursor` on; an empty page when nothing is there (yet)."""
        try:
            index = os.open(self._index_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return Page((), cursor, 0, False)
        try:
            for _ in range(READ_TRIES):
                before = _read_header(index)
                if before is None:
                    continue
                if stream == "all":
                    page = self._read_both(index, before, cursor, bytes_max)
                else:
                    page = self._read_one(before, STREAMS.index(stream), cursor, bytes_max)
                after = _read_header(index)
                if after is not None and (after.holes, after.records_hole) == (before.holes, before.records_hole):
                    return page
        finally:
            os.close(index)
        return Page((), cursor, 0, False)

    def _read_one(self, header: _Header, number: int, cursor: int, bytes_max: int) -> Page:
        hole_start, hole_end = header.holes[number]
        dropped = 0
        if hole_start <= cursor < hole_end:
            dropped, cursor = hole_end - cursor, hole_end
        until = cursor + bytes_max
        if cursor < hole_start < until:
            until = hole_start
        data = self._data(number, cursor, until - cursor)
        ended = bool(header.flags & (1 << number)) and cursor + len(data) >= header.totals[number]
        chunks = (Chunk(STREAMS[number], cursor, data, None),) if data else ()
        return Page(chunks, cursor + len(data), dropped, ended)

    def _read_both(self, index: int, header: _Header, cursor: int, bytes_max: int) -> Page:
        chunks: list[Chunk] = []
        dropped, left = 0, bytes_max
        number = _find(index, header, cursor)
        while number < header.records and left > 0:
            if header.records_hole[0] <= number < header.records_hole[1]:
                number = header.records_hole[1]
                continue
            record = _read_record(index, number)
            if record is None:
                break
            if cursor < record.position:  # records in between were dropped with their bytes
                dropped += record.position - cursor
                cursor = record.position
            skip = cursor - record.position
            want = max(0, min(record.length - skip, left))
            start = record.offset + skip
            data, lost = self._kept(header, record.stream, start, want)
            if data:
                chunks.append(Chunk(STREAMS[record.stream], start + lost, data, record.wall_us))
            dropped += want - len(data)
            cursor += want
            left -= want
            if cursor >= record.position + record.length:
                number += 1
        ended = header.flags & EOF_FLAGS == EOF_FLAGS and number >= header.records
        return Page(tuple(chunks), cursor, dropped, ended)

    def _kept(self, header: _Header, number: int, start: int, length: int) -> tuple[bytes, int]:
        """Bytes of [start, start + length) that are kept after at most one hole, and how many before them are not."""
        hole_start, hole_end = header.holes[number]
        end = start + length
        lost = 0
        if hole_start <= start < hole_end:
            lost = min(end, hole_end) - start
        elif start < hole_start < end:
            end = hole_start
        return self._data(number, start + lost, end - start - lost), lost

    def _data(self, number: int, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        try:
            fd = os.open(self._data_paths[number], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    def _has_writer(self) -> bool:
        """A keeper holds an exclusive flock on the index of every executable that it watches."""
        try:
            fd = os.open(self._index_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    async def follow(self, stream: Stream, cursor: int, bytes_max: int = LOG_READ_BYTES_MAX) -> AsyncIterator[Page]:
        """Pages until the output has ended, or everything was read that a dead writer left."""
        wait_s, unwritten_s = POLL_S_MIN, 0.0
        while True:
            page = self.read(stream, cursor, bytes_max)
            if page.chunks or page.dropped_bytes:
                yield page
                wait_s = POLL_S_MIN
            if page.ended or unwritten_s > UNWRITTEN_S_MAX:
                return
            if page.cursor == cursor:
                unwritten_s = 0.0 if self._has_writer() else unwritten_s + wait_s
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, POLL_S_MAX)
            cursor = page.cursor


class JobLogs:
    """The outputs of all executables: `logs/jobs/<cell>/<exec>.*`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, cell_id: str, exec_id: str) -> ExecLog:
        """Raises AetherError NOT_FOUND for names that cannot be executables."""
        for name in (cell_id, exec_id):
            if not name or name.startswith(".") or "/" in name:
                raise AetherError("NOT_FOUND", f"cannot read the output of {name[:80]!r}: no such executable")
        return ExecLog(self._directory / cell_id, exec_id)

    async def read(self, cell_id: str, exec_id: str, stream: Stream, cursor: int, follow: bool) -> AsyncIterator[bytes]:
        """The bytes of one stream, or of both in arrival order, from `cursor`; with `follow` until it has ended."""
        log = self.open(cell_id, exec_id)
        if follow:
            async for page in log.follow(stream, cursor):
                yield page.data
            return
        while True:
            page = log.read(stream, cursor)
            if page.chunks:
                yield page.data
            if page.cursor == cursor:
                return
            cursor = page.cursor


def _read_header(index: int) -> _Header | None:
    """None when it is being written right now (its checksum does not match) or is no header."""
    raw = os.pread(index, HEADER_BYTES, 0)
    if len(raw) < HEADER_BYTES or not raw.startswith(MAGIC):
        return None
    (crc,) = struct.unpack_from("<I", raw, len(MAGIC))
    body = raw[len(MAGIC) + 4 : len(MAGIC) + 4 + HEADER.size]
    if zlib.crc32(body) != crc:
        return None
    flags, _, t0, s0, e0, t1, s1, e1, first, end = HEADER.unpack(body)
    if max(t0, s0, e0, t1, s1, e1, first, end) > _OFFSET_MAX:
        return None
    records = (os.fstat(index).st_size - HEADER_BYTES) // RECORD.size
    return _Header(flags, (t0, t1), ((s0, e0), (s1, e1)), (first, end), max(0, records))


def _read_record(index: int, number: int) -> _Record | None:
    raw = os.pread(index, RECORD.size, HEADER_BYTES + number * RECORD.size)
    if len(raw) < RECORD.size:
        return None
    _, wall_us, position, offset, length, stream = RECORD.unpack(raw)
    if stream >= len(STREAMS) or max(position, offset) > _OFFSET_MAX:
        return None
    return _Record(wall_us, position, offset, length, stream)


def _find(index: int, header: _Header, position: int) -> int:
    """The last kept record that begins at or before `position` (else the first kept one)."""
    low, high = 0, header.records
    hole_start, hole_end = header.records_hole
    if hole_end > hole_start:
        after = _read_record(index, hole_end)
        if after is not None and after.position <= position:
            low = hole_end
        else:
            high = hole_start
    while high - low > 1:
        middle = (low + high) // 2
        record = _read_record(index, middle)
        if record is not None and record.position <= position:
            low = middle
        else:
            high = middle
    return low
