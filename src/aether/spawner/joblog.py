"""Files of one executable's output: `<exec>.stdout`, `<exec>.stderr` and the time index `<exec>.index`.

A byte's offset in a data file is its offset in the stream. When a stream outgrows head + tail, its middle is
punched out (fallocate(2), FALLOC_FL_PUNCH_HOLE): offsets stay true, disk use stays bounded, and the header
names the hole. Where the file system cannot punch, everything after the head is counted and not kept.

Index: a header of HEADER_BYTES, then records of RECORD_BYTES, little endian, one per chunk in arrival order.
    header  magic `AETHLOG1`, crc32 of what follows, flags, created (wall us),
            per stream: total bytes (final once its EOF flag is set), hole start, hole end;
            records' own hole: first and end record number
    record  monotonic us, wall us, position, stream offset, length, stream (0 stdout, 1 stderr)
            where position counts the bytes of both streams before this chunk
Order of writes: data, then record; header before a hole is punched. So a reader that finds the same header
before and after reading data has seen no punched zeros, and never sees a record without its bytes.
The records are bounded in the same way as the data.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass

MAGIC = b"AETHLOG1"
HEADER = struct.Struct("<IqQQQQQQQQ")
HEADER_BYTES = 128
RECORD = struct.Struct("<qqQQII")
RECORD_BYTES = RECORD.size
STREAMS = ("stdout", "stderr")
FLAG_EOF = (1, 2)
FILE_MODE = 0o640
PUNCH_STEP_BYTES = 256 * 1024
RECORDS_HEAD = 16_384
RECORDS_TAIL = 65_536
RECORDS_STEP = 8_192
_BLOCK = 4096
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch(fd: int, start: int, end: int) -> None:
    """Free the blocks of [start, end), which then read as zeros; raises OSError."""
    if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, start, end - start) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@dataclass(slots=True)
class _Stream:
    """One data file; `fd` is -1 until its first byte, `keeps_tail` false where holes cannot be punched."""

    path: str
    fd: int = -1
    total: int = 0
    hole_start: int = 0
    hole_end: int = 0
    lost: int = 0
    keeps_tail: bool = True


class JobLog:
    """Writer of the three files. `head` and `tail` are bytes kept of each stream."""

    def __init__(
        self, directory: int, name: str, *, streams: Collection[int], head: int, tail: int, wall_us: int
    ) -> None:
        """`directory` is a descriptor of `logs/jobs/<cell>`; existing files of `name` are continued.

        A stream that is not among `streams` is at its end from the beginning.
        """
        self._directory = os.dup(directory)
        self._head, self._tail = head, tail
        self._position = 0
        self._streams = [_Stream(f"{name}.{stream}") for stream in STREAMS]
        self._flags = sum(flag for number, flag in enumerate(FLAG_EOF) if number not in streams)
        self._created_us = wall_us
        self._records = 0
        self._records_hole = (0, 0)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._index = os.open(f"{name}.index", flags, FILE_MODE, dir_fd=directory)
        fcntl.flock(self._index, fcntl.LOCK_EX)  # readers see that a writer lives; a dead one's lock is gone
        if os.fstat(self._index).st_size >= HEADER_BYTES:
            self._resume()
        else:
            self._write_header()

    def _resume(self) -> None:
        """A former keeper died: totals are those of its last records."""
        raw = os.pread(self._index, HEADER_BYTES, 0)
        fields = HEADER.unpack_from(raw, len(MAGIC) + 4)
        self._flags, self._created_us = fields[0], fields[1]
        self._records_hole = (fields[8], fields[9])
        self._records = (os.fstat(self._index).st_size - HEADER_BYTES) // RECORD_BYTES
        for number, stream in enumerate(self._streams):
            stream.total, stream.hole_start, stream.hole_end = fields[2 + number * 3 : 5 + number * 3]
            self._open(stream)
        for number in range(max(0, self._records - RECORDS_TAIL), self._records):
            row = RECORD.unpack(os.pread(self._index, RECORD_BYTES, HEADER_BYTES + number * RECORD_BYTES))
            _, _, position, offset, length, which = row
            if which < len(self._streams):
                self._position = position + length
                self._streams[which].total = max(self._streams[which].total, offset + length)

    def _open(self, stream: _Stream) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        stream.fd = os.open(stream.path, flags, FILE_MODE, dir_fd=self._directory)

    def append(self, number: int, data: bytes, mono_us: int, wall_us: int) -> None:
        """Keep one chunk. A full disk loses the chunk and counts it; it never stops the job."""
        stream = self._streams[number]
        offset = stream.total
        try:
            if stream.keeps_tail or offset < self._head:
                kept = data if stream.keeps_tail else data[: self._head - offset]
                if stream.fd < 0:
                    self._open(stream)
                if os.pwrite(stream.fd, kept, offset) != len(kept):
                    raise OSError(errno.ENOSPC, "short write")
            self._append_record(RECORD.pack(mono_us, wall_us, self._position, offset, len(data), number))
        except OSError:
            stream.lost += len(data)
            return
        stream.total += len(data)
        self._position += len(data)
        self._bound(stream)

    def _append_record(self, record: bytes) -> None:
        if os.pwrite(self._index, record, HEADER_BYTES + self._records * RECORD_BYTES) != RECORD_BYTES:
            raise OSError(errno.ENOSPC, "short write")
        self._records += 1
        _, hole_end = self._records_hole
        first_kept = self._records - RECORDS_TAIL
        if first_kept - max(hole_end, RECORDS_HEAD) >= RECORDS_STEP:
            self._records_hole = (RECORDS_HEAD, first_kept)
            self._write_header()
            start = HEADER_BYTES + max(hole_end, RECORDS_HEAD) * RECORD_BYTES
            self._punch(self._index, start, HEADER_BYTES + first_kept * RECORD_BYTES)

    def _bound(self, stream: _Stream) -> None:
        first_kept = stream.total - self._tail
        begin = max(stream.hole_end, self._head)
        if not stream.keeps_tail:
            stream.hole_start, stream.hole_end = self._head, stream.total
        elif first_kept - begin >= PUNCH_STEP_BYTES:
            stream.hole_start, stream.hole_end = self._head, first_kept
            self._write_header()
            if not self._punch(stream.fd, begin, first_kept):
                stream.keeps_tail = False
                os.ftruncate(stream.fd, self._head)
                stream.hole_end = stream.total

    @staticmethod
    def _punch(fd: int, start: int, end: int) -> bool:
        """Whole blocks only, so that what was kept beside the hole survives."""
        start, end = -(-start // _BLOCK) * _BLOCK, end // _BLOCK * _BLOCK
        try:
            if end > start:
                punch(fd, start, end)
        except OSError:
            return False
        return True

    def end(self, number: int) -> None:
        """The stream's writers are gone: its total is final."""
        self._flags |= FLAG_EOF[number]
        self._write_header()

    def _write_header(self) -> None:
        fields: list[int] = [self._flags, self._created_us]
        for stream in self._streams:
            fields += (stream.total, stream.hole_start, stream.hole_end)
        body = HEADER.pack(*fields, *self._records_hole)
        raw = MAGIC + struct.pack("<I", zlib.crc32(body)) + body
        os.pwrite(self._index, raw.ljust(HEADER_BYTES, b"\0"), 0)

    def totals(self) -> dict[str, dict[str, int]]:
        """`{stream: {bytes, dropped}}` so far."""
        return {
            name: {"bytes": s.total + s.lost, "dropped": s.hole_end - s.hole_start + s.lost}
            for name, s in zip(STREAMS, self._streams, strict=True)
        }

    def close(self) -> None:
        os.close(self._index)
        os.close(self._directory)
        for stream in self._streams:
            if stream.fd >= 0:
                os.close(stream.fd)
