"""Terminals of executables that nobody is attached to yet, or that ended before somebody was.

A short command may be over before its client has asked for its terminal. What it wrote lies in the terminal's buffer
as long as somebody holds the outer side (pty(7)), so the authority holds it from the start, and for KEPT_S after.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Final

KEPT_S: Final = 15.0


@dataclass(slots=True)
class Held:
    """A terminal, and whose it is: the job's tenant and the name of its cell."""

    fd: int
    tenant_id: str
    cell: str
    timer: asyncio.TimerHandle | None = None


class Lines:
    """By job; each is taken once."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    def __repr__(self) -> str:
        return f"<Lines {len(self._held)}>"

    def keep(self, job_id: str, held: Held) -> None:
        self.drop(job_id)
        self._held[job_id] = held

    def find(self, job_id: str) -> Held | None:
        return self._held.get(job_id)

    def take(self, job_id: str) -> int | None:
        """The descriptor, the caller's from now on."""
        held = self._held.pop(job_id, None)
        if held is None:
            return None
        if held.timer is not None:
            held.timer.cancel()
        return held.fd

    def ended(self, job_id: str) -> None:
        """The executable is over: its terminal is kept a little while."""
        held = self._held.get(job_id)
        if held is not None and held.timer is None:
            held.timer = asyncio.get_running_loop().call_later(KEPT_S, self.drop, job_id)

    def drop(self, job_id: str) -> None:
        fd = self.take(job_id)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        for job_id in list(self._held):
            self.drop(job_id)
