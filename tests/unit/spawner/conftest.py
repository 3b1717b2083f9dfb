"""A whole spawner in the test's own process, with a double in the place of PID 1: real processes, no isolation."""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.contract import limits
from aether.contract.cellplan import ExecSpec, Plan
from aether.spawner.helper import HelperOptions
from aether.spawner.keeperlink import KeeperLink
from aether.spawner.launcher import InitEvent, LaunchFailedError
from aether.spawner.lifecycle import Lifecycle
from aether.spawner.linux.cgroup_host import open_driver
from aether.spawner.loop import Loop
from aether.spawner.operations import Operations
from aether.spawner.rules import Rules
from aether.spawner.server import Server
from aether.spawner.warm import Warm
from aether.spawner.workdir import WorkRoot
from aether.spawner.workops import WorkOps
from tests.support.machine import cgroups


def double_init(control: socket.socket, attach: tuple[int, ...], v2_fd: int | None) -> None:
    """PID 1's part: joins the cgroups, starts executables in their own sessions, reports their ends."""
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)
    libc.prctl(36, 1, 0, 0, 0)
    for fd in attach:
        os.write(fd, b"0")
    if v2_fd is not None:
        fd = os.open("cgroup.procs", os.O_WRONLY, dir_fd=v2_fd)
        os.write(fd, b"0")
    children: dict[int, str] = {}
    send = lambda **event: control.send(json.dumps(event).encode())  # noqa: E731
    send(kind="ready")
    while True:
        if select.select([control], [], [], 0.002)[0]:
            data, fds, _, _ = socket.recv_fds(control, 1 << 17, 32)
            if not data:
                os.kill(0, signal.SIGKILL)
            message = json.loads(data)
            if message["op"] == "exec":
                pid = os.fork()
                if pid == 0:
                    os.setsid()
                    run(message, fds)
                children[pid] = message["exec_id"]
                send(kind="started", exec_id=message["exec_id"], pid=pid)
                for fd in fds:
                    os.close(fd)
            else:
                for pid, name in children.items():
                    if name == message["exec_id"]:
                        os.killpg(pid, message["signo"])
        while children:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                break
            name = children.pop(pid, "")
            code = os.waitstatus_to_exitcode(status)
            rusage = {"utime_us": int(usage.ru_utime * 1e6), "stime_us": 0, "maxrss_kb": usage.ru_maxrss}
            if name:
                send(
                    kind="exited",
                    exec_id=name,
                    code=code if code >= 0 else None,
                    signal=-code if code < 0 else None,
                    rusage=rusage,
                )


