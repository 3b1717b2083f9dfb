"""A prepared cell with a started interpreter in it, which becomes the job's executable when the cell is taken.

The interpreter (`runtime/zygote.py`) runs as the executable NAME of the cell from the moment the cell is prepared.
It waits for one order on its descriptor 3: argv, env and cwd as JSON in one SOCK_SEQPACKET message, with the
descriptors of stdin, stdout and stderr. It serves that one job and is never used again, so no two jobs share an
interpreter, and the kernel has confined it as any executable before it ran its first line.

`ZygoteRunning` stands in the place of `launcher.Running`: to the lifecycle the cell is ready when the interpreter
runs, and the job's executable has started at once.
"""

from __future__ import annotations

import array
import json
import os
import socket
from dataclasses import replace
from typing import Any

from aether.contract.cellplan import ExecSpec
from aether.spawner.launcher import InitEvent, Running
from aether.spawner.protocol import RefusedError
from aether.spawner.rules import exec_spec
from aether.spawner.wiring import Wired

NAME = "zygote"
_STDIO = ["null", "null", "null"]


def read_zygote(value: Any) -> ExecSpec | None:
    """The interpreter of a blueprint, without stdio; raises RefusedError BAD_PLAN."""
    if value is None:
        return None
    spec = exec_spec(value, _STDIO)
    if spec.exec_id != NAME or spec.extra_fds != 1:
        raise RefusedError("BAD_PLAN", f"cannot use the zygote: it is named {NAME} and takes one descriptor")
    return spec


def wire_zygote(spec: ExecSpec) -> tuple[Wired, socket.socket]:
    """The interpreter with its end of the channel, and ours."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return Wired(spec, _STDIO, (theirs.detach(),)).own(), ours


class ZygoteRunning:
    """See the module head; wraps the PID 1 of a cell that was launched with `wire_zygote`."""

    def __init__(self, inner: Running, channel: socket.socket) -> None:
        self._inner = inner
        self._channel = channel
        self._ready: InitEvent | None = None
        self._started: InitEvent | None = None
        self._exec_id: str | None = None

    @property
    def pid(self) -> int:
        return self._inner.pid

    @property
    def closed(self) -> bool:
        return self._inner.closed

    def fileno(self) -> int:
        return self._inner.fileno()

    def open_inside(self) -> int:
        return self._inner.open_inside()

    def events(self) -> list[InitEvent]:
        """PID 1's events as those of the job's executable; `started` as soon as there is both a job and a process."""
        found: list[InitEvent] = []
        for event in self._inner.events():
            found += self._read(event)
        return found + self._job_started() if self._exec_id is not None else found

    def _job_started(self) -> list[InitEvent]:
        event, self._started = self._started, None
        return [replace(event, exec_id=self._exec_id or "")] if event is not None else []

    def _read(self, event: InitEvent) -> list[InitEvent]:
        if event.kind == "ready":
            self._ready = event
            return []
        if event.exec_id != NAME:
            return [event]
        if event.kind == "started" and self._ready is not None:
            self._started = event
            return [replace(self._ready, report={**self._ready.report, "process": event.report})]
        if self._exec_id is not None:
            return [*self._job_started(), replace(event, exec_id=self._exec_id)]
        why = event.why or "its interpreter ended before it was used"
        return [InitEvent("step_failed", why=f"cannot start the cell: {why}", remedy=event.remedy)]

    def start(self, spec: ExecSpec, fds: tuple[int, ...]) -> None:
        """The order, once; raises OSError. `argv[0]` is the interpreter, which is there; /dev/null fills its stdio."""
        if self._exec_id is not None:
            self._inner.start(spec, fds)
            return
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        try:
            given = iter(fds)
            stdio = [next(given) if kind == "fd" else null for kind in spec.stdio]
            order = json.dumps({"argv": spec.argv[1:], "env": dict(spec.env), "cwd": spec.cwd}).encode()
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", stdio))]
            self._channel.sendmsg([order], rights, socket.MSG_NOSIGNAL)
        finally:
            os.close(null)
        self._exec_id = spec.exec_id
        self._channel.close()

    def signal(self, exec_id: str, signo: int) -> None:
        self._inner.signal(NAME if exec_id == self._exec_id else exec_id, signo)

    def close(self) -> None:
        self._channel.close()
        self._inner.close()
