"""Retention: old segments and their entry bundles go, the hash tiles stay, so that every proof still holds.

What is pruned is whole segments from the beginning: entries below the index `end`, where a segment begins. Of them the
bundle that `end` lies in is kept, because it holds later entries too; so records are read from `first_kept(end)` on.
The level-0 tiles keep the leaf hash of each entry that went.

Order, each step durable before the next: a record that says so (`audit.pruned`); the marker file `pruned` with
`end` and a newline; segments from the oldest on, then bundles. Whoever opens the log finishes what a crash left
undone. The marker tells a pruned log from one that lost its beginning; who verifies goes by the record instead, which
is signed for.

`end` may lie in any bundle but the one that is still growing: its leaf hashes are then in a full, durable tile.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.limits import TILE_WIDTH
from aether.substrate.audit import segments
from aether.substrate.audit.files import fsync_dir, write_file
from aether.substrate.audit.tiles import BUNDLES, TILE_LEVELS, fold, tile_path
from aether.substrate.audit.tree import HASH_BYTES, NodeSource, leaf_hash

SEGMENTS: Final = "segments"
MARKER: Final = "pruned"


def list_segments(directory: Path) -> list[Path]:
    """The segment files in the order of their first index."""
    names = (directory / SEGMENTS).glob("[0-9]" * segments.NAME_DIGITS)
    return sorted(names, key=lambda path: path.name)


def first_kept(end: int) -> int:
    """The first record that can still be read when the segments below `end` are gone."""
    return end - end % TILE_WIDTH


def ends(directory: Path) -> list[int]:
    """Where a pruning may end, rising: beginnings of segments whose bundle is full."""
    starts = [int(path.name) for path in list_segments(directory)]
    last = max(starts, default=0)
    return [start for start in starts[1:] if start % TILE_WIDTH == 0 or start // TILE_WIDTH < last // TILE_WIDTH]


def pruned_to(directory: Path) -> int:
    """Where the segments begin, as the marker says; 0 without one. Raises AetherError LOG_CORRUPT."""
    try:
        text = (directory / MARKER).read_text(encoding="ascii")
    except FileNotFoundError:
        return 0
    except UnicodeDecodeError:
        text = ""
    if not text.endswith("\n") or not text[:-1].isdecimal() or len(text) > segments.NAME_DIGITS:
        raise AetherError("LOG_CORRUPT", f"cannot open the log: the file {MARKER} is not a number and a newline")
    return int(text)


def begin(directory: Path, end: int) -> None:
    """Writes the marker; after it the entries below `end` go, whatever happens."""
    write_file(directory / MARKER, f"{end}\n".encode(), sync=True)
    fsync_dir(directory)


def finish(directory: Path) -> int:
    """Removes what lies below the marker; returns where segments begin. Raises AetherError LOG_CORRUPT when more is
    gone than the marker says."""
    end = pruned_to(directory)
    found = list_segments(directory)
    if end and int(found[0].name if found else 0) != end:
        if not any(int(path.name) == end for path in found):
            raise AetherError("LOG_CORRUPT", f"cannot open the log: the segment from entry {end} on is missing")
        for path in found:
            if int(path.name) < end:
                path.unlink()
        fsync_dir(directory / SEGMENTS)
    if found and int(found[0].name) > end:
        raise AetherError(
            "LOG_CORRUPT",
            f"cannot open the log: it begins at entry {int(found[0].name)}, pruned were those below {end}",
            details={"segment": found[0].name, "offset": 0},
        )
    _remove_bundles(directory, end // TILE_WIDTH)
    return end


def _remove_bundles(directory: Path, end: int) -> None:
    """Bundles with numbers below `end`, the oldest first: then what a crash leaves is a row that ends at `end`."""
    found: list[Path] = []
    for number in range(end - 1, -1, -1):
        path = directory / tile_path(BUNDLES, number)
        if not path.exists():
            break
        found.append(path)
    for path in reversed(found):
        path.unlink()
    for folder in {path.parent for path in found}:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check(number: int, entries: list[bytes], node: NodeSource) -> None:
    """Raises AetherError LOG_CORRUPT unless the tree holds the hashes of this full bundle: its entries may go."""
    hashes = b"".join(leaf_hash(entry) for entry in entries)
    if len(hashes) != TILE_WIDTH * HASH_BYTES or fold(hashes) != node(TILE_LEVELS, number):
        raise AetherError("LOG_CORRUPT", f"cannot prune: {tile_path(BUNDLES, number)} is not what was logged")
