"""User namespaces of the blocks of uids that cells get first, made before they are asked for.

A namespace costs a fork of this process, about a millisecond, and is kept for all cells of its block. A burst of
cells would pay that for each; here one is made at a time, TICK_S apart, beginning with the first blueprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from aether.contract.cellplan import IdMap
from aether.spawner.linux.executor import LaunchError
from aether.spawner.linux.userns import Blocks
from aether.spawner.loop import Loop
from aether.spawner.roster import highest_blocks

BLOCKS_AHEAD: Final = 128
TICK_S: Final = 0.02


class Ahead:
    """Makes the namespaces of `blocks`, once."""

    def __init__(self, loop: Loop, blocks: Blocks) -> None:
        self._loop = loop
        self._blocks = blocks
        self._left: Iterator[int] | None = None

    def start(self, ids: IdMap) -> None:
        """Begin, with blocks such as that of `ids`; a single id has no block."""
        if self._left is None and ids.count > 1:
            self._left = highest_blocks(BLOCKS_AHEAD)
            self._loop.after(TICK_S, lambda: self._next(ids))

    def _next(self, ids: IdMap) -> None:
        first = next(self._left or iter(()), None)
        if first is None:
            return
        try:
            self._blocks.make(IdMap(first, first, ids.count, ids.init_uid, ids.job_uid, ids.job_gid))
        except LaunchError:
            return  # whoever asks for a cell is told why
        self._loop.after(TICK_S, lambda: self._next(ids))
