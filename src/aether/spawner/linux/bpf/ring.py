"""Reading a BPF ring buffer through its memory, without a system call per event and without any privilege.

Layout (Documentation/bpf/ringbuf.rst, kernel/bpf/ringbuf.c): one page with the consumer's position, writable; then,
read-only, one page with the producer's position and the data, mapped twice in a row so that a record never wraps. A
record is 8 bytes of header (length; bit 31: not yet written, bit 30: discarded), then data, padded to 8. Positions
only grow. The kernel wakes a poller when a record comes to a ring that had been read to its end.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import Final

_BUSY, _DISCARDED, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1
_POSITION: Final = struct.Struct("<Q")
_HEADER: Final = struct.Struct("<I")
HEADER_BYTES: Final = 8


class Ring:
    """The only reader of the ring buffer behind `fd`, which stays the caller's. `size` is its bytes of data."""

    def __init__(self, fd: int, size: int) -> None:
        self._page = mmap.PAGESIZE
        self._mask = size - 1
        self._consumer = mmap.mmap(fd, self._page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._data = mmap.mmap(fd, self._page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._page)

    def take(self, records_max: int) -> Iterator[bytes]:
        """What has come, oldest first; a record's room is free again once the next one is asked for."""
        (position,) = _POSITION.unpack_from(self._consumer, 0)
        for _ in range(records_max):
            if position >= _POSITION.unpack_from(self._data, 0)[0]:
                return
            at = self._page + (position & self._mask)
            (header,) = _HEADER.unpack_from(self._data, at)
            if header & _BUSY:
                return
            length = header & _LENGTH
            if not header & _DISCARDED:
                yield self._data[at + HEADER_BYTES : at + HEADER_BYTES + length]
            position += length + HEADER_BYTES + 7 & ~7
            _POSITION.pack_into(self._consumer, 0, position)

    def close(self) -> None:
        self._consumer.close()
        self._data.close()
