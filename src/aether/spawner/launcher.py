"""Between the executor that starts PID 1 and the lifecycle: PID 1's messages as facts and readable reasons."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from aether.contract.cellplan import NAMESPACES, ExecSpec, Plan, PlanError
from aether.spawner.linux import initwire
from aether.spawner.linux.executor import Attach, Executor, LaunchError
from aether.spawner.linux.oci import OciExecutor
from aether.spawner.linux.remedies import explain_exec, explain_step

SECCOMP_FILTER = 2
"""Of /proc/pid/status, proc(5)."""


class LaunchFailedError(Exception):
    """PID 1 could not be started; `remedy` says what helps."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class InitEvent:
    """One message of PID 1: `kind` is ready, step_failed, started, exec_failed or exited; `container`, before them,
    names the process in which an OCI runtime's container lives."""

    kind: str
    exec_id: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    remedy: str = ""
    pid: int | None = None
    code: int | None = None
    signal: int | None = None
    rusage: dict[str, int] | None = None


class Running:
    """A cell's PID 1: its pid, pidfd and control socket. `pidfd` is the caller's to close."""

    def __init__(self, pid: int, pidfd: int, control: socket.socket, plan: Plan, executor: str) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.closed = False
        self._container: initwire.Container | None = None
        self._held: list[initwire.Event] = []
        self._control = control
        self._plan = plan
        self._executor = executor

    def open_inside(self) -> int:
        """A pidfd, the caller's, of a process in the cell's namespaces: PID 1, or behind a shim that of its container,
        which is known by its network namespace since a pid may be used again. Raises OSError."""
        outside = self._container
        if outside is None:
            return os.dup(self.pidfd)
        pidfd = os.pidfd_open(outside.pid)
        try:
            found = os.stat(f"/proc/{outside.pid}/ns/net").st_ino  # noqa: PTH116
            if found != outside.namespaces["net"]:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        except OSError:
            os.close(pidfd)
            raise
        return pidfd

    def fileno(self) -> int:
        return self._control.fileno()

    def events(self) -> list[InitEvent]:
        """What has arrived; sets `closed` at PID 1's end."""
        found: list[InitEvent] = []
        while not self.closed:
            try:
                event = initwire.receive(self._control)
            except BlockingIOError:
                break
            except (OSError, initwire.WireError):
                event = None
            if event is None:
                self.closed = True
            else:
                found += [self._read(each) for each in self._in_order(event)]
        return found

    def _in_order(self, event: initwire.Event) -> list[initwire.Event]:
        """What is said from inside a container waits for what is said of it from outside."""
        outside = isinstance(event, initwire.Container | initwire.RuntimeRefused)
        if self._plan.driver == "native" or self._container is not None or outside:
            held, self._held = self._held, []
            return [event, *held]
        self._held.append(event)
        return []

    def _read(self, event: initwire.Event) -> InitEvent:
        match event:
            case initwire.Ready():
                return InitEvent("ready", report=self._report(event))
            case initwire.Container():
                self._container = event
                return InitEvent("container", pid=event.pid)
            case initwire.RuntimeRefused():
                why = f"cannot start cell: {event.why}"
                return InitEvent("step_failed", why=why, remedy="see `aether doctor`, or use the native driver")
            case initwire.StepFailed():
                why, remedy = explain_step(self._plan, event)
                return InitEvent("step_failed", why=why, remedy=remedy)
            case initwire.Started():
                return InitEvent("started", event.exec_id, pid=event.pid, report=asdict(event.enforced))
            case initwire.ExecFailed():
                why, remedy = explain_exec(event)
                return InitEvent("exec_failed", event.exec_id, why=why, remedy=remedy)
            case initwire.Exited():
                rusage = {"utime_us": event.utime_us, "stime_us": event.stime_us, "maxrss_kb": event.maxrss_kb}
                return InitEvent("exited", event.exec_id, code=event.code, signal=event.signal, rusage=rusage)

    def _report(self, event: initwire.Ready) -> dict[str, Any]:
        """What PID 1 found. Of a container its namespaces are told as seen from outside."""
        outside = self._container
        shown = event.namespaces if outside is None else outside.namespaces
        seen = {name: shown.get(name) or None for name in NAMESPACES}
        report = {
            "executor": self._executor,
            "driver": self._plan.driver,
            "level": self._plan.level,
            "namespaces": {name: seen[name] for name in NAMESPACES if seen[name] and seen[name] != _HOST[name]},
            "landlock_abi": event.landlock_abi if self._plan.landlock is not None else 0,
            "setup_us": event.setup_us if outside is None else outside.setup_us,
            "seccomp_profile": self._plan.seccomp_profile,
        }
        if self._plan.level == "gvisor" and outside is not None:
            own = [name for name in NAMESPACES if event.namespaces.get(name)]
            report["sandbox"] = {"seccomp": outside.seccomp_mode == SECCOMP_FILTER, "namespaces": own}
        return report

    def start(self, spec: ExecSpec, fds: tuple[int, ...]) -> None:
        initwire.send_exec(self._control, spec, fds)

    def signal(self, exec_id: str, signo: int) -> None:
        initwire.send_signal(self._control, exec_id, signo)

    def close(self) -> None:
        self._control.close()


class Launcher:
    """The executors, by the driver that a plan names."""

    def __init__(self, executor: Executor, others: Mapping[str, Executor] = MappingProxyType({})) -> None:
        self._executor = executor
        self._others = others

    @property
    def name(self) -> str:
        return self._executor.name

    def bundle(self, plan: Plan) -> dict[str, Any]:
        """The config.json of a plan for an OCI runtime; raises LaunchFailedError, also for a plan of another driver."""
        executor = self._others.get(plan.driver)
        if not isinstance(executor, OciExecutor):
            raise LaunchFailedError(f"cannot make a bundle: {plan.driver} takes none", "see `aether doctor`")
        try:
            return executor.bundle(plan)
        except LaunchError as error:
            raise LaunchFailedError(str(error), error.remedy) from error

    def launch(
        self, plan: Plan, attach_fds: tuple[int, ...], v2_fd: int | None, spec: ExecSpec | None, fds: tuple[int, ...]
    ) -> Running:
        """Raises LaunchFailedError."""
        executor = self._executor if plan.driver == "native" else self._others.get(plan.driver)
        if executor is None:
            why = f"cannot start the cell: there is no {plan.driver} here"
            raise LaunchFailedError(why, "see `aether doctor` for the drivers of this host")
        try:
            launched = executor.launch(plan, Attach(attach_fds, v2_fd), spec, fds)
        except LaunchError as error:
            raise LaunchFailedError(str(error), error.remedy) from error
        except OSError as error:
            raise LaunchFailedError(f"cannot start the cell: {error.strerror}", "") from error
        except PlanError as error:
            raise LaunchFailedError(str(error), "see `aether doctor` for what this host can enforce") from error
        return Running(launched.pid, launched.pidfd, launched.control, plan, executor.name)

    def pids(self) -> frozenset[int]:
        """Children of this process that are the executor's own."""
        return self._executor.pids()

    def close(self) -> None:
        for executor in (self._executor, *self._others.values()):
            executor.close()


def _own_namespaces() -> dict[str, int]:
    found: dict[str, int] = {}
    for name in NAMESPACES:
        try:
            found[name] = os.stat(f"/proc/self/ns/{name}").st_ino  # noqa: PTH116
        except OSError:
            found[name] = 0
    return found


_HOST = _own_namespaces()
