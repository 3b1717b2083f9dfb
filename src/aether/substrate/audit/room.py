"""Room on the disk that the log owns before it needs it.

An accepted job must get its outcome recorded although a job fills the disk in the meantime. Blocks that belong to a
file (fallocate) cannot be taken by anybody, so the log keeps `want + headroom` bytes allocated behind its end: in the
current segment first, then in spare files that become the next segments by rename. Allocation happens on the
writer thread; admission compares sizes (AuditLog.append, AuditLog.room).

Where the file system cannot allocate (`allocates` is False) the free space is all there is to go by.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aether.contract.limits import MIB, RECORD_BYTES_MAX, SEGMENT_BYTES_MAX, SEGMENT_FRAME_BYTES_MAX
from aether.substrate.audit.files import allocate

_PREFIX: Final = "spare-"
_HEADER_BYTES_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes of the log's parts in bytes; a frame is one group commit."""

    segment_bytes: int = SEGMENT_BYTES_MAX
    frame_bytes: int = SEGMENT_FRAME_BYTES_MAX
    headroom_bytes: int = 4 * MIB
    step_bytes: int = 1 * MIB

    def __post_init__(self) -> None:
        if self.frame_bytes < 2 * RECORD_BYTES_MAX or self.segment_bytes < 2 * self.frame_bytes:
            raise ValueError(f"cannot use {self}: a segment must hold two frames, a frame two records")
        if self.frame_bytes > SEGMENT_FRAME_BYTES_MAX or self.segment_bytes > SEGMENT_BYTES_MAX:
            raise ValueError(f"cannot use {self}: readers take no larger ones")


@dataclass(slots=True)
class _Spare:
    path: Path
    fd: int
    allocated: int


class Room:
    """Allocated room behind the log's end. Used by the writer thread only."""

    def __init__(self, segments: Path, bounds: Bounds) -> None:
        self._segments = segments
        self._bounds = bounds
        self._allocated = 0
        self._spares = [self._adopt(path) for path in sorted(segments.glob(f"{_PREFIX}*"))]
        self.allocates = True

    def enter(self, fd: int, offset: int) -> None:
        """`fd` is the current segment from now on, its end at `offset`."""
        # blocks allocated before a restart still belong to the file: asking for them again costs nothing
        self._allocated = max(offset, min(_blocks(fd), self._bounds.segment_bytes))

    def ensure(self, fd: int, offset: int, want: int) -> int:
        """Allocates ahead of `offset`; the bytes that are surely free for entries, which may be less than wanted."""
        need = want + self._bounds.headroom_bytes
        if self.allocates:
            try:
                self._extend(fd, offset, need)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                self.allocates = False
        if not self.allocates:
            disk = os.statvfs(self._segments)
            return disk.f_bavail * disk.f_frsize
        self._release(offset, need)
        return self._left(offset)

    def take(self) -> tuple[Path, int]:
        """A file (path, descriptor) to become the next segment, with what is allocated for it."""
        if not self._spares:
            self._spares.append(self._create())
        spare = self._spares.pop(0)
        return spare.path, spare.fd

    def close(self) -> None:
        """Closes the spare files; they keep their room for outcomes of jobs that outlive this process."""
        for spare in self._spares:
            os.close(spare.fd)

    def _left(self, offset: int) -> int:
        return self._usable(self._allocated, offset) + sum(self._usable_spare(spare) for spare in self._spares)

    def _usable(self, allocated: int, offset: int) -> int:
        # the next frame may not fit into what is left of a segment; that rest is lost
        return max(0, min(allocated, self._bounds.segment_bytes - self._bounds.frame_bytes) - offset)

    def _usable_spare(self, spare: _Spare) -> int:
        return self._usable(spare.allocated, _HEADER_BYTES_MAX)

    def _extend(self, fd: int, offset: int, need: int) -> None:
        bounds = self._bounds
        while self._left(offset) < need:
            if self._allocated < bounds.segment_bytes:
                step = min(bounds.step_bytes, bounds.segment_bytes - self._allocated)
                if not allocate(fd, self._allocated, step):
                    return
                self._allocated += step
                continue
            if not self._spares or self._spares[-1].allocated >= bounds.segment_bytes:
                self._spares.append(self._create())
            spare = self._spares[-1]
            step = min(bounds.step_bytes, bounds.segment_bytes - spare.allocated)
            if not allocate(spare.fd, spare.allocated, step):
                return
            spare.allocated += step

    def _release(self, offset: int, need: int) -> None:
        while self._spares:
            spare = self._spares[-1]
            if self._left(offset) - self._usable_spare(spare) < need + self._bounds.headroom_bytes:
                return
            self._spares.pop()
            spare.path.unlink(missing_ok=True)
            os.close(spare.fd)

    def _create(self) -> _Spare:
        numbers = [int(spare.path.name.removeprefix(_PREFIX)) for spare in self._spares]
        path = self._segments / f"{_PREFIX}{max(numbers, default=-1) + 1}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        return _Spare(path, fd, 0)

    def _adopt(self, path: Path) -> _Spare:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(fd).st_size:
            # a header written before a rename that did not happen
            os.ftruncate(fd, 0)
        return _Spare(path, fd, min(_blocks(fd), self._bounds.segment_bytes))


def _blocks(fd: int) -> int:
    """Bytes allocated to the file, less what may be metadata (extent blocks count in st_blocks)."""
    return max(0, os.fstat(fd).st_blocks * 512 - 64 * 1024)
