"""From a specification to a plan: pure, printable, decided before any privilege is used.

Defaults: every namespace the host allows, the host's minimal read-only root, a private sized /tmp, the work
directory at /work, `readonly_dirs` at /mnt/<name>, Landlock over exactly these, seccomp profile `cell`, rlimits.
Where no cgroup enforces memory or processes, rlimits stand in (RLIMIT_DATA, RLIMIT_NPROC): per process and per
user, not per cell, and `missing` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from aether.contract.canonical import canonical
from aether.contract.cellplan import (
    BindRo,
    BindRw,
    DevMinimal,
    ExecSpec,
    File,
    IdMap,
    Landlock,
    LandlockRule,
    Mask,
    Overlay,
    Plan,
    Proc,
    Rlimit,
    Step,
    Tmpfs,
    describe,
    exec_to_obj,
    placed,
    root_layer,
    to_obj,
)
from aether.contract.cells import REQUIREMENTS, CellSpec, Images, Limits
from aether.contract.errors import AetherError
from aether.substrate.cells import levels
from aether.substrate.cells.facts import Facts
from aether.substrate.cells.interpreter import command_line

JOB_ID: Final = 1000
HOST_NAME: Final = "cell"
WORK: Final = "/work"
DEFAULT_ENV: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": WORK,
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "USER": "job",
}
TMP_BYTES_MIN: Final = 4096
DISK: Final = "disk_bytes"
"""The one bound of a whole cell that no cgroup holds."""
OBSERVATION: Final = "bpf"
"""What a host may lack that enforces nothing: no report of a cell names it."""
CGROUP_LIMITS: Final = (
    "memory_min_bytes", "memory_low_bytes", "memory_high_bytes", "swap_bytes", "cpu_weight", "cpuset_cpus",
    "cpuset_mems", "io_weight", "io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops",
)  # fmt: skip
"""Limits that the kernel leaves open unless they are asked for."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell ready to be asked for: the plan, its first executable, cgroup limits, what stands in or is absent."""

    plan: Plan
    executable: ExecSpec
    limits: dict[str, Any]
    missing: dict[str, str]
    sched: dict[str, Any] | None = None

    def document(self) -> bytes:
        """Canonical JSON of all that is asked, which receipts name by digest; the same for every cell of one kind.

        What differs from cell to cell is named and not told: its id, its executable's, its work directory, its
        block of uids. The environment's values are left out: they may be secrets.
        """
        steps = tuple(placed(step, "/{work}") for step in self.plan.steps)
        plan, executable = to_obj(replace(self.plan, steps=steps)), exec_to_obj(self.executable)
        plan["cell_id"], executable["exec_id"] = "{cell}", "{exec}"
        plan["id_map"] |= {"host_uid": "{uid}", "host_gid": "{gid}"}
        executable["env"] = sorted(executable["env"])
        sched = {} if self.sched is None else {"sched": self.sched}
        return canonical({"plan": plan, "exec": executable, "limits": self.limits} | sched)

    def lines(self) -> tuple[str, ...]:
        asked = [f"{'' if name == DISK else 'cgroup '}limit {name}: {value}" for name, value in self.limits.items()]
        if self.sched is not None:
            asked.append("schedule as " + ", ".join(f"{name} {value}" for name, value in self.sched.items() if value))
        lacks = [f"not enforced here: {name}: {reason}" for name, reason in self.missing.items()]
        run = [f"run {' '.join(self.executable.argv)} in {self.executable.cwd}"] if self.executable.argv else []
        return (*describe(self.plan), *asked, *lacks, *run)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What is the same for every cell of one specification on one host: made once, filled in for each cell.

    `text` is the document that receipts name. `digest` names it at the spawner, which keeps it and fills in the
    rest; None where the plan is sent whole: at level `process` the work directory's host path is all over it.
    """

    plan: dict[str, Any]
    executable: dict[str, Any]
    limits: dict[str, Any]
    missing: dict[str, str]
    text: bytes
    sched: dict[str, Any] | None = None
    digest: str | None = None


def blueprint(spec: CellSpec, cell_id: str, exec_id: str, facts: Facts, slot: int) -> Blueprint:
    """The blueprint of `spec`, drawn for one cell; raises AetherError LEVEL_UNMET."""
    planned = plan_cell(spec, cell_id, exec_id, facts, slot)
    executable = exec_to_obj(planned.executable)
    del executable["stdio"]
    return Blueprint(
        plan=to_obj(planned.plan),
        executable=executable,
        limits=planned.limits,
        missing=planned.missing,
        text=planned.document(),
        sched=planned.sched,
    )


def work_of(cell_id: str, facts: Facts) -> str:
    """The host path of a cell's work directory."""
    return f"{facts.work_root}/{cell_id}"


