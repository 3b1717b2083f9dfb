"""Warm cells: blueprints kept by digest, and cells prepared from them before anybody asks.

A blueprint is a plan without what differs from cell to cell: its id, its block of uids, its work directory. It is
checked once, when it is kept; `cell.create` then names its digest. A prepared cell stands complete, its PID 1
waiting: namespaces, root, cgroup limits, filters and an empty work directory are its own, and its id is all that
it gets when it is taken. Each serves one `cell.create` and is never used again, so nothing of one client can meet
another. A cell of the pool is in no list and answers to no client; it ends with the spawner, or when its blueprint
has not been used for IDLE_S.

The first use of a blueprint launches cold. From then on as many cells stand ready as were asked for within the
last moments, at least one and at most READY_MAX; they are made once the jobs that drew on them are under way.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from aether.contract.cellplan import ExecSpec, IdMap, Plan, placed
from aether.spawner.cells import Cell
from aether.spawner.lifecycle import Lifecycle
from aether.spawner.loop import Loop
from aether.spawner.protocol import RefusedError
from aether.spawner.workops import WorkOps
from aether.spawner.zygote import ZygoteRunning, wire_zygote

BLUEPRINTS_MAX = 64
READY_MAX = 4
"""Prepared cells of one blueprint."""
ALL_READY_MAX = 16
REFILL_S = 0.005
"""After a cell was asked for: a short job is over and answered by then, and does not share its CPUs with our work."""
IDLE_S = 30.0


@dataclass(slots=True)
class Blueprint:
    """`plan` and `limits` as checked; `asked` counts the requests since the pool was last filled.

    `zygote` is an interpreter that every cell is prepared with: none of them is launched cold.
    """

    plan: Plan
    limits: dict[str, Any]
    prepare: bool
    zygote: ExecSpec | None = None
    ready: deque[Cell] = field(default_factory=deque)
    preparing: Cell | None = None
    asked: int = 0
    target: int = 0
    used_s: float = 0.0
    watched: bool = False

    def fill(self, cell_id: str, work: str, block: int | None) -> Plan:
        """The plan of one cell: its id, the host path of its work directory, the first uid of its block."""
        ids = self.plan.id_map if block is None else replace(self.plan.id_map, host_uid=block, host_gid=block)
        steps = tuple(placed(step, work) for step in self.plan.steps)
        return replace(self.plan, cell_id=cell_id, id_map=ids, steps=steps)


@dataclass(slots=True)
class _Start:
    """Hears how the start of a cell of the pool went."""

    done: Callable[[Cell | None], None]
    pooled: bool = True
    cell: Cell | None = None

    def ok(self, value: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.done(self.cell)

    def refuse(self, refused: RefusedError) -> None:
        """Whoever asks next is told why by a cold launch."""
        self.done(None)


class Warm:
    """The blueprints and the pool. `work` is the host directory of work directories; `on_kept` hears of the ids of
    each new blueprint."""

    def __init__(
        self, loop: Loop, lifecycle: Lifecycle, work_ops: WorkOps, work: str, on_kept: Callable[[IdMap], None]
    ) -> None:
        self._loop = loop
        self._lifecycle = lifecycle
        self._work_ops = work_ops
        self._work = work
        self._on_kept = on_kept
        self._kept: OrderedDict[str, Blueprint] = OrderedDict()
        self._numbers = itertools.count(1)
        self.taken = 0
        self._ended = False

    def end(self) -> None:
        """No cell is made from now on; those that stand end with the others."""
        self._ended = True

    def facts(self) -> dict[str, int]:
        """How many cells stand ready, and how many were taken since the start."""
        return {"ready": sum(len(each.ready) for each in self._kept.values()), "taken": self.taken}

    def keep(self, blueprint: Blueprint, document: dict[str, Any]) -> str:
        """Keep a checked blueprint; its digest. `document` is what it was read from."""
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in self._kept:
            self._kept[digest] = blueprint
            self._on_kept(blueprint.plan.id_map)
            if len(self._kept) > BLUEPRINTS_MAX:
                _, oldest = self._kept.popitem(last=False)
                self._drop(oldest)
        self._kept.move_to_end(digest)
        return digest

    def find(self, digest: str) -> Blueprint:
        """Raises RefusedError NOT_FOUND: keep it again."""
        kept = self._kept.get(digest)
        if kept is None:
            raise RefusedError("NOT_FOUND", f"cannot find the blueprint {digest[:80]}: keep it first")
        self._kept.move_to_end(digest)
        return kept

    def plan(self, kept: Blueprint, cell_id: str) -> Plan:
        """The plan of a cell that is launched cold; raises RefusedError CELL_LIMIT."""
        block = self._lifecycle.roster.free_block() if kept.plan.id_map.count > 1 else None
        return kept.fill(cell_id, f"{self._work}/{cell_id}", block)

    def take(self, kept: Blueprint) -> Cell | None:
        """A prepared cell, ready or on its way (PID 1 reads its first order when it stands); another will be made."""
        self._used(kept)
        found = None
        while kept.ready and found is None:
            cell = kept.ready.popleft()
            found = cell if cell.state == "running" and cell.reason is None else None
        if found is None and kept.preparing is not None and kept.preparing.launched is not None:
            found, kept.preparing = kept.preparing, None
        if found is None and kept.zygote is not None:
            found = self._make(kept, _Start(lambda _: None, pooled=False))
            if found.reason is not None:
                raise RefusedError("CELL_FAILED", "cannot prepare the cell: it could not be launched")
        if found is not None:
            found.waiting_start.clear()
            self.taken += 1
        return found

    def _used(self, kept: Blueprint) -> None:
        kept.used_s = self._loop.clock_s()
        kept.asked += 1
        if kept.prepare and kept.asked == 1:
            self._loop.after(REFILL_S, lambda: self._refill(kept))
        if kept.prepare and not kept.watched:
            kept.watched = True
            self._loop.after(IDLE_S, lambda: self._expire(kept))

    def _refill(self, kept: Blueprint) -> None:
        kept.target = min(max(kept.asked, 1), READY_MAX)
        kept.asked = 0
        self._prepare_next(kept)

    def _prepare_next(self, kept: Blueprint) -> None:
        full = len(kept.ready) >= kept.target or self.facts()["ready"] >= ALL_READY_MAX
        if full or kept.preparing is not None or self._ended:
            return
        start = _Start(lambda cell: self._stands(kept, cell))
        with contextlib.suppress(RefusedError):  # no room: the next use tries again
            self._make(kept, start)

    def _make(self, kept: Blueprint, start: _Start) -> Cell:
        """A cell on its way; its work directory is made and PID 1 launched before this returns."""
        plan = self.plan(kept, f"warm-{next(self._numbers)}")
        cell = start.cell = self._lifecycle.prepare(plan, kept.limits, start)
        if start.pooled:
            kept.preparing = cell
        self._work_ops.fill(
            cell.place,
            cell.owner,
            (),
            [],
            lambda: self._launch(kept, cell, plan),
            lambda refused: self._lifecycle.abandon(cell, None, refused),
        )
        return cell

    def _launch(self, kept: Blueprint, cell: Cell, plan: Plan) -> None:
        if kept.zygote is None:
            self._lifecycle.launch(cell, plan, None, None)
            return
        wired, channel = wire_zygote(kept.zygote)
        self._lifecycle.launch(cell, plan, None, wired)
        if cell.launched is not None:
            cell.launched = ZygoteRunning(cell.launched, channel)
        else:
            channel.close()

    def _stands(self, kept: Blueprint, cell: Cell | None) -> None:
        kept.preparing = None
        if cell is None:
            return
        kept.ready.append(cell)
        if kept.target:
            self._prepare_next(kept)
        else:
            self._drop(kept)

    def _expire(self, kept: Blueprint) -> None:
        left_s = kept.used_s + IDLE_S - self._loop.clock_s()
        if left_s > 0:
            self._loop.after(left_s, lambda: self._expire(kept))
            return
        kept.watched = False
        self._drop(kept)

    def _drop(self, kept: Blueprint) -> None:
        """What stands, and what is on its way once it does."""
        kept.target = 0
        while kept.ready:
            self._lifecycle.kill(kept.ready.popleft(), "unused")
