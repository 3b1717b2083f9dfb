"""Which command job may start: first in, first out, with a bound on jobs that occupy a cell. Pure bookkeeping.

A job occupies a place from its claim until its executable ended and its outputs were collected.
"""

from __future__ import annotations

from aether.contract.store import Phase

OCCUPYING: frozenset[Phase] = frozenset({"launching", "running", "collecting"})


class Scheduler:
    """Holds ids only. Nothing is claimed while `paused`: before reconciliation nobody knows what runs."""

    def __init__(self, running_max: int) -> None:
        self.running_max = running_max
        self.paused = True
        self._waiting: dict[str, None] = {}
        self._running: set[str] = set()

    def __repr__(self) -> str:
        return f"<Scheduler waiting={len(self._waiting)} running={len(self._running)}/{self.running_max}>"

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def enqueue(self, job_id: str) -> None:
        """At the end of the queue; a job that waits already keeps its place."""
        if job_id not in self._running:
            self._waiting.setdefault(job_id)

    def moved(self, job_id: str, phase: Phase) -> None:
        """Keeps the books when a command job is in `phase`."""
        if phase in OCCUPYING:
            self._waiting.pop(job_id, None)
            self._running.add(job_id)
        elif phase != "queued":
            self.forget(job_id)

    def forget(self, job_id: str) -> None:
        self._waiting.pop(job_id, None)
        self._running.discard(job_id)

    def claim(self) -> str | None:
        """The next job to claim, which then occupies a place; None when none waits or all places are taken."""
        if self.paused or not self._waiting or len(self._running) >= self.running_max:
            return None
        job_id = next(iter(self._waiting))
        del self._waiting[job_id]
        self._running.add(job_id)
        return job_id
