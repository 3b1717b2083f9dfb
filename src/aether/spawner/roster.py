"""Which cells there are, by id, and who holds which block of uids. Plain state, no effects.

An id is used once: after `cell.free` it is remembered for a while, so that a late repetition of `cell.create` is
told so instead of starting anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

from aether.contract import limits
from aether.contract.cellplan import IdMap
from aether.spawner.cells import Cell
from aether.spawner.linux.idspace import here
from aether.spawner.protocol import RefusedError

FREED_KEPT_MAX = 4096


def highest_blocks(count: int) -> Iterator[int]:
    """The first uids of the `count` highest blocks, downwards: the order in which they are given out."""
    space = here()
    return (space.start(slot) for slot in range(space.slots - 1, max(-1, space.slots - 1 - count), -1))


class Reply(Protocol):
    """Answers one request, once; a client that has gone is no error."""

    def ok(self, value: dict[str, Any], fds: tuple[int, ...] = ()) -> None: ...

    def refuse(self, refused: RefusedError) -> None: ...


class Roster:
    """Methods raise RefusedError before they change anything."""

    def __init__(self) -> None:
        self.cells: dict[str, Cell] = {}
        self._blocks: dict[int, str] = {}
        self._freed: OrderedDict[str, None] = OrderedDict()

    def find(self, cell_id: str) -> Cell:
        cell = self.cells.get(cell_id)
        if cell is None or cell.warm:
            raise RefusedError("NO_SUCH_CELL", f"cannot find cell {cell_id}")
        return cell

    def repeated(self, cell_id: str, key: str, reply: Reply) -> bool:
        """Whether cell.create was seen before; then it is answered with what exists."""
        if cell_id in self._freed:
            raise RefusedError("GONE", f"cannot create cell {cell_id}: it existed and was freed")
        cell = self.cells.get(cell_id)
        if cell is None:
            return False
        if cell.key != key:
            raise RefusedError("IDEMPOTENCY_CONFLICT", f"cannot create cell {cell_id}: it exists under another key")
        if cell.state == "starting":
            cell.waiting_start.append(reply)
        else:
            reply.ok({**cell.view(), "existing": True})
        return True

    def free_block(self) -> int:
        """The first uid of the highest block that no cell holds (clients that choose take the lowest).

        A block is free only when its cell is forgotten: nothing of it lives and its files are removed.
        """
        for first in highest_blocks(here().slots):
            if first not in self._blocks:
                return first
        raise RefusedError("CELL_LIMIT", "cannot create a cell: every block of uids is in use")

    def check_room(self, ids: IdMap) -> None:
        """Whether one more cell with these ids may be."""
        if len(self.cells) >= limits.CELLS_LIVE_MAX:
            raise RefusedError("CELL_LIMIT", f"cannot create a cell: {limits.CELLS_LIVE_MAX} exist")
        holder = self._blocks.get(ids.host_uid)
        if ids.count > 1 and holder is not None:
            raise RefusedError("BAD_PLAN", f"cannot use the uid block {ids.host_uid}: cell {holder} holds it")

    def enter(self, cell: Cell) -> None:
        self.cells[cell.cell_id] = cell
        if len(cell.uid_block) > 1:
            self._blocks[cell.uid_block.start] = cell.cell_id

    def rename(self, cell: Cell, cell_id: str) -> None:
        """A cell of the pool gets the id it was asked for."""
        del self.cells[cell.cell_id]
        cell.cell_id = cell_id
        self.enter(cell)

    def forget(self, cell: Cell) -> None:
        self.cells.pop(cell.cell_id, None)
        if self._blocks.get(cell.uid_block.start) == cell.cell_id:
            del self._blocks[cell.uid_block.start]

    def note_freed(self, cell_id: str) -> None:
        self._freed[cell_id] = None
        if len(self._freed) > FREED_KEPT_MAX:
            self._freed.popitem(last=False)
