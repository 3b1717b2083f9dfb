"""Cells whose cgroups somebody else changed: noticed in turn, mended, told.

One cell every TICK_S (some 0.2 ms of work), so a spawner with n cells sees to each within n ticks and never holds up
a launch for long; none is looked at more often than every ROUND_S. What was found is an event, and the last of it is
kept with the cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aether.spawner.cells import Cell
from aether.spawner.linux.cgroup import CgroupDriver
from aether.spawner.linux.family import family
from aether.spawner.loop import Loop

TICK_S = 1 / 16
ROUND_S = 1.0
KEPT_MAX = 16
"""Lines kept with a cell."""


class Upkeep:
    """Goes round `cells` for as long as the loop runs; `start` begins."""

    def __init__(
        self, loop: Loop, cgroups: CgroupDriver, cells: dict[str, Cell], emit: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._loop = loop
        self._cgroups = cgroups
        self._cells = cells
        self._emit = emit
        self._turn: list[Cell] = []

    def start(self) -> None:
        self._loop.after(ROUND_S, self._tick)

    def _tick(self) -> None:
        if self._turn:
            self.look(self._turn.pop())
        if self._turn:
            self._loop.after(TICK_S, self._tick)
            return
        self._turn = [cell for cell in self._cells.values() if not cell.warm]
        self._loop.after(ROUND_S, self._tick)

    def look(self, cell: Cell) -> None:
        """Mend one running cell."""
        if cell.state != "running" or cell.pidfd < 0 or cell.reason is not None:
            return
        try:
            found = self._cgroups.mend(cell.cgroup, family(cell.pid))
        except OSError as error:
            found = (f"cannot mend its cgroup: {error.strerror}",)
        if found:
            cell.altered = (*cell.altered, *found)[-KEPT_MAX:]
            self._emit("cell.altered", {"cell": cell.cell_id, "found": list(found)})
