"""The process between the spawner and one container of an OCI runtime.

A runtime takes 20 to 200 ms and many calls to build a container, which the one loop of the spawner must not wait
for. So each container has a shim, forked from the spawner, which is what the spawner holds as the cell's PID 1:

    spawner ── shim ── runtime create ─▶ container: aether-init serve 3
       └────────── control socket ───────────────┘

Lifetimes
- The shim is the subreaper of all that the runtime leaves behind, so the container is its child. It ends when the
  container ends; the container dies with it (PDEATHSIG, set by aether-init; a gVisor sandbox, which has none, sees
  the control socket end and lies in the cell's cgroup, which the spawner kills). The shim dies with the spawner.
- Bundle, rootfs and the runtime's own state lie on a tmpfs in a mount namespace that only shim and runtime see:
  when they are dead nothing is left, and no `runtime delete` is needed.
- The runtime and all it starts are born in the cell's cgroup. It is told to manage none, and sees cgroupfs
  read-only: runc as `--rootless` ignores what it then cannot write; crun refuses hosts where v1 and v2 are mounted
  side by side, so a v2 mount beside v1 is hidden from it.

Said on the control socket: `Container` (what the kernel shows of the container from outside) or `RuntimeRefused`
with the runtime's own words. All else on it is between the spawner and aether-init, whose program waits in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

from aether.contract import cellplan as cp
from aether.spawner.linux import confine, initwire, kernel, mounts
from aether.spawner.linux import program as pg
from aether.spawner.linux.oci_config import CONTROL_FD, INIT_PATH, SKELETON, oci_config

PRIVATE_PLACES: Final = ("/run", "/mnt", "/media", "/srv")
"""Where the private tmpfs may cover the host's tree: the first that hides nothing that is needed."""
CONTAINER: Final = "cell"
"""The container's name: each has a runtime state of its own."""
EXEC_WAIT_S: Final = 5.0
WHY_CHARS_MAX: Final = 400
ROOTFS: Final = "/bundle/rootfs"
_ROOTFS_OPTIONS: Final = {"size": "1m", "nr_inodes": "2048", "mode": "0755"}
_CGROUPFS: Final = "/sys/fs/cgroup"
_MS_REC_SLAVE: Final = 1 << 14 | 1 << 19
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100


