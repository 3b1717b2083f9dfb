"""Which command job may start: tenants take turns, first in, first out within each, with a bound on jobs that occupy a
cell. Pure bookkeeping.

A job occupies a place from its claim until its executable ended and its outputs were collected. A tenant that has a
thousand jobs waiting delays one that has one by a single turn.
"""

from __future__ import annotations

from collections import OrderedDict

from aether.contract.store import Phase

OCCUPYING: frozenset[Phase] = frozenset({"launching", "running", "collecting"})


class Scheduler:
    """Holds ids only. Nothing is claimed while `paused`: before reconciliation nobody knows what runs."""

    def __init__(self, running_max: int) -> None:
        self.running_max = running_max
        self.paused = True
        self._queues: OrderedDict[str, dict[str, None]] = OrderedDict()
        """By tenant, the next turn first; none is empty."""
        self._tenants: dict[str, str] = {}
        """Of the jobs that wait."""
        self._running: set[str] = set()

    def __repr__(self) -> str:
        return f"<Scheduler waiting={len(self._tenants)} running={len(self._running)}/{self.running_max}>"

    @property
    def waiting(self) -> int:
        return len(self._tenants)

    @property
    def running(self) -> int:
        return len(self._running)

    def enqueue(self, job_id: str, tenant_id: str) -> None:
        """At the end of its tenant's queue; a job that waits already keeps its place."""
        if job_id not in self._running and job_id not in self._tenants:
            self._tenants[job_id] = tenant_id
            self._queues.setdefault(tenant_id, {})[job_id] = None

    def moved(self, job_id: str, phase: Phase) -> None:
        """Keeps the books when a command job is in `phase`."""
        if phase in OCCUPYING:
            self._unqueue(job_id)
            self._running.add(job_id)
        elif phase != "queued":
            self.forget(job_id)

    def forget(self, job_id: str) -> None:
        self._unqueue(job_id)
        self._running.discard(job_id)

    def claim(self) -> str | None:
        """The next job to claim, which then occupies a place; None when none waits or all places are taken."""
        if self.paused or not self._queues or len(self._running) >= self.running_max:
            return None
        tenant_id, queue = next(iter(self._queues.items()))
        job_id = next(iter(queue))
        self._queues.move_to_end(tenant_id)
        self._unqueue(job_id)
        self._running.add(job_id)
        return job_id

    def _unqueue(self, job_id: str) -> None:
        tenant_id = self._tenants.pop(job_id, None)
        if tenant_id is not None:
            queue = self._queues[tenant_id]
            del queue[job_id]
            if not queue:
                del self._queues[tenant_id]
