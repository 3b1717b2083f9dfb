"""The descriptors of one executable: those that came with the request, and the pipes of its output."""

from __future__ import annotations

import os

from aether.contract.cellplan import ExecSpec
from aether.spawner.protocol import RefusedError
from aether.spawner.terminal import Line, open_input, open_terminal


class Wired:
    """An executable and its descriptors in the order PID 1 wants them. `logs` maps a stream to its read end; `line`
    is the outer side of its terminal or standard input, until somebody takes it.

    It borrows `passed`, which belong to the request until `own` is called, and owns the pipes it makes.
    """

    def __init__(self, spec: ExecSpec, stdio: list[str], passed: tuple[int, ...]) -> None:
        """Raises RefusedError when the descriptors do not match the specification."""
        if len(passed) != spec.fd_count - sum(stdio.count(kind) for kind in ("log", "tty", "pipe")):
            raise RefusedError("PROTOCOL", f"cannot start {spec.exec_id}: {len(passed)} descriptors came with it")
        self.spec = spec
        self.logs: dict[int, int] = {}
        self.line: Line | None = None
        self._passed = passed
        self._own: list[int] = []
        rest = iter(passed)
        fds: list[int] = []
        if stdio[0] in ("tty", "pipe"):
            self.line, inner = open_terminal() if stdio[0] == "tty" else open_input()
            self._own.append(inner)
            fds += [inner] * stdio.count(stdio[0])
        for number, kind in enumerate(stdio):
            if kind == "fd":
                fds.append(next(rest))
            elif kind == "log":
                read_end, write_end = os.pipe2(os.O_CLOEXEC)
                self.logs[number - 1] = read_end
                self._own.append(write_end)
                fds.append(write_end)
        self.fds = (*fds, *rest)

    def own(self) -> Wired:
        """From now on `close` closes the passed descriptors too."""
        self._own += self._passed
        self._passed = ()
        return self

    def take_line(self) -> Line | None:
        line, self.line = self.line, None
        return line

    def close(self) -> None:
        if self.line is not None:
            self.line.close()
        for fd in (*self._own, *self.logs.values()):
            os.close(fd)
        self._own, self.logs = [], {}