def plan_cell(spec: CellSpec, cell_id: str, exec_id: str, facts: Facts, slot: int) -> Planned:
    """The plan of `spec` on this host. `slot` chooses the block of uids when the spawner is root."""
    levels.require(spec.require, facts)
    _check_isolation(spec, facts)
    driver = levels.choose(spec.require, facts)
    lacks = levels.LACKS.get(driver, {})
    levels.check_network(driver, spec)
    work = work_of(cell_id, facts)
    is_cell = facts.level == "cell"
    if spec.images is not None and not is_cell:
        raise AetherError("LEVEL_UNMET", "cannot show an image: cells have no mount namespace of their own here")
    plan = Plan(
        cell_id=cell_id,
        level=levels.level_of(driver, facts),
        namespaces=tuple(name for name in facts.namespaces if name != "net" or spec.isolate_network),
        id_map=id_map(facts, spec, slot),
        hostname=HOST_NAME,
        steps=_steps(spec, facts, work) if is_cell else (),
        seccomp_profile="cell" if "net" in facts.namespaces else "offline",
        landlock=None if "landlock" in lacks else _landlock(spec, facts, work),
        rlimits=_rlimits(spec, facts),
        driver=driver,
        shared=() if spec.isolate_network else ("network",),
    )
    wanted = cgroup_limits(spec.limits)
    if "cgroup-pids" in lacks:
        wanted["pids"] += levels.SENTRY_PIDS
    missing = _missing(facts, spec) | {name: lack.reason for name, lack in lacks.items()}
    missing |= _unmet_limits(spec.limits, facts)
    return Planned(plan, exec_spec(spec, cell_id, exec_id, facts), wanted, missing, _sched(spec.limits))


def _check_isolation(spec: CellSpec, facts: Facts) -> None:
    """What may be shared with the host: its network. Raises AetherError LEVEL_UNMET."""
    if not spec.isolate_process:
        why = "its end is the end of its process namespace, so every cell here has its own"
        raise AetherError(
            "LEVEL_UNMET", f"cannot share the host's processes with a cell: {why}", "isolate_process: true"
        )
    if not spec.isolate_network and facts.level != "cell":
        why = "without namespaces its seccomp filter is all that keeps a cell off the host's network"
        raise AetherError("LEVEL_UNMET", f"cannot share the host's network: {why}", "keep isolate_network")


def cgroup_limits(asked: Limits) -> dict[str, Any]:
    """What is to hold for the whole cell, by its cgroup and on disk: what is asked, and no swap unless it is."""
    own = {name: getattr(asked, name) for name in CGROUP_LIMITS if getattr(asked, name) is not None}
    return {
        "memory_bytes": asked.memory_bytes,
        "swap_bytes": 0,
        "cpu_millis": asked.cpu_millis,
        "pids": asked.pids + 1,  # PID 1 is ours, not the job's
        DISK: asked.disk_bytes,
    } | own


def _sched(asked: Limits) -> dict[str, Any] | None:
    return None if asked.sched is None else dict(msgspec.to_builtins(asked.sched))


def _unmet_limits(asked: Limits, facts: Facts) -> dict[str, str]:
    """Limits that this host cannot hold, of those that only a job that wants them names."""
    return {
        name: facts.limits_missing[name]
        for name in CGROUP_LIMITS
        if getattr(asked, name) is not None and name in facts.limits_missing
    }


def exec_spec(spec: CellSpec, cell_id: str, exec_id: str, facts: Facts) -> ExecSpec:
    """The executable of `spec`. Without a mount namespace /work and /mnt/<name> are the host's paths; this
    installation's interpreter, named by its host path, is found where the cell has it, with its modules."""
    is_cell = facts.level == "cell"
    work = WORK if is_cell else f"{facts.work_root}/{cell_id}"
    env = {name: value.replace(WORK, work, 1) if name == "HOME" else value for name, value in DEFAULT_ENV.items()}
    cwd = work + spec.cwd[len(WORK) :] if spec.cwd == WORK or spec.cwd.startswith(WORK + "/") else spec.cwd
    argv = command_line(spec, facts)
    if is_cell and argv and argv[0] == facts.python.host:
        argv = (facts.python.cell, *argv[1:])
        env["PYTHONPATH"] = facts.python.path
    if not is_cell:
        shown = {f"/mnt/{name}": source for name, source in spec.readonly_dirs.items()}
        argv = tuple(shown.get(word, word) for word in argv)
    return ExecSpec(
        exec_id=exec_id,
        argv=argv,
        env=tuple((env | spec.env).items()),
        cwd=cwd,
        extra_fds=1 if spec.channel else 0,
    )


def has_own_ids(facts: Facts, spec: CellSpec) -> bool:
    """Whether its ids are a block of its own. The layers of images belong to the spawner's user, and only root can show
    them as another's (mount_setattr(2), MOUNT_ATTR_IDMAP), so with lent ids a cell of an image has that user's."""
    lent = facts.ids.kind == "subordinate"
    return facts.ids.slots > 0 and (not lent or (facts.level == "cell" and spec.images is None))


