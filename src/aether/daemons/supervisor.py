"""`aether up`: starts the roles, starts them again when they die, stops them in order.

Roles: spawner (with its keeper), aetherd, aurorad, egressd, each a child process with a log under `logs/daemon/`.
aetherd and aurorad may die and return while cells live; when the spawner dies its cells die with it. A role
that keeps dying is restarted with growing pauses, never given up on: the API answers 503 meanwhile.

Lifetime: holds the instance's lock (`presence`); ends on SIGTERM or SIGINT after stopping egressd, aurorad, aetherd
and the spawner (which kills its cells), in that order. The roles die with it (PDEATHSIG).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.paths import Layout, state_dir
from aether.contract.secrets import SECRET_VARIABLE
from aether.contract.spiffe import ENDPOINT_VARIABLE
from aether.daemons import presence, samples
from aether.daemons.accounts import Accounts, accounts, prepare
from aether.spawner.linux.probe import probe

_RESTART_PAUSE_S: Final = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0)
_STEADY_S: Final = 10.0
_STOP_GRACE_S: Final = 5.0
ROLES: Final = ("spawner", "aetherd", "aurorad", "egressd")
_SPIRED: Final = "spired"
"""Beside them only where the SPIFFE Workload API is configured."""


@dataclass(slots=True)
class Role:
    """A role's process and its restarts."""

    name: str
    argv: list[str]
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    started: float = 0.0
    failures: int = 0
    restart_at: float | None = field(default=0.0)


class Supervisor:
    """The parent of the roles; `run` blocks until a signal."""

    def __init__(self, layout: Layout, who: Accounts) -> None:
        self._layout = layout
        self._started_epoch_s = int(time.time())
        self._roles = {name: Role(name, role_argv(name, layout, who)) for name in roles(os.environ)}
        self._selector = selectors.DefaultSelector()
        self._wake, wake_writer = socket.socketpair()
        self._wake.setblocking(False)
        wake_writer.setblocking(False)
        self._wake_writer = wake_writer
        self._stopping = False

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake_writer.fileno())
        for signo in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signo, lambda *_: setattr(self, "_stopping", True))
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._write_instance()
        while not self._stopping:
            self._start_due()
            for key, _ in self._selector.select(self._pause_s()):
                if key.fileobj is self._wake:
                    self._wake.recv(64)
                else:
                    self._ended(self._roles[key.data])
        self._stop_all()

    def _start_due(self) -> None:
        now = time.monotonic()
        for role in self._roles.values():
            if role.restart_at is None or role.restart_at > now:
                continue
            with open(self._layout.daemon_logs / f"{role.name}.log", "ab") as log:
                role.process = subprocess.Popen(
                    role.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment(role.name)
                )
            role.pidfd = os.pidfd_open(role.process.pid)
            role.started, role.restart_at = now, None
            self._selector.register(role.pidfd, selectors.EVENT_READ, role.name)
            self._write_instance()

    def _ended(self, role: Role) -> None:
        assert role.process is not None
        self._selector.unregister(role.pidfd)
        os.close(role.pidfd)
        code = role.process.wait()
        now = time.monotonic()
        role.failures = 0 if now - role.started > _STEADY_S else role.failures + 1
        pause = _RESTART_PAUSE_S[min(role.failures, len(_RESTART_PAUSE_S) - 1)]
        role.process, role.restart_at = None, now + pause
        _say("role ended", level="warning", name=role.name, code=code)

    def _pause_s(self) -> float | None:
        due = [role.restart_at for role in self._roles.values() if role.restart_at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _stop_all(self) -> None:
        for role in reversed(self._roles.values()):
            process = role.process
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        presence.withdraw(self._layout)

    def _write_instance(self) -> None:
        pids = {role.name: role.process.pid for role in self._roles.values() if role.process is not None}
        facts = {
            "pid": os.getpid(),
            "roles": pids,
            "quick_ends": {role.name: role.failures for role in self._roles.values() if role.failures},
            "started_epoch_s": self._started_epoch_s,
        }
        try:
            presence.announce(self._layout, facts)
        except OSError as error:  # on a full disk the file is late; the lock says that we are here
            _say("cannot write the instance file", level="warning", reason=str(error))


def roles(env: Mapping[str, str]) -> tuple[str, ...]:
    """The roles to run, in order of their start."""
    return (*ROLES, _SPIRED) if env.get(ENDPOINT_VARIABLE) else ROLES


def environment(name: str) -> dict[str, str]:
    """A role's environment: credentials are for egressd alone."""
    return {key: value for key, value in os.environ.items() if name == "egressd" or not key.startswith(SECRET_VARIABLE)}


def role_argv(name: str, layout: Layout, who: Accounts) -> list[str]:
    """The command line of a role."""
    python = [sys.executable, "-m"]
    if name == "spawner":
        return [
            *python,
            "aether.spawner.main",
            *("--state", str(layout.root)),
            *("--peer-uid", str(who.aetherd)),
            *("--keeper-uid", str(who.keeper), "--gid", str(who.gid)),
            *(word for root in cell_roots(layout) for word in ("--root", str(root))),
        ]
    uid = getattr(who, name)
    return [*python, f"aether.daemons.{name}", "--state", str(layout.root), "--uid", str(uid), "--gid", str(who.gid)]


def cell_roots(layout: Layout) -> tuple[Path, ...]:
    """Host directories that cells may see, besides what the spawner itself provides."""
    return (layout.models, layout.trusted_keys, layout.images)


def _say(event: str, **facts: str | int) -> None:
    """A line as the roles log them (aether.telemetry.logs), without their libraries: this process stays small."""
    with contextlib.suppress(OSError):  # a full disk must not end the instance
        print(json.dumps({"role": "supervisor", "event": event, **facts}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="aether-supervisor")
    parser.add_argument("--state", type=Path)
    asked = parser.parse_args()
    layout = Layout(asked.state or state_dir(os.environ, os.getuid(), Path.home()))
    who = accounts(os.getuid(), os.getgid())
    _say("started", level="info", pid=os.getpid())
    try:
        prepare(layout, who, by_path=who.split and "cell" in probe()["missing"])
        presence.acquire(layout)  # the descriptor stays open until this process ends
        samples.install(layout, who)
        Supervisor(layout, who).run()
    except AetherError as error:
        _say("cannot run", level="error", code=error.code, reason=error.message, remedy=error.remedy)
        raise SystemExit(error.kind.exit) from error


if __name__ == "__main__":
    main()
