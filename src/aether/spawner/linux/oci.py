"""Cells by an installed OCI runtime: runc and crun (level `cell`), runsc (level `gvisor`).

The executor protocol of `executor` over a shim per cell (`oci_shim`): the shim is the child that is held as PID 1,
the control socket goes on to aether-init inside the container, and so executables, signals, ends, logs, limits and
usage are those of every cell. What the runtime made is read back from /proc (`initwire.Container`).

A runtime is found in PATH or named by AETHER_OCI_RUNTIME, and is used only if nobody but root can change it.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from aether.contract.cellplan import ExecSpec, Plan, PlanError
from aether.spawner.linux import idspace, initwire, kernel, native, oci_config, oci_shim
from aether.spawner.linux import program as pg
from aether.spawner.linux.executor import Attach, Launched, LaunchError, lower_plan
from aether.spawner.linux.oci_shim import Runtime
from aether.spawner.linux.remedies import remedy
from aether.spawner.linux.userns import of_layers

KINDS: Final = ("runc", "crun", "runsc")
SETTING: Final = "AETHER_OCI_RUNTIME"
_SEARCH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_VERSION_TIMEOUT_S: Final = 10.0
_INSTALL: Final = {
    "runc": "apt install runc",
    "crun": "apt install crun",
    "runsc": "apt install runsc (Debian backports), or https://gvisor.dev/docs/user_guide/install",
}


@dataclass(frozen=True, slots=True)
class Found:
    """What there is of one kind of runtime: a path, or why it cannot be used and what helps."""

    kind: str
    path: str
    reason: str
    remedy: str


def find_runtimes(env: Mapping[str, str]) -> dict[str, Found]:
    """Every kind of runtime, usable or not. Starts nothing."""
    named = env.get(SETTING, "")
    found: dict[str, Found] = {}
    for kind in KINDS:
        path = named if kind in Path(named).name else shutil.which(kind, path=_SEARCH)
        found[kind] = _found(kind, path)
    return found


def drivers_here(env: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """`find_runtimes` as JSON: {kind: {path, reason, remedy}}."""
    found = find_runtimes(env)
    return {kind: {"path": each.path, "reason": each.reason, "remedy": each.remedy} for kind, each in found.items()}


def _found(kind: str, path: str | None) -> Found:
    lack = f"install it ({_INSTALL[kind]}), or name it by {SETTING}=/path"
    if idspace.here().kind != "root":
        return Found(kind, "", "the spawner is not root, and OCI runtimes need its blocks of ids", "run as root")
    if not os.access(native.BINARY, os.X_OK):
        return Found(kind, "", "aether-init is not built", "make -C src/aether/spawner/native")
    if not path:
        return Found(kind, "", f"{kind} is not installed", lack)
    real = os.path.realpath(path)
    try:
        about = os.stat(real)  # noqa: PTH116
    except OSError as error:
        return Found(kind, "", f"cannot use {path}: {error.strerror}", lack)
    if about.st_uid != 0 or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not os.access(real, os.X_OK):
        return Found(kind, "", f"cannot use {real}: not a program that root alone may change", f"chown root, {lack}")
    return Found(kind, real, "", "")


def version_of(path: str) -> str:
    """The version in the first line of `--version`; raises LaunchError when the program does not answer."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=True
        )
        return done.stdout.split("\n", 1)[0].rsplit(" ", 1)[1]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise LaunchError(f"{path} --version", 0, f"run it by hand to see why: {error}") from error


class OciExecutor:
    """See executor.Executor. One kind of runtime; its version is asked for when it is first needed."""

    def __init__(self, found: Found, source_roots: Sequence[str]) -> None:
        self._found = found
        self._roots = tuple(source_roots)
        self._facts = pg.host_facts()
        self._runtime: Runtime | None = None

    @property
    def name(self) -> str:
        return self.runtime.name

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            self._runtime = Runtime(self._found.kind, self._found.path, version_of(self._found.path))
        return self._runtime

    def pids(self) -> frozenset[int]:
        return frozenset()

    def bundle(self, plan: Plan) -> dict[str, Any]:
        """The config.json that a launch of `plan` would write, with the sources of the plan; raises LaunchError."""
        try:
            return oci_config.oci_config(plan, self._found.kind, str(native.BINARY))
        except PlanError as error:
            raise LaunchError(error.field, 0, f"{error.why}, or leave it out of the plan") from error

    def launch(
        self, plan: Plan, attach: Attach, first_exec: ExecSpec | None = None, fds: Sequence[int] = ()
    ) -> Launched:
        if len(fds) != (first_exec.fd_count if first_exec else 0):
            raise LaunchError("descriptors", 0, "pass one descriptor per entry of the specification")
        started_us = time.monotonic_ns() // 1000
        self.bundle(plan)  # refused here rather than in the shim, where there is no way back
        lowered = lower_plan(plan, self._roots, self._facts)
        message = initwire.encode_launch(for_container(lowered, plan), started_us, 0, False, first_exec)
        order = oci_shim.Order(self.runtime, plan, lowered, str(native.BINARY), started_us)
        layers = of_layers(lowered)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cgroups = list(attach.write_zero)
        if attach.cgroup2_dir is not None:
            flags = os.O_WRONLY | os.O_CLOEXEC
            cgroups.append(os.open("cgroup.procs", flags, dir_fd=attach.cgroup2_dir))
        try:
            initwire.send(ours, message, fds)  # before anything else that is asked of the cell
            pid = kernel.clone(0, None)
        except OSError as error:
            ours.close()
            raise LaunchError("clone", error.errno or 0, remedy("clone", error.errno or 0)) from error
        else:
            if pid == 0:
                held = oci_shim.Held(theirs.detach(), tuple(cgroups), layers)
                oci_shim.run_shim(order, held)
        finally:
            theirs.close()
            for fd in (*cgroups[len(attach.write_zero) :], *((layers,) if layers is not None else ())):
                os.close(fd)
        ours.setblocking(False)
        return Launched(pid, os.pidfd_open(pid), ours)

    def close(self) -> None:
        return None


def for_container(lowered: pg.Program, plan: Plan) -> pg.Program:
    """What is left to aether-init where a runtime has made namespaces and root: pure.

    Inside the container's user namespace ids are the cell's own, so the block begins at 0.
    """
    ids = replace(lowered.ids, host_uid=0, host_gid=0) if "user" in plan.namespaces else lowered.ids
    return replace(
        lowered,
        clone_flags=kernel.CLONE_NEWPID,
        unshare_flags=0,
        join_userns=False,
        per_exec_landlock=False,
        ids=ids,
        ops=(),
    )
