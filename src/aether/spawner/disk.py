"""What cells keep on disk, bounded: by the kernel where it can, else by looking.

A cell whose own user namespace keeps it in its project gets a project quota where the file system of the state
directory enforces them (`project-quota`): its writes fail with EDQUOT, exactly at the bound. Every other cell is
`watched`: once it has lived for a moment the watcher is told of it, and a cell that is found above its bound is killed
whole, `disk-limit`. A short job costs nothing: it is over before anybody would look, and its directory goes with it.
The bound counts each cell by itself, those within it not.

Project ids are of the spawner's own choice, from a range of its instance, so that what a dead instance left counts
for nobody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from aether.contract import limits
from aether.contract.cellplan import Plan
from aether.spawner.cells import Cell
from aether.spawner.helper import Helper, HelperOptions
from aether.spawner.layers import layers_of
from aether.spawner.linux import quota
from aether.spawner.loop import Loop
from aether.spawner.protocol import RefusedError

TICK_S: Final = 0.25
MOMENT_S: Final = 0.1
"""A cell that has not lived so long is not told of: most never do."""
BATCH_CELLS: Final = 64
REASON: Final = "disk-limit"
_PROJECT_BASE: Final = 0x4000_0000
_PROJECTS: Final = 1 << 16
"""Ids of one instance; more than there are blocks of uids, so that one is free."""


class Projects:
    """The project ids of work directories, by place. `root` is a descriptor of the work root."""

    def __init__(self, root: int, instance: str) -> None:
        self._root = root
        first = _PROJECT_BASE + int(instance, 16) % 0x3FFF * _PROJECTS
        self._next = (first + number % _PROJECTS for number in count())
        self._of: dict[str, int] = {}
        self._bounds: dict[str, int] = {}

    def _project(self, place: str) -> int:
        if place not in self._of:
            taken = set(self._of.values())
            self._of[place] = next(project for project in self._next if project not in taken)
        return self._of[place]

    def assign(self, place: str, directory: int) -> None:
        """What is made in the empty `directory` counts for `place`; raises OSError."""
        quota.assign(directory, self._project(place))

    def limit(self, place: str, bytes_max: int) -> None:
        """Raises OSError."""
        quota.limit(self._root, self._project(place), bytes_max, limits.WORK_ENTRIES_MAX)
        self._bounds[place] = bytes_max

    def check_room(self, place: str, size_bytes: int) -> None:
        """Whether so much may be added by root, whom the kernel does not hold to quotas; raises RefusedError."""
        bound = self._bounds.get(place)
        if bound is not None and self.used(place) + size_bytes > bound:
            raise RefusedError("TOO_LARGE", f"cannot put {size_bytes} bytes: the cell may keep {bound} on disk")

    def used(self, place: str) -> int:
        """Bytes; raises OSError."""
        return quota.used(self._root, self._project(place))

    def release(self, place: str) -> None:
        """Its directory is gone. Raises OSError."""
        self._bounds.pop(place, None)
        project = self._of.pop(place, None)
        if project is not None:
            quota.limit(self._root, project, 0, 0)


def projects_of(root: int, instance: str) -> Projects | None:
    """Those of the work root, if its file system enforces project quotas."""
    return Projects(root, instance) if quota.enforced(root) else None


class Disk:
    """The bounds of all cells. `trees` names what a place keeps below the work root; `kill` ends a cell."""

    def __init__(
        self,
        loop: Loop,
        options: HelperOptions,
        cells: dict[str, Cell],
        trees: Callable[[str], tuple[str, ...]],
        projects: Projects | None,
        kill: Callable[[Cell, str], None],
    ) -> None:
        self._loop = loop
        self._cells = cells
        self._trees = trees
        self._projects = projects
        self._kill = kill
        self._helper = Helper(loop, "aether.spawner.diskwatch", options, self._started, self._on_message)
        self._helps = self._armed = False
        self._watched: dict[str, dict[str, Any]] = {}

    @property
    def pid(self) -> int:
        return self._helper.pid

    def bound(self, cell: Cell, plan: Plan, bytes_max: int) -> None:
        """Decide what holds it, as soon as the cell has its place."""
        cell.disk_bytes, cell.disk = bytes_max, "watched"
        own_namespace = plan.driver == "native" and "user" in plan.namespaces
        if self._projects is not None and own_namespace and not layers_of(plan):
            with contextlib.suppress(OSError):  # the kernel has no room for one more: it is watched
                self._projects.limit(cell.place, bytes_max)
                cell.disk = "project-quota"

    def arm(self) -> None:
        """A cell is under way: look at what lives in a moment."""
        if not self._armed:
            self._armed = True
            self._loop.after(TICK_S, self._tick)

    def resize(self, cell: Cell, bytes_max: int) -> None:
        """Another bound for a running cell. Raises RefusedError LIMIT_REFUSED; OSError."""
        if cell.disk == "project-quota" and self._projects is not None:
            holds = self._projects.used(cell.place)
            if bytes_max < holds:
                why = f"it keeps {holds} bytes on disk"
                raise RefusedError("LIMIT_REFUSED", f"cannot resize cell {cell.cell_id} to {bytes_max}: {why}")
            self._projects.limit(cell.place, bytes_max)
        cell.disk_bytes = bytes_max
        if cell.place in self._watched:
            self._watch([cell])

    def ended(self, cell: Cell) -> None:
        """Nothing of it writes any more."""
        if self._watched.pop(cell.place, None) is not None:
            self._helper.put({"op": "forget", "cell": cell.place})

    def close(self) -> None:
        self._helper.close()

    def _tick(self) -> None:
        self._armed = False
        bounded = [each for each in self._cells.values() if each.disk == "watched" and not each.warm]
        before_ns = (self._loop.clock_s() - MOMENT_S) * 1e9
        running = [each for each in bounded if each.state == "running" and each.place not in self._watched]
        new = [each for each in running if each.started_ns <= before_ns]
        if new:
            self._watch(new)
        if any(each.state in ("starting", "running") and each.place not in self._watched for each in bounded):
            self.arm()

    def _watch(self, cells: list[Cell]) -> None:
        for cell in cells:
            pids = [pid for pid in {cell.pid, cell.launched.pid} if pid > 0]
            uids = [cell.uid_block.start, cell.uid_block.stop]
            self._watched[cell.place] = {
                "cell": cell.place,
                "trees": self._trees(cell.place),
                "pids": pids,
                "uids": uids,
                "bytes_max": cell.disk_bytes,
            }
        if not self._helps:
            self._helps = True
            self._helper.start()  # which tells it of all
        else:
            self._tell([self._watched[cell.place] for cell in cells])

    def _tell(self, watched: list[dict[str, Any]]) -> None:
        for first in range(0, len(watched), BATCH_CELLS):
            self._helper.put({"op": "watch", "cells": watched[first : first + BATCH_CELLS]})

    def _started(self) -> None:
        self._tell(list(self._watched.values()))

    def _on_message(self, event: dict[str, Any], fds: tuple[int, ...]) -> None:
        for fd in fds:
            os.close(fd)
        place = event["cell"]
        if event["ev"] != "over":
            raise ValueError("no such message")
        if place in self._watched:
            self._kill(next(each for each in self._cells.values() if each.place == place), REASON)