class RuntimeRefusedError(Exception):
    """The runtime did not build the container; its own words."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """An installed runtime: `kind` is runc, crun or runsc, `path` its real path."""

    kind: str
    path: str
    version: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.version}"

    def commands(self, place: str) -> list[list[str]]:
        """What builds and starts the container of the bundle in `place`: the first gets the control socket."""
        bundle = ["--bundle", f"{place}/bundle", "--pid-file", f"{place}/pid", CONTAINER]
        head = [self.path, "--root", f"{place}/state"]
        if self.kind == "runsc":
            flags = ["--ignore-cgroups", "--network=none", "--platform=systrap", "--overlay2=none"]
            return [[*head, *flags, "run", "--detach", f"--pass-fd={CONTROL_FD}:{CONTROL_FD}", *bundle]]
        own = ["--rootless", "true"] if self.kind == "runc" else ["--cgroup-manager", "disabled"]
        return [[*head, *own, "create", "--preserve-fds", "1", *bundle], [*head, *own, "start", CONTAINER]]


@dataclass(frozen=True, slots=True)
class Order:
    """One container: `program` is the whole plan lowered, `init` aether-init on the host."""

    runtime: Runtime
    plan: cp.Plan
    program: pg.Program
    init: str
    started_us: int


@dataclass(frozen=True, slots=True)
class Held:
    """Descriptors of a shim: the container's end of the control socket, cgroup files to join, and the user namespace
    that maps the owner of layers, if any."""

    control: int
    cgroups: tuple[int, ...]
    layers: int | None


def run_shim(order: Order, held: Held) -> NoReturn:
    """In a child of the spawner: never returns, whatever is raised."""
    try:
        held = _own(held)
        control = socket.socket(fileno=held.control)
        try:
            pid = _build(order, held)
        except (RuntimeRefusedError, OSError) as error:
            _refuse(control, f"{order.runtime.name}: {error}"[:WHY_CHARS_MAX])
            os._exit(1)
        setup_us = time.monotonic_ns() // 1000 - order.started_us
        initwire.send(control, initwire.encode_container(look_at(pid, setup_us)))
        control.close()
        kernel.syscall("close_range", 3, 0x7FFFFFFF, 0)
        _wait_for(pid)
    finally:
        os._exit(1)


def _refuse(control: socket.socket, why: str) -> None:
    """The last word. What was asked of the container is read first: a socket that is closed with unread messages
    gives its peer ECONNRESET before what was sent to it (unix(7); af_unix.c, unix_release_sock)."""
    control.shutdown(socket.SHUT_RD)
    control.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while control.recv(initwire.MESSAGE_BYTES_MAX):
            pass
    initwire.send(control, initwire.encode_runtime_refused(why))


def _own(held: Held) -> Held:
    """Keep these descriptors, close all others of the spawner, die with it, adopt what the runtime leaves."""
    parent = os.getppid()
    kernel.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    kernel.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
    os.setsid()
    for signo in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signo, signal.SIG_DFL)
    layers = (held.layers,) if held.layers is not None else ()
    wanted = (held.control, *held.cgroups, *layers)
    first = min(1000, os.sysconf("SC_OPEN_MAX") // 2)
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first) for fd in wanted]
    kernel.syscall("close_range", 3, min(moved) - 1, 0)
    kernel.syscall("close_range", max(moved) + 1, 0x7FFFFFFF, 0)
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    count = 1 + len(held.cgroups)
    return Held(moved[0], tuple(moved[1:count]), moved[count] if layers else None)


# ---------------------------------------------------------------------------------------------- the bundle


def private_place(order: Order) -> str:
    """A directory that the private tmpfs may cover."""
    needed = [order.init, order.runtime.path]
    needed += [op.text for op in order.program.ops if op.kind in (pg.OP_BIND, pg.OP_LAYER) and op.text]
    for place in PRIVATE_PLACES:
        if Path(place).is_dir() and not any(cp.is_beneath(path, place) for path in needed):
            return place
    raise RuntimeRefusedError(f"every place for its bundle is in use: {', '.join(PRIVATE_PLACES)}")


def _tmpfs_at(path: str, options: str) -> int:
    """A new tmpfs covers `path`; a descriptor of its root."""
    tree = mounts.new_mount("tmpfs", options, pg.NOSUID | pg.NODEV)
    kernel.syscall("move_mount", tree, b"\0", _AT_FDCWD, os.fsencode(path) + b"\0", 0x04)
    return tree


def _prepare(order: Order, place: str, userns: int | None) -> None:
    """Bundle and staged sources on a private tmpfs at `place`, in a mount namespace of their own."""
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount(b"/", _MS_REC_SLAVE)
    os.umask(0)
    base = _tmpfs_at(place, "size=4194304\nnr_inodes=4096\nmode=0755")
    for name in ("bundle", "bundle/rootfs", "src", "state"):
        os.mkdir(name, 0o755, dir_fd=base)
    layers = mounts.Layers(userns)
    init = Path(order.init)
    mounts.perform(base, pg.Op(pg.OP_BIND, 0, "/init", text=str(init.parent), text2=init.name), layers)
    mounts.perform(base, pg.mount(0, ROOTFS, "tmpfs", _ROOTFS_OPTIONS, pg.NOSUID | pg.NODEV), layers)
    sources = _stage(order, base, place, layers)
    _make_root(order, base, sources, layers)
    if "user" in order.plan.namespaces and not any(step.op == "overlay" for step in order.plan.steps):
        # Without this its own root could not pass a directory of mode 0700 on the way to a mount point.
        ids = order.plan.id_map
        root = Path(f"{place}{ROOTFS}")
        for path in (root, *root.rglob("*")):
            os.chown(path, ids.host_uid + ids.init_uid, ids.host_gid + ids.init_uid, follow_symlinks=False)
    config = oci_config(order.plan, order.runtime.kind, f"{place}/init", sources)
    Path(f"{place}/bundle/config.json").write_text(json.dumps(config))
    _hide_cgroups()
    os.close(base)


def _stage(order: Order, base: int, place: str, layers: mounts.Layers) -> dict[int, str]:
    """Every source of the host is opened beneath its allowed root and shown below `place`, read-only, nosuid and
    nodev as the plan says, before the runtime sees it by name. An overlay at "/" becomes `rootfs`. {step: source}."""
    sources: dict[int, str] = {}
    for op in order.program.ops:
        step = order.plan.steps[op.step]
        is_overlay = isinstance(step, cp.Overlay) and op.kind != pg.OP_SEAL
        if not is_overlay and op.kind != pg.OP_BIND:
            continue
        to = ROOTFS if op.path == "/" else f"/src/{op.step}"
        mounts.perform(base, replace(op, path=to) if op.flags != pg.LAYER_NEW or not is_overlay else op, layers)
        if to != ROOTFS:
            sources[op.step] = f"{place}{to}"
    return sources


def _make_root(order: Order, base: int, sources: dict[int, str], layers: mounts.Layers) -> None:
    """What `rootfs` must hold, in the order of the plan, since the first to need a directory decides its mode; mount
    points among it: a runtime in a user namespace may write nothing here."""
    rootfs = mounts.open_beneath(base, ROOTFS[1:], os.O_PATH | os.O_DIRECTORY)
    covered: list[str] = []
    for index, step in enumerate(order.plan.steps):
        if isinstance(step, SKELETON):
            for op in order.program.ops:
                if op.step == index and op.kind != pg.OP_SEAL:
                    mounts.perform(rootfs, op, layers)
        elif isinstance(step, cp.Mask) or step.path == "/" or any(cp.is_beneath(step.path, path) for path in covered):
            continue
        else:
            mounts.perform(rootfs, _mount_point(index, step, sources), layers)
            covered.append(step.path)
    mounts.perform(rootfs, pg.Op(pg.OP_FILE, 0, INIT_PATH, 0o555), layers)
    os.close(rootfs)


def _mount_point(index: int, step: cp.Step, sources: dict[int, str]) -> pg.Op:
    """The mode of a directory is what runc gives the tmpfs that covers it (libcontainer/rootfs_linux.go)."""
    assert not isinstance(step, cp.Mask)
    if index in sources and not Path(sources[index]).is_dir():
        return pg.Op(pg.OP_FILE, index, step.path, 0o444)
    return pg.Op(pg.OP_DIR, index, step.path, step.mode if isinstance(step, cp.Tmpfs) else 0o755)


def _hide_cgroups() -> None:
    """See the head of this module. A host without cgroups has nothing to hide."""
    with contextlib.suppress(OSError):
        if os.path.ismount(f"{_CGROUPFS}/unified"):
            kernel.umount_detach(f"{_CGROUPFS}/unified".encode())
    with contextlib.suppress(OSError):
        attributes = (pg.RDONLY).to_bytes(8, "little") + bytes(24)
        path = _CGROUPFS.encode() + b"\0"
        kernel.syscall("mount_setattr", _AT_FDCWD, path, _AT_RECURSIVE, attributes, len(attributes))


# ---------------------------------------------------------------------------------------------- the container


def _build(order: Order, held: Held) -> int:
    """The pid of the container's PID 1, or of its sandbox; it waits for its program."""
    place = private_place(order)
    _prepare(order, place, held.layers)
    log = os.open(f"{place}/log", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    create, *more = order.runtime.commands(place)
    _call(create, log, held)
    pid = int(Path(f"{place}/pid").read_text())
    for command in more:
        _call(command, log, None)
    if more:
        _wait_for_exec(pid)
    os.close(log)
    return pid


def _call(command: Sequence[str], log: int, held: Held | None) -> None:
    """Run the runtime; with `held` it joins the cell's cgroup and gets the control socket.

    Raises RuntimeRefusedError.
    """
    pid = os.fork()
    if pid == 0:
        try:
            kernel.prctl(confine.PR_SET_PDEATHSIG, signal.SIGKILL)
            for fd in held.cgroups if held is not None else ():
                os.write(fd, b"0")
            for number in (1, 2):
                os.dup2(log, number)
            if held is not None:
                os.dup2(held.control, CONTROL_FD)
            os.execve(command[0], list(command), {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
        except OSError as error:
            os.write(log, f"{command[0]}: {error.strerror}".encode())
        finally:
            os._exit(127)
    while True:
        ended, status = os.wait()
        if ended == pid:
            break
    if status != 0:
        raise RuntimeRefusedError(_last_words(log) or f"it ended with {os.waitstatus_to_exitcode(status)}")


def _last_words(log: int) -> str:
    """The last line of what a runtime printed, without what no terminal should see."""
    os.lseek(log, max(0, os.lseek(log, 0, os.SEEK_END) - 4096), os.SEEK_SET)
    lines = [line for line in os.read(log, 4096).decode(errors="replace").splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    return "".join(c if c.isprintable() else " " for c in text)[-WHY_CHARS_MAX + 80 :]


def _wait_for_exec(pid: int) -> None:
    """`start` opens the door; only after execve is the process ours, with everything the runtime gives it."""
    until = time.monotonic() + EXEC_WAIT_S
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip().endswith("aether-init"):
                return  # by its file's name or, a little later, by the one it gives itself
        except OSError as error:
            raise RuntimeRefusedError("the container ended before it began") from error
        time.sleep(0.0005)
    raise RuntimeRefusedError("the container did not begin in time")


def look_at(pid: int, setup_us: int) -> initwire.Container:
    """What /proc shows of a process from outside (proc(5), namespaces(7))."""
    inodes: dict[str, int] = {}
    for kind in initwire.NAMESPACE_KINDS:
        try:
            inodes[kind] = os.stat(f"/proc/{pid}/ns/{kind}").st_ino  # noqa: PTH116
        except OSError:
            inodes[kind] = 0
    status: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        rows = (line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        status = {row[0]: row[1] for row in rows if len(row) == 2}
    return initwire.Container(
        pid=pid,
        namespaces=inodes,
        seccomp_mode=int(status.get("Seccomp", "0")),
        no_new_privs=status.get("NoNewPrivs") == "1",
        cap_bounding=int(status.get("CapBnd", "0"), 16),
        setup_us=setup_us,
    )


def _wait_for(pid: int) -> None:
    """Reap what the runtime left until the container itself ends."""
    with contextlib.suppress(ChildProcessError):
        while os.wait()[0] != pid:
            pass
    os._exit(0)
