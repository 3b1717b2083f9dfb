"""Finds the end of a log at start, and refuses to go on from a damaged one.

Rules:
- the checkpoint on disk, if any, is signed by our key for our origin;
- the log holds at least as many entries as the checkpoint and its root over that size is the checkpoint's;
- segments begin at entry 0, or where the marker of a pruning says (`pruning`), whose rest is done first;
- segments are contiguous and every frame is valid, but for one torn frame at the very end (segments.is_torn)
  that holds nothing the checkpoint covers: it was never acknowledged and is cut off.

Usually only the last segment is read: the tiles of older ones were made durable before it was begun, and the
checkpoint's root over both proves them. When that shortcut does not lead to the checkpoint, everything is read;
what then disagrees is LOG_CORRUPT, and tiles that are missing are written again by the log's first publication.
Nothing is changed on disk before the log has proved good, but for what a pruning that a crash interrupted left to do.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.limits import TILE_WIDTH
from aether.substrate.audit import pruning, segments
from aether.substrate.audit.files import fsync_dir, write_all
from aether.substrate.audit.note import Checkpoint, NoteError, Verifier, open_checkpoint
from aether.substrate.audit.pruning import SEGMENTS, list_segments
from aether.substrate.audit.segments import SegmentError
from aether.substrate.audit.tiles import TileStore
from aether.substrate.audit.tree import EMPTY_ROOT

CHECKPOINT: Final = "checkpoint"


@dataclass(frozen=True, slots=True)
class Recovered:
    """Where the log ends: its tree, the last segment and the offset of its next frame."""

    tiles: TileStore
    segment: Path
    offset: int
    checkpoint: Checkpoint
    note: str


def recover(directory: Path, verifier: Verifier, former: Verifier | None = None) -> Recovered:
    """The end of the log in `directory`, created when there is none. Raises AetherError LOG_CORRUPT.

    `former` is the key of the epoch before: right after a rotation the checkpoint is still signed by it."""
    note, checkpoint = _read_checkpoint(directory, verifier, former)
    gone = pruning.finish(directory)
    found = list_segments(directory)
    if not found:
        if checkpoint.size:
            raise AetherError("LOG_CORRUPT", f"cannot open the log: {checkpoint.size} entries and no segment")
        found = [_first_segment(directory, verifier.name)]
    last_start = int(found[-1].name)
    if 0 < last_start <= checkpoint.size:
        with contextlib.suppress(AetherError):
            return _replay(directory, found, checkpoint, note, last_start - last_start % TILE_WIDTH)
    # the hashes of what was pruned are in full tiles: those were durable before it went
    return _replay(directory, found, checkpoint, note, -(-gone // TILE_WIDTH) * TILE_WIDTH)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file without copying them."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
            yield view


def _read_checkpoint(directory: Path, verifier: Verifier, former: Verifier | None) -> tuple[str, Checkpoint]:
    try:
        note = (directory / CHECKPOINT).read_text(encoding="utf-8")
    except FileNotFoundError:
        return "", Checkpoint(verifier.name, 0, EMPTY_ROOT)
    except UnicodeDecodeError as error:
        raise AetherError("LOG_CORRUPT", "cannot open the log: its checkpoint is not text") from error
    try:
        return note, open_checkpoint(note, verifier)
    except NoteError as error:
        if former is not None:
            return _read_checkpoint(directory, former, None)
        raise AetherError("LOG_CORRUPT", f"cannot open the log: checkpoint: {error.reason} ({error.code})") from error


def _first_segment(directory: Path, origin: str) -> Path:
    path = directory / SEGMENTS / segments.name(0)
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        write_all(fd, segments.encode_header(0, origin))
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.rename(path)
    fsync_dir(path.parent)
    return path


def _replay(directory: Path, found: list[Path], checkpoint: Checkpoint, note: str, start: int) -> Recovered:
    """Reads the segments from entry `start` (a multiple of TILE_WIDTH) on into a tree and checks it."""
    tiles = TileStore(directory)
    if start:
        tiles.resume(start)
    root = tiles.root() if checkpoint.size == start else None
    first = max((i for i, path in enumerate(found) if int(path.name) <= start), default=0)
    index, offset = int(found[first].name), 0
    if index > start:
        raise _corrupt(found[first], 0, "the segments before it are missing")
    for path in found[first:]:
        if int(path.name) != index:
            raise _corrupt(path, 0, f"the log continues at entry {index}")
        with mapped(path) as data:
            try:
                offset = segments.check_header(data, index, checkpoint.origin)
                for frame in segments.scan(data, offset, index):
                    entries = frame.entries[max(0, start - index) :]
                    index += len(frame.entries)
                    split = checkpoint.size - tiles.size
                    if 0 < split <= len(entries):
                        tiles.extend(entries[:split])
                        root, entries = tiles.root(), entries[split:]
                    tiles.extend(entries)
                    tiles.confirm()
                    offset = frame.end
            except SegmentError as error:
                torn = path is found[-1] and error.code == "FRAME_BAD" and segments.is_torn(data, error.offset)
                if not torn or index < checkpoint.size:
                    raise _corrupt(path, error.offset, error.reason) from error
    if tiles.size < checkpoint.size:
        raise _corrupt(found[-1], offset, f"the log has {tiles.size} entries, its checkpoint {checkpoint.size}")
    if root != checkpoint.root:
        raise _corrupt(found[-1], offset, f"the root over {checkpoint.size} entries is not the checkpoint's")
    return Recovered(tiles, found[-1], offset, checkpoint, note)


def _corrupt(path: Path, offset: int, reason: str) -> AetherError:
    return AetherError(
        "LOG_CORRUPT",
        f"cannot open the log: segment {path.name} at byte {offset}: {reason}",
        details={"segment": path.name, "offset": offset},
    )