def run(message: dict[str, Any], fds: list[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    given = iter(fds)
    high = [os.dup(next(given) if kind == "fd" else null) for kind in message["stdio"]]
    for number, fd in enumerate(high):
        os.dup2(fd, number)
    for number, fd in enumerate(given, 3):
        os.dup2(fd, number)
    os.closerange(3 + message["extra"], 4096)
    try:
        os.chdir(message["cwd"])
        os.execvpe(message["argv"][0], message["argv"], message["env"])
    except OSError:
        os._exit(127)


class DoubleRunning:
    """The spawner's side of the double."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid, self.pidfd, self.closed = pid, os.pidfd_open(pid), False
        self._control = control
        control.setblocking(False)

    def fileno(self) -> int:
        return self._control.fileno()

    def events(self) -> list[InitEvent]:
        found = []
        while not self.closed:
            try:
                data = self._control.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.closed = True
                break
            found.append(InitEvent(**json.loads(data)))
        return found

    def start(self, spec: ExecSpec, fds: tuple[int, ...]) -> None:
        message = {"op": "exec", "exec_id": spec.exec_id, "argv": spec.argv, "env": dict(spec.env), "cwd": spec.cwd}
        data = json.dumps(message | {"stdio": spec.stdio, "extra": spec.extra_fds}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._control.sendmsg([data], rights)

    def signal(self, exec_id: str, signo: int) -> None:
        self._control.send(json.dumps({"op": "signal", "exec_id": exec_id, "signo": signo}).encode())

    def close(self) -> None:
        self._control.close()


class DoubleLauncher:
    """Starts doubles; `fail` makes the next launch fail."""

    name = "double"

    def __init__(self) -> None:
        self.fail = ""

    def launch(
        self, plan: Plan, attach: tuple[int, ...], v2_fd: int | None, spec: ExecSpec | None, fds: tuple[int, ...]
    ) -> DoubleRunning:
        if self.fail:
            why, self.fail = self.fail, ""
            raise LaunchFailedError(why, "do not ask the double to fail")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            keep = sorted({theirs.fileno(), *attach, *([v2_fd] if v2_fd is not None else [])})
            low = 3
            for fd in keep:
                os.closerange(low, fd)
                low = fd + 1
            os.closerange(low, 4096)
            try:
                double_init(theirs, attach, v2_fd)
            finally:
                os._exit(1)
        theirs.close()
        running = DoubleRunning(pid, ours)
        if spec is not None:
            running.start(spec, fds)
        return running


class Rig:
    """The spawner's parts and a client of them; `call` turns the loop until the answer is there."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.loop = Loop()
        self.instance = os.urandom(4).hex()
        self.cgroups = open_driver(self.instance)
        (state / "logs").mkdir(parents=True)
        self.work = WorkRoot(str(state / "cells"))
        self.launcher = DoubleLauncher()
        self.server = Server(self.loop, frozenset({os.geteuid()}))
        self.work_ops = WorkOps(self.loop, self.work)
        self.lifecycle = Lifecycle(
            self.loop, self.cgroups, self.launcher, self.server.emit, self.work_ops.remove  # type: ignore[arg-type]
        )  # fmt: skip
        uid = 65534 if os.geteuid() == 0 else -1
        if uid > 0:
            os.chown(state / "logs", uid, uid)
        self.keeper = KeeperLink(self.loop, HelperOptions(str(state / "logs"), uid, uid), self.lifecycle.on_output)
        self.lifecycle.keeper = self.keeper
        rules = Rules(("/usr",), str(state), self.work.path)
        self.warm = Warm(self.loop, self.lifecycle, self.work_ops, self.work.path, lambda _: None)
        operations = Operations(
            self.lifecycle, self.cgroups, self.work_ops, self.warm, rules, lambda: {}, lambda: {"probed": True}
        )
        self.server.handle = operations.handle
        self.client = self.connect()

    def connect(self) -> Client:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server.adopt(theirs)
        return Client(self, ours)

    def until(self, true: Callable[[], bool], wait_s: float = 10.0) -> None:
        deadline = time.monotonic() + wait_s
        while not true():
            assert time.monotonic() < deadline, "it did not happen"
            self.loop.turn(0.05)

    def close(self) -> None:
        self.warm.end()
        for cell in list(self.lifecycle.cells.values()):
            self.lifecycle.kill(cell, "test")
        self.until(lambda: all(cell.state == "gone" for cell in self.lifecycle.cells.values()))
        self.server.close()
        self.keeper.close()
        self.cgroups.sweep(self.instance)
        self.cgroups.close()
        assert cgroups(f"aether-{self.instance}") == []


class Client:
    """A connection; replies are matched by id, events are kept in `events`."""

    def __init__(self, rig: Rig, sock: socket.socket) -> None:
        self._rig, self._sock, self._id = rig, sock, 0
        self._replies: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self.events: list[dict[str, Any]] = []
        sock.setblocking(False)
        self.call("hello", {"protocol_version": 1, "events": True})

    def send(self, op: str, args: dict[str, Any], fds: list[int] | None = None, key: str = "") -> int:
        self._id += 1
        data = json.dumps({"id": self._id, "op": op, "key": key, "args": args}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._sock.sendmsg([data], rights)
        return self._id

    def call(
        self, op: str, args: dict[str, Any], fds: list[int] | None = None, key: str = ""
    ) -> tuple[dict[str, Any], list[int]]:
        """`(ok, descriptors)`; a refusal is an AssertionError that names its code."""
        number = self.send(op, args, fds, key)
        self._rig.until(lambda: self.pump() or number in self._replies)
        reply, received = self._replies.pop(number)
        assert "ok" in reply, f"{reply['error']['code']}: {reply['error']['message']}"
        return reply["ok"], received

    def pump(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds, _, _ = socket.recv_fds(self._sock, limits.SPAWNER_MESSAGE_BYTES_MAX, 16)
                if not data:
                    break
                message = json.loads(data)
                if "ev" in message:
                    self.events.append(message)
                else:
                    self._replies[message["id"]] = (message, list(fds))
        return False

    def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields."""

        def find() -> dict[str, Any] | None:
            self.pump()
            for event in self.events:
                if event["ev"] == name and all(event.get(key) == value for key, value in fields.items()):
                    return event
            return None

        self._rig.until(lambda: find() is not None)
        found = find()
        assert found is not None
        return found

    def json(self, op: str, args: dict[str, Any]) -> Any:
        _, fds = self.call(op, args)
        with open(fds[0]) as file:
            return json.load(file)

    def close(self) -> None:
        self._sock.close()


def process_plan(cell_id: str, slot: int = 0) -> dict[str, Any]:
    """A plan without isolation, with ids that the rules allow."""
    if os.geteuid() == 0:
        first = limits.CELL_UID_BASE + slot * limits.CELL_UID_BLOCK
        ids = {"host_uid": first, "host_gid": first, "count": limits.CELL_UID_BLOCK}
    else:
        ids = {"host_uid": os.geteuid(), "host_gid": os.getegid(), "count": 1, "init_uid": 1000}
    return {
        "cell_id": cell_id,
        "level": "process",
        "namespaces": [],
        "id_map": ids,
        "hostname": "cell",
        "steps": [],
        "seccomp_profile": "offline",
        "landlock": None,
    }


def create_args(cell_id: str, argv: list[str], slot: int = 0, **more: Any) -> dict[str, Any]:
    executable = {
        "spec": {"exec_id": f"exec_{cell_id}", "argv": argv, "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/"},
        "stdio": ["null", "log", "log"],
    } | more.pop("exec", {})
    return {"plan": process_plan(cell_id, slot), "limits": {}, "exec": executable, "once": True} | more


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def create() -> Callable[..., dict[str, Any]]:
    return create_args
