"""A plan lowered to what one kernel is told: flags, flat operations, masks, a filter. No decision is left in it.

Both executors carry out a Program; the native one receives it through `initwire`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from aether.contract import cellplan as cp
from aether.spawner.linux import kernel, landlock, seccomp

OP_DIR, OP_SYMLINK, OP_FILE, OP_BIND, OP_MOUNT, OP_DEVICE, OP_SEAL, OP_MASK, OP_LAYER = range(1, 10)
BIND_WRITABLE, BIND_DEVICE = 1, 2
LAYER_NEW, LAYER_MAPPED = 1, 2
NO_ID: Final = (1 << 32) - 1
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8  # MOUNT_ATTR_*, mount_setattr(2)
_DEVICES: Final = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}  # minors of major 1, null(4)
_DEVICE_LINKS: Final = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}
STEPS_KEPT: Final = 1024
"""Steps, and operations, whose translation is remembered."""
PlainStep = (
    cp.Dir | cp.Symlink | cp.File | cp.BindRo | cp.BindRw | cp.BindDev | cp.Tmpfs | cp.Proc | cp.DevMinimal | cp.Mask
)
"""Every step but an overlay."""
RESOURCES: Final = {
    "cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "rss": 5, "nproc": 6, "nofile": 7, "memlock": 8,
    "as": 9, "locks": 10, "sigpending": 11, "msgqueue": 12, "nice": 13, "rtprio": 14, "rttime": 15,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What lowering must know of the kernel."""

    arch: str
    landlock_abi: int
    last_cap: int


@dataclass(frozen=True, slots=True)
class Op:
    """One primitive. `step` is the index in the plan, for messages. By kind:

    DIR mode; SYMLINK text: target; FILE mode, text: content; BIND flags BIND_*, text: allowed root, text2: source
    beneath it; MOUNT text2: type, text: options as lines of key=value, flags: attributes; DEVICE mode: minor number
    of major 1; SEAL: the mount there becomes read-only; MASK: hidden, where it exists; LAYER flags LAYER_*: a
    directory for the next MOUNT, whose options name it @0, @1, ... (@ alone is an option without value): a new one at
    `path`, or like BIND one of the host, with LAYER_MAPPED as the job's own.
    """

    kind: int
    step: int
    path: str
    mode: int = 0
    flags: int = 0
    text: str = ""
    text2: str = ""


@dataclass(frozen=True, slots=True)
class Program:
    clone_flags: int
    unshare_flags: int
    join_userns: bool
    per_exec_landlock: bool
    ids: cp.IdMap
    last_cap: int
    hostname: str
    ops: tuple[Op, ...]
    layer_owner: tuple[int, int]
    """uid and gid on the host that LAYER_MAPPED shows as the job's; NO_ID when there is no such layer."""
    landlock: landlock.Lowered | None
    rlimits: tuple[cp.Rlimit, ...]
    filter: bytes

    def seen_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """Ids of a block as setresuid(2) takes them: those inside where the cell's user namespace is joined, else
        those of the host."""
        if self.join_userns:
            return uid, gid
        return self.ids.host_uid + self.ids.offset(uid), self.ids.host_gid + self.ids.offset(gid)


def host_facts() -> HostFacts:
    return HostFacts(kernel.ARCH, landlock.probe_abi(), kernel.last_capability())


def _source(source: str, roots: Sequence[str]) -> tuple[str, str]:
    """(allowed root, path beneath it): the deepest root wins."""
    holding = [root for root in roots if cp.is_beneath(source, root)]
    if not holding:
        raise cp.PlanError("source", "lies outside the allowed roots")
    root = max(holding, key=len)
    return root, source[len(root) :].lstrip("/")


def mount(index: int, path: str, kind: str, options: dict[str, str], attributes: int) -> Op:
    """A new file system of type `kind`. Raises PlanError for an option that would be two on the wire."""
    if any("\n" in text for pair in options.items() for text in pair):
        raise cp.PlanError("path", "holds a line break")
    lines = "\n".join(f"{key}={value}" for key, value in options.items())
    return Op(OP_MOUNT, index, path, flags=attributes, text=lines, text2=kind)


def _minimal_dev(index: int, dev: str, pty: bool) -> list[Op]:
    options = {"size": "65536", "nr_inodes": "64", "mode": "0755"}
    ops = [mount(index, dev, "tmpfs", options, NOSUID | NOEXEC)]
    ops += [Op(OP_DEVICE, index, f"{dev}/{name}", minor) for name, minor in _DEVICES.items()]
    ops += [Op(OP_SYMLINK, index, f"{dev}/{name}", text=target) for name, target in _DEVICE_LINKS.items()]
    ops.append(Op(OP_DIR, index, f"{dev}/shm", 0o1777))
    if pty:
        ops.append(mount(index, f"{dev}/pts", "devpts", {"ptmxmode": "0666", "mode": "0620"}, NOSUID | NOEXEC))
        ops.append(Op(OP_SYMLINK, index, f"{dev}/ptmx", text="pts/ptmx"))
    return [*ops, Op(OP_SEAL, index, dev)]


