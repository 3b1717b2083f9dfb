"""`python -m aether.spawner.main`: the privileged launcher, parent of every cell.

Start: lock the state directory, take a new instance id, sweep what dead instances left (only names that carry an
id noted in `cells/.instances`), start the keeper, listen. End (SIGTERM, SIGINT): kill the cells, tell their
clients, remove cgroups and work directories. A killed spawner needs no help: every PID 1 has PDEATHSIG SIGKILL.

On disk below --state: `run/spawner.sock` (0600, the peer's), `cells/` (the spawner's own: `.lock` with a flock,
`.instances` with one id per line, this one last, `<instance>/<cell>` work directories), `logs/jobs/<cell>/` (the
keeper's). `run/` belongs to aetherd: nothing in it is opened or followed by name.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gc
import os
import re
import resource
import signal
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aether.contract import limits
from aether.spawner.ahead import Ahead
from aether.spawner.cells import now_wall_us
from aether.spawner.disk import Disk, projects_of
from aether.spawner.helper import HelperOptions
from aether.spawner.keeperlink import KeeperLink
from aether.spawner.launcher import Launcher
from aether.spawner.lifecycle import Lifecycle
from aether.spawner.linux import idspace, subordinate
from aether.spawner.linux.cgroup_host import open_driver
from aether.spawner.linux.executors import best_executor, oci_executors
from aether.spawner.linux.oci import drivers_here
from aether.spawner.linux.probe import probe as probe_host
from aether.spawner.linux.sched import missing as sched_missing
from aether.spawner.linux.userns import Blocks
from aether.spawner.loop import Loop
from aether.spawner.observerlink import ObserverLink
from aether.spawner.offload import offload
from aether.spawner.operations import Operations
from aether.spawner.orphans import Orphans
from aether.spawner.rules import Rules, host_devices
from aether.spawner.server import Server
from aether.spawner.tracing import Tracer
from aether.spawner.upkeep import Upkeep
from aether.spawner.warm import Warm
from aether.spawner.workdir import WorkRoot, remove_tree
from aether.spawner.workops import WorkOps

STOP_WAIT_S = 5.0
HOST_FACTS = ("missing", "landlock_abi", "root_steps", "landlock_rules", "python")
_INSTANCE = re.compile(r"[0-9a-f]{8}")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class StartError(Exception):
    """Why the spawner cannot start."""


def read_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="aether-spawner")
    parser.add_argument("--state", required=True, help="the state directory")
    parser.add_argument("--root", action="append", default=[], help="a host directory that cells may see")
    parser.add_argument("--socket", help="path to listen on (default: run/spawner.sock below the state directory)")
    parser.add_argument("--socket-fd", type=int, help="a listening SOCK_SEQPACKET socket to use instead")
    parser.add_argument("--peer-uid", type=int, default=-1, help="who may connect besides this uid; owns the path")
    parser.add_argument("--keeper-uid", type=int, default=limits.DAEMON_UID_BASE + 3)
    parser.add_argument("--gid", type=int, default=limits.DAEMON_UID_BASE, help="the group of the daemons")
    parser.add_argument("--cgroup-base", help="a delegated cgroup v2 directory to work below")
    parser.add_argument("--executor", choices=("auto", "native", "portable"), default="auto")
    return parser.parse_args(argv)


class Spawner:
    """The composed process; `run` returns when it was told to end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._state = Path(options.state).resolve()
        self._ids = idspace.here()
        self._root = self._ids.kind == "root"
        self._prepare_state(options)
        self._lock = self._take_lock()
        self.instance = os.urandom(4).hex()
        old = self._note_instance()
        self._host = probe_host()
        self._drivers = drivers_here(os.environ)
        asked = [str(Path(root).resolve()) for root in options.root]
        rules = Rules(
            tuple(dict.fromkeys((*self._host["source_roots"], *asked))),
            str(self._state),
            str(self._state / "cells" / self.instance),
            host_devices(),
        )
        self.loop = Loop()
        roots = (*rules.roots, rules.work)
        blocks = Blocks()
        self.launcher = Launcher(best_executor(roots, options.executor, blocks), oci_executors(roots))
        self.work = WorkRoot(rules.work)
        self.cgroups = open_driver(self.instance, options.cgroup_base, str(self._state))
        for left in old:
            self.cgroups.sweep(left)
        self.server = Server(self.loop, frozenset({os.geteuid(), 0, options.peer_uid} - {-1}))
        projects = projects_of(self.work.fileno(), self.instance) if self._root else None
        work_ops = WorkOps(self.loop, self.work, projects)
        self.lifecycle = Lifecycle(self.loop, self.cgroups, self.launcher, self.server.emit, work_ops.remove)
        helpers = HelperOptions(str(self._state / "logs/jobs"))
        if self._root:
            helpers = HelperOptions(helpers.directory, options.keeper_uid, options.gid)
        self.keeper = self.lifecycle.keeper = KeeperLink(self.loop, helpers, self.lifecycle.on_output)
        self.observer = self.lifecycle.observer = ObserverLink(self.loop, helpers)
        self.tracer = Tracer(self.loop, self.observer)
        watching = replace(helpers, directory=rules.work)
        self.disk = self.lifecycle.disk = Disk(
            self.loop, watching, self.lifecycle.cells, work_ops.trees, projects, self.lifecycle.kill
        )
        self._work_ops = work_ops
        self._sweeper = -1
        Upkeep(self.loop, self.cgroups, self.lifecycle.cells, self.server.emit).start()
        self.lifecycle.orphans = Orphans(self._children)
        self.warm = Warm(self.loop, self.lifecycle, work_ops, rules.work, Ahead(self.loop, blocks).start)
        operations = Operations(self.lifecycle, self.cgroups, work_ops, self.warm, rules, self._facts, self._probe)
        operations.tracer = self.tracer
        self.server.handle = operations.handle
        self._started_wall_us = now_wall_us()
        self._listener = self._listen(options)
        self.server.listen(self._listener)
        self._catch_signals()
        self._sweep_work(old)

    def _prepare_state(self, options: argparse.Namespace) -> None:
        for name in ("run", "cells", "logs/jobs"):
            (self._state / name).mkdir(0o750, parents=True, exist_ok=True)
        (self._state / "cells").chmod(0o711)  # at level `process` a job walks to its own directory below
        if self._root:
            os.chown(self._state / "logs/jobs", options.keeper_uid, options.gid)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # Orphans of a cell without a pid namespace come to us and not to the host's init.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _take_lock(self) -> int:
        lock = os.open(self._state / "cells/.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError(f"cannot start: another spawner uses {self._state}") from error
        return lock

    @property
    def _instances(self) -> Path:
        return self._state / "cells/.instances"

    def _note_instance(self) -> list[str]:
        """Append this instance's id before anything carries it; the ids of dead instances."""
        text = self._instances.read_text() if self._instances.exists() else ""
        old = [word for word in text.split() if _INSTANCE.fullmatch(word)]
        self._write_instances([*old, self.instance])
        return old

    def _write_instances(self, ids: list[str]) -> None:
        new = self._instances.with_suffix(".new")
        new.write_text("".join(f"{name}\n" for name in ids))
        new.replace(self._instances)

    def _sweep_work(self, old: list[str]) -> None:
        """Remove dead instances' work directories in a child, then forget their ids."""
        if not old:
            return
        cells = os.open(self._state / "cells", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

        def remove() -> None:
            for name in old:
                remove_tree(cells, name)

        child = offload(remove, (cells,))
        self._sweeper = child.pid
        os.close(cells)

        def ended(_: int) -> None:
            self.loop.remove(child.pidfd)
            if child.finish():
                self._write_instances([self.instance])
            os.close(child.answer)

        self.loop.add(child.pidfd, ended)

    def _listen(self, options: argparse.Namespace) -> socket.socket:
        self._socket_path: Path | None = None
        if options.socket_fd is not None:
            os.set_inheritable(options.socket_fd, False)
            return socket.socket(fileno=options.socket_fd)
        path = self._socket_path = Path(options.socket) if options.socket else self._state / "run/spawner.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        if self._root and options.peer_uid >= 0:
            os.chown(path, options.peer_uid, -1, follow_symlinks=False)
        listener.listen(16)
        return listener

    def _catch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._wakeup = (ours, theirs)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for signo in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signo, lambda *_: None)
        self.loop.add(ours.fileno(), lambda _: self.loop.stop())

    def _children(self) -> set[int]:
        """The children that are no orphans of cells."""
        inits = {cell.launched.pid for cell in self.lifecycle.cells.values() if cell.pidfd >= 0}
        return (
            inits
            | self._work_ops.children
            | self.launcher.pids()
            | {self.keeper.pid, self.observer.pid, self.disk.pid, self._sweeper}
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "instance": self.instance,
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "gid": os.getegid(),
            "ids": asdict(self._ids),
            "started_wall_us": self._started_wall_us,
            "work_root": self.work.path,
            "logs": str(self._state / "logs/jobs"),
            "executor": self.launcher.name,
            "drivers": self._drivers,
            "python": sys.executable,
            "host": {name: self._host[name] for name in HOST_FACTS},
            "cgroup": self.cgroups.probe(),
            "sched": {"missing": sched_missing()},
            "observer": self.observer.facts(),
        }

    def _probe(self) -> dict[str, Any]:
        return {**probe_host(), "cgroup_driver": self.cgroups.probe(), "warm": self.warm.facts()}

    def run(self) -> None:
        # What is alive now lives as long as the process: no collection in the middle of a launch walks it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        self.loop.run()
        self._end()

    def _end(self) -> None:
        self.loop.remove(self._listener.fileno())
        self.loop.remove(self._wakeup[0].fileno())  # told once: it would wake every turn that waits for the cells
        self.warm.end()
        for cell in list(self.lifecycle.cells.values()):
            self.lifecycle.kill(cell, "spawner-stopped")
        deadline = self.loop.clock_s() + STOP_WAIT_S
        while any(cell.state != "gone" for cell in self.lifecycle.cells.values()):
            if self.loop.clock_s() > deadline:
                break
            self.loop.turn(0.1)
        self.server.close()
        self.keeper.close()
        self.tracer.close()
        self.observer.close()
        self.disk.close()
        self.launcher.close()
        self.cgroups.sweep(self.instance)
        self.cgroups.close()
        cells = os.open(self._state / "cells", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):
            remove_tree(cells, self.instance)
        os.close(cells)
        self.work.close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
        self._write_instances([])


def die_with_parent() -> None:
    """SIGTERM when the supervisor dies: an orphan would hold the state directory against the next instance."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the supervisor is gone")


def main(argv: list[str] | None = None) -> int:
    options = read_options(sys.argv[1:] if argv is None else argv)
    if subordinate.enter():
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    die_with_parent()
    try:
        spawner = Spawner(options)
    except (StartError, OSError) as error:
        print(f"aether-spawner: {error}", file=sys.stderr)
        return 1
    spawner.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