def id_map(facts: Facts, spec: CellSpec, slot: int) -> IdMap:
    """The block of ids number `slot`, or the one uid of the spawner's user."""
    if not has_own_ids(facts, spec):
        return IdMap(facts.uid, facts.gid, 1, JOB_ID, JOB_ID, JOB_ID)
    first = facts.ids.start(slot)
    return IdMap(first, first, facts.ids.block, 0, JOB_ID, JOB_ID)


def _image_root(facts: Facts, digest: str, upper: str | None) -> tuple[Step, ...]:
    """An image in place of the host's programs. Its import made sure of the places that are written here."""
    own = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
    kept = [
        step
        for step in facts.root
        if isinstance(step, Proc | DevMinimal | Tmpfs | Mask) or (isinstance(step, File) and step.path in own)
    ]
    return (Overlay("/", facts.image(digest), upper), *kept)


def _steps(spec: CellSpec, facts: Facts, work: str) -> tuple[Step, ...]:
    images = spec.images or Images()
    root = facts.root
    if images.root is not None:
        root = _image_root(facts, images.root, root_layer(work) if images.writable else None)
    return (
        *root,
        Tmpfs("/tmp", max(spec.limits.tmp_bytes, TMP_BYTES_MIN)),
        BindRw(WORK, work) if images.work is None else Overlay(WORK, facts.image(images.work), work),
        *(BindRo(f"/mnt/{name}", source) for name, source in sorted(spec.readonly_dirs.items())),
    )


def _landlock(spec: CellSpec, facts: Facts, work: str) -> Landlock | None:
    if facts.landlock_abi < 1:
        return None
    rules = list(facts.landlock_rules)
    if spec.images is not None and spec.images.writable:
        rules.append(LandlockRule("/", ("read", "execute", "write")))
    if facts.level == "cell":
        rules += [LandlockRule(path, ("read", "execute", "write")) for path in ("/tmp", WORK)]
        rules += [LandlockRule(f"/mnt/{name}", ("read", "execute")) for name in sorted(spec.readonly_dirs)]
    else:
        rules.append(LandlockRule(work, ("read", "execute", "write")))
        rules += [LandlockRule(source, ("read", "execute")) for _, source in sorted(spec.readonly_dirs.items())]
    return Landlock(tuple(rules), tcp=facts.level == "cell" and spec.isolate_network)


def _rlimits(spec: CellSpec, facts: Facts) -> tuple[Rlimit, ...]:
    asked = spec.limits
    # One byte: no file, as with 0, and none for a host's handler either, which runs as root outside and which 0
    # does not stop (core(5), "Piping core dumps to a program"; 1 is the kernel's own guard against recursion).
    wanted = {"core": 1, "nofile": asked.nofile, "fsize": asked.file_bytes}
    if "cgroup-memory" in facts.missing:
        wanted["data"] = asked.memory_bytes
    if "cgroup-pids" in facts.missing:
        wanted["nproc"] = asked.pids + 1
    return tuple(Rlimit(name, value, value) for name, value in wanted.items())


def _missing(facts: Facts, spec: CellSpec) -> dict[str, str]:
    missing = {name: lack.reason for name, lack in facts.missing.items() if name != OBSERVATION}
    whose = "per cell, whose uid is its own" if has_own_ids(facts, spec) else "per user"
    stand_ins = {
        "cgroup-memory": "RLIMIT_DATA stands in, per process",
        "cgroup-pids": f"RLIMIT_NPROC stands in, {whose}",
    }
    for name, stand_in in stand_ins.items():
        if name in missing:
            missing[name] += f"; {stand_in}"
    if facts.ids.kind == "subordinate":
        missing["daemon-uids"] = "without root, the daemons share the user's uid: their split is fault isolation only"
        if not has_own_ids(facts, spec):
            missing["own-uids"] = "without root, a cell that shows an image shares its uid with the user's daemons"
    elif not facts.is_root:
        missing["own-uids"] = "without root, cells and daemons share one uid: their split is fault isolation only"
    return missing


def check_spec(spec: CellSpec) -> None:
    """What the specification's types do not say; raises AetherError BAD_FIELD."""
    for word in spec.require:
        if word not in REQUIREMENTS:
            raise AetherError("BAD_FIELD", f"cannot require {word[:80]!r}: it is no level or mechanism")
    for name, source in spec.readonly_dirs.items():
        if not name.isidentifier() or len(name) > 64:
            raise AetherError("BAD_FIELD", f"cannot show a directory as {name[:80]!r}: not a plain name")
        if not source.startswith("/"):
            raise AetherError("BAD_FIELD", f"cannot show {source[:80]!r}: not an absolute path")