def _overlay(index: int, step: cp.Overlay, roots: Sequence[str], block: bool) -> list[Op]:
    """With a block of ids the mount belongs to the initial user namespace and its marks are trusted.* attributes,
    out of the cell's reach; else they are user.* ones (overlayfs, "userxattr")."""
    root, rest = _source(step.lower, roots)
    mapped = LAYER_MAPPED if block and step.upper is not None else 0
    ops = [Op(OP_LAYER, index, step.path, flags=mapped, text=root, text2=rest)]
    if step.upper is None:
        ops += [Op(OP_LAYER, index, path, flags=LAYER_NEW) for path in ("/.upper", "/.scratch")]
    else:
        above = [posixpath.split(path) for path in (step.upper, cp.scratch_of(step.upper))]
        ops += [Op(OP_LAYER, index, step.path, text=place, text2=name) for place, name in above]
    options = {"lowerdir": "@0", "upperdir": "@1", "workdir": "@2", "redirect_dir": "nofollow", "metacopy": "off"}
    ops.append(mount(index, step.path, "overlay", options | ({} if block else {"userxattr": "@"}), NOSUID | NODEV))
    return ops


def _lower_steps(plan: cp.Plan, roots: Sequence[str]) -> list[Op]:
    ops: list[Op] = []
    writable = False
    allowed = tuple(roots)
    for index, step in enumerate(plan.steps):
        if isinstance(step, cp.Overlay):
            ops += _overlay(index, step, roots, plan.id_map.count > 1)
            writable |= step.path == "/" and step.upper is not None
        else:
            ops += _lowered(index, step, allowed)
    return ops if writable or not ops else [*ops, Op(OP_SEAL, len(plan.steps) - 1, "/")]


@lru_cache(maxsize=STEPS_KEPT)
def _lowered(index: int, step: PlainStep, roots: tuple[str, ...]) -> tuple[Op, ...]:
    """Nearly all steps are the same from cell to cell: only the work directory's differs."""
    return tuple(_lower_step(index, step, roots))


def _lower_step(index: int, step: PlainStep, roots: Sequence[str]) -> list[Op]:
    match step:
        case cp.Dir():
            return [Op(OP_DIR, index, step.path, mode=step.mode)]
        case cp.Symlink():
            return [Op(OP_SYMLINK, index, step.path, text=step.target)]
        case cp.File():
            return [Op(OP_FILE, index, step.path, mode=step.mode, text=step.content)]
        case cp.BindRo():
            root, rest = _source(step.source, roots)
            return [Op(OP_BIND, index, step.path, text=root, text2=rest)]
        case cp.BindRw():
            root, rest = _source(step.source, roots)
            return [Op(OP_BIND, index, step.path, flags=BIND_WRITABLE, text=root, text2=rest)]
        case cp.BindDev():
            return [Op(OP_BIND, index, step.path, flags=BIND_DEVICE, text="/dev", text2=step.source[5:])]
        case cp.Tmpfs():
            options = {"size": str(step.size_bytes), "nr_inodes": str(step.inodes_max), "mode": f"{step.mode:o}"}
            attributes = NOSUID | NODEV | (0 if step.exec_allowed else NOEXEC)
            return [mount(index, step.path, "tmpfs", options, attributes)]
        case cp.Proc():
            return [mount(index, step.path, "proc", {}, NOSUID | NODEV | NOEXEC | RDONLY)]
        case cp.DevMinimal():
            return _minimal_dev(index, step.path, step.pty)
        case cp.Mask():
            return [Op(OP_MASK, index, path) for path in step.paths]


def lower(plan: cp.Plan, roots: Sequence[str], facts: HostFacts) -> Program:
    """Pure. Raises PlanError when the plan asks for what this kernel does not have."""
    if plan.landlock is not None and facts.landlock_abi < 1:
        raise cp.PlanError("plan.landlock", "this kernel has no Landlock")
    if facts.arch not in seccomp.AUDIT_ARCH:
        raise cp.PlanError("plan.seccomp_profile", f"there is no reviewed profile for {facts.arch}")
    block = plan.id_map.count > 1
    flags = {name: kernel.NAMESPACE_FLAGS[name] for name in plan.namespaces}
    at_clone = {"pid"} if block else {"pid", "user"}
    return Program(
        clone_flags=sum(f for n, f in flags.items() if n in at_clone),
        unshare_flags=sum(f for n, f in flags.items() if n not in at_clone and n != "user"),
        join_userns=block and "user" in flags,
        per_exec_landlock="pid" not in flags,
        ids=plan.id_map,
        last_cap=facts.last_cap,
        hostname=plan.hostname,
        ops=tuple(_lower_steps(plan, roots)),
        layer_owner=(NO_ID, NO_ID),
        landlock=landlock.lower(plan.landlock, facts.landlock_abi) if plan.landlock is not None else None,
        rlimits=plan.rlimits,
        filter=seccomp.filter_program(plan.seccomp_profile, facts.arch),
    )
