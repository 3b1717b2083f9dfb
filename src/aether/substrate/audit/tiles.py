"""Hash tiles and entry bundles (C2SP tlog-tiles), and the growing tree that fills them.

`TileStore` is extended by one thread (the writer) and read by others: a tile is in `_live` until its full file
stands under its name, so a reader finds it in one place or the other. Files are derived from the segments:
writing one may fail (a full disk) and is tried again; `sync` makes what was written durable before the
segment behind it is left.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.limits import TILE_WIDTH
from aether.substrate.audit.files import fsync_dir, write_file
from aether.substrate.audit.tree import HASH_BYTES, Frontier, leaf_hash, node_hash

TILE_LEVELS: Final = 8
"""Tree levels per tile level: 2^8 = TILE_WIDTH."""
BUNDLES: Final = -1
"""The pseudo level of entry bundles."""
_TILES_CACHED: Final = 512
_BUNDLES_CACHED: Final = 16
_NODES_CACHED: Final = 8_192
_U16: Final = struct.Struct(">H")


def tile_path(level: int, number: int, width: int = TILE_WIDTH) -> str:
    """`tile/<L>/<N>` or `tile/<L>/<N>.p/<W>`; level BUNDLES is `tile/entries`."""
    groups = [f"{number % 1000:03d}"]
    while number := number // 1000:
        groups.append(f"x{number % 1000:03d}")
    path = f"tile/{'entries' if level == BUNDLES else level}/{'/'.join(reversed(groups))}"
    return path if width == TILE_WIDTH else f"{path}.p/{width}"


def tiles_of(size: int) -> list[tuple[int, int, int]]:
    """`(level, full tiles, width of the partial tile)` per level for a tree of `size` leaves, bundles first."""
    levels = [(BUNDLES, *divmod(size, TILE_WIDTH))]
    level, count = 0, size
    while count:
        levels.append((level, *divmod(count, TILE_WIDTH)))
        level, count = level + 1, count // TILE_WIDTH
    return levels


def encode_bundle(entries: Sequence[bytes]) -> bytes:
    parts: list[bytes] = []
    for entry in entries:
        parts += (_U16.pack(len(entry)), entry)
    return b"".join(parts)


def decode_bundle(data: bytes) -> list[bytes]:
    """The entries of a bundle; raises ValueError."""
    entries: list[bytes] = []
    at = 0
    while at < len(data):
        if len(data) - at < 2:
            raise ValueError("a length is cut off")
        (length,) = _U16.unpack_from(data, at)
        at += 2
        if length > len(data) - at:
            raise ValueError("an entry is cut off")
        entries.append(data[at : at + length])
        at += length
    return entries


class TileStore:
    """The tree of one log directory. `size` and `root()` are the writer's; `node` and `entry` anybody's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._live: dict[tuple[int, int], bytearray] = {}
        self._live_entries: dict[int, list[bytes]] = {}
        self._frontier = Frontier(self._complete)
        self._counts: dict[int, int] = {}
        self._full: list[tuple[int, int]] = []
        self._unsynced: list[Path] = []
        self._partials: list[set[Path]] = [set(), set()]
        self._made: set[Path] = set()
        self._tile = lru_cache(_TILES_CACHED)(self._read_tile)
        self._bundle = lru_cache(_BUNDLES_CACHED)(self._read_bundle)
        self._node = lru_cache(_NODES_CACHED)(self._fold_node)

    @property
    def size(self) -> int:
        return self._frontier.size

    def root(self) -> bytes:
        return self._frontier.root()

    def resume(self, size: int) -> None:
        """Continues after `size` leaves (a multiple of TILE_WIDTH) from the tiles on disk; raises AetherError."""
        self._counts = {level: full * TILE_WIDTH + part for level, full, part in tiles_of(size) if level != BUNDLES}
        for level, full, part in tiles_of(size):
            if part and level != BUNDLES:
                self._live[level, full] = self._rebuild(level, full, part)
        self._frontier.resume(size, self.node)

    def extend(self, entries: Sequence[bytes]) -> None:
        """Appends entries to the tree."""
        index = self._frontier.size
        append = self._frontier.append
        for entry in entries:
            number = index // TILE_WIDTH
            bundle = self._live_entries.get(number)
            if bundle is None:
                bundle = self._live_entries[number] = []
            bundle.append(entry)
            append(leaf_hash(entry))
            index += 1

    def node(self, level: int, index: int) -> bytes:
        """The hash of a complete subtree; raises AetherError LOG_CORRUPT when its tile cannot be read."""
        # a complete subtree never changes, and proofs share most of theirs
        return self._node(level, index)

    def _fold_node(self, level: int, index: int) -> bytes:
        tile_level, rest = divmod(level, TILE_LEVELS)
        first = index << rest
        number, start = divmod(first, TILE_WIDTH)
        tile = self._live.get((tile_level, number)) or self._tile(tile_level, number)
        start *= HASH_BYTES
        hashes = bytes(tile[start : start + (HASH_BYTES << rest)])
        if len(hashes) != HASH_BYTES << rest:
            raise AetherError("LOG_CORRUPT", f"cannot read {tile_path(tile_level, number)}: it is too short")
        return fold(hashes)

    def entry(self, index: int) -> bytes:
        """The entry at `index`; raises AetherError LOG_CORRUPT when its bundle cannot be read or was changed."""
        number, at = divmod(index, TILE_WIDTH)
        live = self._live_entries.get(number)
        if live is not None:
            return live[at]
        entry = self._bundle(number)[at]
        self.check(index, entry)
        return entry

    def check(self, index: int, entry: bytes) -> None:
        """Raises AetherError LOG_CORRUPT unless `entry` is what was logged at `index`."""
        if leaf_hash(entry) != self.node(0, index):
            path = tile_path(BUNDLES, index // TILE_WIDTH)
            raise AetherError("LOG_CORRUPT", f"cannot read entry {index}: {path} was changed")

    def bundle(self, number: int) -> list[bytes]:
        """The entries of bundle `number` as far as there are any, unchecked. Raises AetherError LOG_CORRUPT.

        They are not cached: whoever searches reads each bundle once."""
        live = self._live_entries.get(number)
        return list(live) if live is not None else self._read_bundle(number)

    def publish(self) -> None:
        """Writes the tiles and bundles that became full. Raises OSError; what was not written stays due."""
        while self._full:
            level, number = self._full[0]
            path = self._place(level, number)
            write_file(path, self._content(level, number))
            self._unsynced.append(path)
            with contextlib.suppress(OSError):
                shutil.rmtree(f"{path}.p")
            self._full.pop(0)
            self._forget(level, number)

    def confirm(self) -> None:
        """Lets go of full tiles whose files already stand; writes nothing (a log is checked before it is touched)."""
        due: list[tuple[int, int]] = []
        for level, number in self._full:
            path = self._directory / tile_path(level, number)
            if path.is_file() and path.read_bytes() == self._content(level, number):
                self._forget(level, number)
            else:
                due.append((level, number))
        self._full = due

    @property
    def is_published(self) -> bool:
        """Whether every full tile stands as a file."""
        return not self._full

    def publish_partial(self) -> None:
        """Writes the partial tiles of the present size; those of the checkpoint before last are removed."""
        written: set[Path] = set()
        for level, number, width in tiles_of(self.size):
            if not width:
                continue
            path = self._place(level, number, width)
            written.add(path)
            if path in self._partials[-1]:
                continue
            write_file(path, self._content(level, number))
        stale = self._partials.pop(0)
        self._partials.append(written)
        for path in stale - written - self._partials[0]:
            path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Makes the full tiles written so far durable."""
        for path in self._unsynced:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        for parent in {path.parent for path in self._unsynced}:
            fsync_dir(parent)
        self._unsynced.clear()

    def _complete(self, level: int, digest: bytes) -> None:
        tile_level = level // TILE_LEVELS
        count = self._counts.get(tile_level, 0)
        number = count // TILE_WIDTH
        tile = self._live.get((tile_level, number))
        if tile is None:
            tile = self._live[tile_level, number] = bytearray()
        tile += digest
        self._counts[tile_level] = count + 1
        if (count + 1) % TILE_WIDTH == 0:
            if tile_level == 0:
                self._full.append((BUNDLES, number))
            self._full.append((tile_level, number))

    def _content(self, level: int, number: int) -> bytes:
        if level == BUNDLES:
            return encode_bundle(self._live_entries[number])
        return bytes(self._live[level, number])

    def _forget(self, level: int, number: int) -> None:
        if level == BUNDLES:
            del self._live_entries[number]
        else:
            del self._live[level, number]

    def _rebuild(self, level: int, number: int, width: int) -> bytearray:
        """A partial tile above level 0, from the full tiles below it (a partial file may be gone)."""
        below = range(number * TILE_WIDTH, number * TILE_WIDTH + width)
        return bytearray(b"".join(fold(bytes(self._tile(level - 1, n))) for n in below))

    def _place(self, level: int, number: int, width: int = TILE_WIDTH) -> Path:
        path = self._directory / tile_path(level, number, width)
        if path.parent not in self._made:
            path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            if width == TILE_WIDTH:
                self._made.add(path.parent)
        return path

    def _read_tile(self, level: int, number: int) -> bytes:
        path = tile_path(level, number)
        try:
            data = (self._directory / path).read_bytes()
        except OSError as error:
            raise AetherError("LOG_CORRUPT", f"cannot read {path}: {error.strerror}") from error
        if len(data) != TILE_WIDTH * HASH_BYTES:
            raise AetherError("LOG_CORRUPT", f"cannot read {path}: it has {len(data)} bytes")
        return data

    def _read_bundle(self, number: int) -> list[bytes]:
        path = tile_path(BUNDLES, number)
        try:
            entries = decode_bundle((self._directory / path).read_bytes())
        except (OSError, ValueError) as error:
            raise AetherError("LOG_CORRUPT", f"cannot read {path}: {error}") from error
        if len(entries) != TILE_WIDTH:
            raise AetherError("LOG_CORRUPT", f"cannot read {path}: it has {len(entries)} entries")
        return entries


def fold(hashes: bytes) -> bytes:
    """The root of a complete subtree from its 2^k leaf (or subtree) hashes, 32 bytes each."""
    row = [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]
    while len(row) > 1:
        row = [node_hash(row[i], row[i + 1]) for i in range(0, len(row), 2)]
    return row[0]
