"""The log on disk, driven by one thread: segments, tree, tiles, checkpoint. No threads, no event loop in here.

`commit` returns after fdatasync. A failed write or sync is never retried: the kernel may have dropped the dirty pages
and report success next time (fsync(2), "errors"); whoever drives this ends the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aether.contract.ids import Digest
from aether.contract.limits import CHECKPOINT_INTERVAL_S
from aether.substrate.audit import segments
from aether.substrate.audit.documents import Documents
from aether.substrate.audit.files import fsync_dir, write_all, write_file
from aether.substrate.audit.note import Checkpoint, Signer
from aether.substrate.audit.pruning import SEGMENTS
from aether.substrate.audit.recover import CHECKPOINT, Recovered, mapped
from aether.substrate.audit.room import Bounds, Room
from aether.substrate.audit.tiles import TileStore

_INTERVAL_NS = int(CHECKPOINT_INTERVAL_S * 1e9)


Opening = Callable[[int, Recovered, Digest], bytes]
"""Makes the first entry of an epoch: its index, how the one before ended, the digest of its last checkpoint's note."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The durable log: `size` entries with `root`; `left_bytes` of room are allocated behind it.

    `short`: less was to be had than was wanted, so the disk is full; else a shortage passes with the next commit.
    """

    size: int
    root: bytes
    left_bytes: int
    short: bool


class LogStore:
    """The files of one open log."""

    def __init__(
        self,
        directory: Path,
        signer: Signer,
        recovered: Recovered,
        bounds: Bounds,
        now_ns: Callable[[], int],
        opening: Opening | None = None,
    ) -> None:
        self._directory = directory
        self._signer = signer
        self._bounds = bounds
        self._now_ns = now_ns
        self.tiles: TileStore = recovered.tiles
        self._offset = recovered.offset
        self._segment_start = int(recovered.segment.name)
        self._fd = os.open(recovered.segment, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(self._fd).st_size != self._offset:
            os.ftruncate(self._fd, self._offset)
            os.fsync(self._fd)
        os.lseek(self._fd, self._offset, os.SEEK_SET)
        self._room = Room(directory / SEGMENTS, bounds)
        self._room.enter(self._fd, self._offset)
        self.published: tuple[str, int] = (recovered.note, recovered.checkpoint.size)
        self._published_at_ns: int | None = None
        self._tiles_behind = False
        self.postponed = 0
        """Publications that a full disk put off."""
        if recovered.checkpoint.origin != signer.name:
            self._begin_epoch(recovered, opening)

    def commit(self, entries: Sequence[bytes], documents: Sequence[Path], want_bytes: int) -> Committed:
        """Makes documents and then entries (one frame) durable; keeps `want_bytes` allocated behind them."""
        if documents:
            Documents.sync(documents)
        if entries:
            frame = segments.encode_frame(self.tiles.size, entries)
            if self._offset + len(frame) > self._bounds.segment_bytes:
                self._rotate()
            write_all(self._fd, frame)
            os.fdatasync(self._fd)
            self._offset += len(frame)
            self.tiles.extend(entries)
        return self.state(want_bytes)

    def state(self, want_bytes: int) -> Committed:
        """The durable log as it is now, after allocating `want_bytes` behind it where there is room."""
        left = self._room.ensure(self._fd, self._offset, want_bytes)
        return Committed(self.tiles.size, self.tiles.root(), left, left < want_bytes + self._bounds.headroom_bytes)

    def publish(self, force: bool = False) -> None:
        """Full tiles as they come, partial ones and the checkpoint at most once a second. A full disk puts it off."""
        try:
            self.tiles.publish()
            if (force or self.due_in_ns() == 0) and self._unpublished():
                self._publish_checkpoint()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.postponed += 1
            self._published_at_ns = self._now_ns()

    def seal(self) -> None:
        """Ends the current segment, if it holds anything, so that it may be pruned one day."""
        if self._segment_start < self.tiles.size:
            self._rotate()

    def due_in_ns(self) -> int | None:
        """How long until the checkpoint may be published; None when the published one is the log's."""
        if not self._unpublished():
            return None
        if self._published_at_ns is None:
            return 0
        return max(0, self._published_at_ns + _INTERVAL_NS - self._now_ns())

    def close(self) -> None:
        """Closes the files."""
        self._room.close()
        os.close(self._fd)

    def _unpublished(self) -> bool:
        return self.published[1] != self.tiles.size or not self.published[0]

    def _publish_checkpoint(self) -> None:
        if self._tiles_behind:
            # recovery trusts the tiles below the last segment once the checkpoint reaches into it
            self.tiles.sync()
            self._tiles_behind = False
        self.tiles.publish_partial()
        note = self._signer.sign(Checkpoint(self._signer.name, self.tiles.size, self.tiles.root()).text())
        write_file(self._directory / CHECKPOINT, note.encode(), mode=0o644, sync=True)
        self.published = (note, self.tiles.size)
        self._published_at_ns = self._now_ns()

    def _begin_epoch(self, recovered: Recovered, opening: Opening | None) -> None:
        """The checkpoint is the former key's: a segment that bears the new name begins with a record that commits to
        it, durable before this key signs anything. A crash in between leaves it to be done again, or done."""
        with mapped(recovered.segment) as data:
            begun = segments.origin_of(data) == self._signer.name and self._segment_start < self.tiles.size
        self._published_at_ns = self._now_ns()
        self.published = ("", 0)
        if begun or opening is None:
            return
        self._rotate()
        digest, path = Documents(self._directory).put(recovered.note.encode())
        entry = opening(self.tiles.size, recovered, digest)
        self.commit([entry], [path] if path is not None else [], 0)

    def _rotate(self) -> None:
        """Begins the next segment; what recovery needs of the old one's tiles is durable before."""
        self.publish()
        self.tiles.sync()
        self._tiles_behind = not self.tiles.is_published
        path, fd = self._room.take()
        header = segments.encode_header(self.tiles.size, self._signer.name)
        write_all(fd, header)
        os.fdatasync(fd)
        path.rename(path.with_name(segments.name(self.tiles.size)))
        fsync_dir(path.parent)
        os.ftruncate(self._fd, self._offset)
        os.close(self._fd)
        self._fd, self._offset, self._segment_start = fd, len(header), self.tiles.size
        self._room.enter(fd, len(header))
