"""What a cell is made of, before anything privileged happens: the plan and the executable specification.

A plan is an ordered list of a few closed operations (the manner of mkosi's sandbox.py). It crosses from the
authority to the spawner as JSON, is parsed once into the frozen types below, can be printed
(`describe`, behind `aether cell explain`), and is then executed without any further decision.

Invariants
- Standard library only, with `planfields`: the spawner imports nothing else of the package but the limits.
- `parse_plan` and `parse_exec` are strict: an unknown field, a wrong type, a path that is not absolute and
  normalised, or a host source outside the roots given by the spawner is refused. Empty means nothing allowed.
- Everything in a plan is mandatory. What the host cannot do must be left out by who writes the plan; an
  operation that fails at launch ends the launch.
- Destinations (`path`) are paths inside the cell. Only `source` names the host.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, cast

from aether.contract import planfields as pf
from aether.contract.cellids import IdMap, describe_ids, parse_id_map
from aether.contract.planfields import PATH_BYTES_MAX, PlanError, is_beneath

__all__ = ["PATH_BYTES_MAX", "IdMap", "PlanError", "is_beneath"]

PLAN_VERSION: Final = 1
STEPS_MAX: Final = 128
CONTENT_BYTES_MAX: Final = 32 * 1024
MASK_PATHS_MAX: Final = 32
LANDLOCK_RULES_MAX: Final = 64
RLIMITS_MAX: Final = 16
TMPFS_BYTES_MAX: Final = 1 << 40
INODES_MAX: Final = 1 << 24
ARGS_MAX: Final = 1024
ENV_MAX: Final = 512
EXEC_BYTES_MAX: Final = 96 * 1024
EXTRA_FDS_MAX: Final = 16

LEVELS: Final = ("cell", "process", "gvisor")
DRIVERS: Final = ("native", "runc", "crun", "runsc")
"""Who builds a cell: our own init, or an installed OCI runtime. runsc is gVisor."""
NAMESPACES: Final = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
SECCOMP_PROFILES: Final = ("cell", "offline")
SHARED: Final = ("network",)
STDIO_KINDS: Final = ("null", "fd")
LANDLOCK_ACCESS: Final = ("read", "execute", "write", "device")
RLIMIT_NAMES: Final = (
    "as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc",
    "rss", "rtprio", "rttime", "sigpending", "stack",
)  # fmt: skip
RLIM_INFINITY: Final = (1 << 64) - 1

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


@dataclass(frozen=True, slots=True)
class Dir:
    """Make a directory (and its missing parents, 0755)."""

    op: ClassVar[str] = "dir"
    path: str
    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Symlink:
    op: ClassVar[str] = "symlink"
    path: str
    target: str


@dataclass(frozen=True, slots=True)
class File:
    """A small file with literal text, such as /etc/passwd."""

    op: ClassVar[str] = "file"
    path: str
    content: str
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class BindRo:
    """Show a host file or directory tree read-only, nosuid, nodev."""

    op: ClassVar[str] = "bind_ro"
    path: str
    source: str


@dataclass(frozen=True, slots=True)
class BindRw:
    """Show a host directory read-write, nosuid, nodev. Its source path may hold no symbolic link."""

    op: ClassVar[str] = "bind_rw"
    path: str
    source: str


@dataclass(frozen=True, slots=True)
class BindDev:
    """Show one device node of the host; `source` must be among the devices the spawner allows."""

    op: ClassVar[str] = "bind_dev"
    path: str
    source: str


@dataclass(frozen=True, slots=True)
class Tmpfs:
    op: ClassVar[str] = "tmpfs"
    path: str
    size_bytes: int
    inodes_max: int = 65536
    mode: int = 0o1777
    exec_allowed: bool = True


@dataclass(frozen=True, slots=True)
class Proc:
    """A new, wholly read-only proc of the cell's pid namespace."""

    op: ClassVar[str] = "proc"
    path: str = "/proc"


@dataclass(frozen=True, slots=True)
class DevMinimal:
    """null zero full random urandom, the fd links, and with `pty` a private devpts with ptmx."""

    op: ClassVar[str] = "dev_minimal"
    path: str = "/dev"
    pty: bool = False


@dataclass(frozen=True, slots=True)
class Mask:
    """Cover paths with nothing: a directory by an empty read-only one, a file by /dev/null. Absent is fine."""

    op: ClassVar[str] = "mask"
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlay:
    """A directory tree of the host with a layer of its own on top, which takes all changes; nosuid, nodev.

    At "/" it is the cell's root: the first step, so that the steps that follow write into its layer. `upper` is the
    host directory that keeps the layer, and its sibling `.scratch-<name>` is overlayfs's own; without `upper` the
    layer is in memory, and the root becomes read-only when it is complete. As root, the files of `lower` are shown
    as the job's own where they may be changed.
    """

    op: ClassVar[str] = "overlay"
    path: str
    lower: str
    upper: str | None = None


def root_layer(work: str) -> str:
    """The directory that keeps the changes to a cell's root: beside its work directory."""
    above, _, name = work.rpartition("/")
    return f"{above}/.root-{name}"


def scratch_of(upper: str) -> str:
    """The sibling of an upper directory in which overlayfs prepares changes (its "workdir")."""
    above, _, name = upper.rpartition("/")
    return f"{above}/.scratch-{name}"


def placed(step: Step, work: str) -> Step:
    """The step for the cell whose work directory is `work`."""
    if isinstance(step, BindRw):
        return replace(step, source=work)
    if isinstance(step, Overlay) and step.upper is not None:
        return replace(step, upper=root_layer(work) if step.path == "/" else work)
    return step


Step = Dir | Symlink | File | BindRo | BindRw | BindDev | Tmpfs | Proc | DevMinimal | Mask | Overlay
STEP_TYPES: Final[Mapping[str, type[Step]]] = {
    t.op: t for t in (Dir, Symlink, File, BindRo, BindRw, BindDev, Tmpfs, Proc, DevMinimal, Mask, Overlay)
}


@dataclass(frozen=True, slots=True)
class LandlockRule:
    """What is allowed beneath `path`: words of LANDLOCK_ACCESS (`device` is ioctl on device nodes)."""

    path: str
    access: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Landlock:
    """Allow-list of file hierarchies. `tcp` False refuses TCP bind and connect (ABI 4); `scoped` refuses
    signals and abstract sockets across the domain (ABI 6). A kernel with an older ABI enforces what it knows;
    the report names the ABI."""

    rules: tuple[LandlockRule, ...]
    tcp: bool = True
    scoped: bool = True


@dataclass(frozen=True, slots=True)
class Rlimit:
    """Name as in RLIMIT_NAMES; RLIM_INFINITY is no limit."""

    name: str
    soft: int
    hard: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One cell. At level `process` there are no namespaces and no steps.

    Seccomp profile `cell` allows sockets of the cell's own network namespace; `offline` allows AF_UNIX alone and
    is the only one where the host's network would be in reach, unless `shared` names it: on purpose, by permission.
    """

    cell_id: str
    level: str
    namespaces: tuple[str, ...]
    id_map: IdMap
    hostname: str
    steps: tuple[Step, ...]
    seccomp_profile: str
    landlock: Landlock | None
    rlimits: tuple[Rlimit, ...] = ()
    driver: str = "native"
    shared: tuple[str, ...] = ()
    version: int = PLAN_VERSION


@dataclass(frozen=True, slots=True)
class ExecSpec:
    """One executable of a cell.

    `argv[0]` without a slash is looked up in PATH of `env`. `stdio` says for each of 0, 1, 2 whether it is
    /dev/null or a passed descriptor; `extra_fds` more descriptors follow at 3, 4, ... `tty` makes descriptor 0
    the controlling terminal. `rlimits` come on top of the plan's.
    """

    exec_id: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"
    stdio: tuple[str, str, str] = ("null", "null", "null")
    extra_fds: int = 0
    rlimits: tuple[Rlimit, ...] = ()
    tty: bool = False

    @property
    def fd_count(self) -> int:
        """Descriptors that must accompany this specification."""
        return self.stdio.count("fd") + self.extra_fds


# ---------------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True, slots=True)
class _Allowed:
    roots: tuple[str, ...]
    devices: frozenset[str]

    def source(self, value: object, field: str) -> str:
        path = pf.path(value, field)
        if not any(is_beneath(path, root) for root in self.roots):
            pf.refuse(field, "lies outside the allowed roots")
        return path

    def device(self, value: object, field: str) -> str:
        path = pf.path(value, field)
        if path not in self.devices:
            pf.refuse(field, "is not an allowed device")
        return path


def _parse_step(value: object, field: str, allowed: _Allowed) -> Step:
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        pf.refuse(field, "must be an object with an op")
    kind = STEP_TYPES.get(value["op"])
    if kind is None:
        pf.refuse(f"{field}.op", f"must be one of {', '.join(STEP_TYPES)}")
    obj = pf.dataclass_object(value, field, kind, "op")
    given = {name: obj[name] for name in obj if name != "op"}
    checks: dict[str, Any] = {
        "path": pf.path if kind is Overlay else pf.below_root,
        "mode": lambda v, f: pf.integer(v, f, 0, 0o1777),
        "target": lambda v, f: pf.text(v, f, PATH_BYTES_MAX),
        "content": lambda v, f: pf.text(v, f, CONTENT_BYTES_MAX),
        "source": allowed.device if kind is BindDev else allowed.source,
        "lower": allowed.source,
        "upper": lambda v, f: None if v is None else allowed.source(v, f),
        "size_bytes": lambda v, f: pf.integer(v, f, 4096, TMPFS_BYTES_MAX),
        "inodes_max": lambda v, f: pf.integer(v, f, 1, INODES_MAX),
        "exec_allowed": pf.boolean,
        "pty": pf.boolean,
        "paths": lambda v, f: tuple(pf.below_root(p, f) for p in pf.list_of(v, f, MASK_PATHS_MAX)),
    }
    step = kind(**{name: checks[name](item, f"{field}.{name}") for name, item in given.items()})
    if isinstance(step, Symlink) and not step.target:
        pf.refuse(f"{field}.target", "must not be empty")
    return step


def _parse_landlock(value: object, field: str) -> Landlock | None:
    if value is None:
        return None
    obj = pf.dataclass_object(value, field, Landlock)
    rules = []
    for i, item in enumerate(pf.list_of(obj["rules"], f"{field}.rules", LANDLOCK_RULES_MAX)):
        at = f"{field}.rules[{i}]"
        rule = pf.dataclass_object(item, at, LandlockRule)
        words = pf.list_of(rule["access"], f"{at}.access", len(LANDLOCK_ACCESS))
        access = tuple(pf.choice(w, f"{at}.access", LANDLOCK_ACCESS) for w in words)
        rules.append(LandlockRule(pf.path(rule["path"], f"{at}.path"), access))
    flags = {n: pf.boolean(obj[n], f"{field}.{n}") for n in ("tcp", "scoped") if n in obj}
    return Landlock(tuple(rules), **flags)


def _parse_rlimits(value: object, field: str) -> tuple[Rlimit, ...]:
    result = []
    for i, item in enumerate(pf.list_of(value, field, RLIMITS_MAX)):
        at = f"{field}[{i}]"
        obj = pf.dataclass_object(item, at, Rlimit)
        name = pf.choice(obj["name"], f"{at}.name", RLIMIT_NAMES)
        soft = pf.integer(obj["soft"], f"{at}.soft", 0, RLIM_INFINITY)
        hard = pf.integer(obj["hard"], f"{at}.hard", 0, RLIM_INFINITY)
        if soft > hard:
            pf.refuse(f"{at}.soft", "must not exceed hard")
        result.append(Rlimit(name, soft, hard))
    return tuple(result)


def parse_plan(obj: object, *, source_roots: Sequence[str], devices: Collection[str] = ()) -> Plan:
    """JSON object -> Plan, or PlanError.

    `source_roots`: absolute normalised host directories under which bind sources may lie; `devices`: device
    nodes that `bind_dev` may show. The check is lexical; the executor resolves beneath the same roots.
    """
    allowed = _Allowed(tuple(source_roots), frozenset(devices))
    top = pf.dataclass_object(obj, "plan", Plan)
    pf.integer(top.get("version", PLAN_VERSION), "plan.version", PLAN_VERSION, PLAN_VERSION)
    names = [pf.choice(n, "plan.namespaces", NAMESPACES) for n in pf.list_of(top["namespaces"], "plan.namespaces", 7)]
    plan = Plan(
        cell_id=pf.match(top["cell_id"], "plan.cell_id", _ID),
        level=pf.choice(top["level"], "plan.level", LEVELS),
        namespaces=tuple(n for n in NAMESPACES if n in names),
        id_map=parse_id_map(top["id_map"], "plan.id_map"),
        hostname=pf.match(top["hostname"], "plan.hostname", _HOSTNAME),
        steps=tuple(
            _parse_step(s, f"plan.steps[{i}]", allowed)
            for i, s in enumerate(pf.list_of(top["steps"], "plan.steps", STEPS_MAX))
        ),
        seccomp_profile=pf.choice(top["seccomp_profile"], "plan.seccomp_profile", SECCOMP_PROFILES),
        landlock=_parse_landlock(top["landlock"], "plan.landlock"),
        rlimits=_parse_rlimits(top.get("rlimits", []), "plan.rlimits"),
        driver=pf.choice(top.get("driver", "native"), "plan.driver", DRIVERS),
        shared=tuple(pf.choice(n, "plan.shared", SHARED) for n in pf.list_of(top.get("shared", []), "plan.shared", 1)),
    )
    _check_whole(plan)
    return plan


def _check_whole(plan: Plan) -> None:
    if ("network" in plan.shared) == ("net" in plan.namespaces) and plan.shared:
        pf.refuse("plan.shared", "a network namespace of its own is not shared")
    if "net" not in plan.namespaces and plan.seccomp_profile != "offline" and "network" not in plan.shared:
        pf.refuse("plan.seccomp_profile", "without a network namespace it must be offline")
    if sum(len(s.content.encode("utf-8", "surrogateescape")) for s in plan.steps if isinstance(s, File)) > (
        CONTENT_BYTES_MAX
    ):
        pf.refuse("plan.steps", f"literal files must total at most {CONTENT_BYTES_MAX} bytes")
    if (plan.level == "gvisor") != (plan.driver == "runsc"):
        pf.refuse("plan.driver", "runsc gives level gvisor, and no other driver does")
    if plan.level == "process":
        if plan.driver != "native":
            pf.refuse("plan.driver", "only native gives level process")
        if plan.namespaces or plan.steps:
            pf.refuse("plan.level", "a process-level plan has no namespaces and no steps")
        return
    if "pid" not in plan.namespaces or "mnt" not in plan.namespaces:
        pf.refuse("plan.namespaces", "a cell needs pid and mnt")
    if not plan.steps:
        pf.refuse("plan.steps", "a cell without steps has an empty root")
    for number, step in enumerate(plan.steps):
        if isinstance(step, Overlay) and (step.path == "/") != (number == 0):
            pf.refuse(f"plan.steps[{number}]", "an overlay at the root, and no other, is the first step")
        if isinstance(step, Overlay) and step.path != "/" and step.upper is None:
            pf.refuse(f"plan.steps[{number}].upper", "only the root's layer may be in memory")
    if plan.id_map.count == 1 and "user" not in plan.namespaces:
        pf.refuse("plan.namespaces", "a single-id cell needs user")


def parse_exec(obj: object) -> ExecSpec:
    """JSON object -> ExecSpec, or PlanError. `env` is an object of strings."""
    top = pf.dataclass_object(obj, "exec", ExecSpec)
    argv = tuple(pf.text(a, "exec.argv", EXEC_BYTES_MAX) for a in pf.list_of(top["argv"], "exec.argv", ARGS_MAX))
    if not argv or not argv[0]:
        pf.refuse("exec.argv", "must name a program")
    env_obj = top.get("env", {})
    if not isinstance(env_obj, dict) or len(env_obj) > ENV_MAX:
        pf.refuse("exec.env", f"must be an object with at most {ENV_MAX} entries")
    env = tuple(
        (pf.match(k, "exec.env", _ENV_NAME), pf.text(v, "exec.env", EXEC_BYTES_MAX)) for k, v in env_obj.items()
    )
    size = sum(len(a.encode("utf-8", "surrogateescape")) + 1 for a in argv)
    size += sum(len(k) + len(v.encode("utf-8", "surrogateescape")) + 2 for k, v in env)
    if size > EXEC_BYTES_MAX:
        pf.refuse("exec", f"argv and env must total at most {EXEC_BYTES_MAX} bytes")
    kinds = pf.list_of(top.get("stdio", ["null"] * 3), "exec.stdio", 3)
    if len(kinds) != 3:
        pf.refuse("exec.stdio", "must have three entries")
    stdio = tuple(pf.choice(k, "exec.stdio", STDIO_KINDS) for k in kinds)
    return ExecSpec(
        exec_id=pf.match(top["exec_id"], "exec.exec_id", _ID),
        argv=argv,
        env=env,
        cwd=pf.path(top.get("cwd", "/"), "exec.cwd"),
        stdio=cast("tuple[str, str, str]", stdio),
        extra_fds=pf.integer(top.get("extra_fds", 0), "exec.extra_fds", 0, EXTRA_FDS_MAX),
        rlimits=_parse_rlimits(top.get("rlimits", []), "exec.rlimits"),
        tty=pf.boolean(top.get("tty", False), "exec.tty"),
    )


def to_plain(value: object) -> Any:
    """A step, rule or other part of a plan as JSON; integers above 2^53 become decimal strings."""
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        obj = {f.name: to_plain(getattr(value, f.name)) for f in fields(cast("Any", value))}
        op = getattr(value, "op", None)
        return {"op": op, **obj} if op is not None else obj
    if isinstance(value, int) and not isinstance(value, bool) and value > 1 << 53:
        return str(value)
    return value


def to_obj(plan: Plan) -> dict[str, Any]:
    """The JSON object that `parse_plan` reads back into an equal Plan."""
    return cast("dict[str, Any]", to_plain(plan))


def exec_to_obj(spec: ExecSpec) -> dict[str, Any]:
    """The JSON object that `parse_exec` reads back into an equal ExecSpec."""
    return {**to_plain(spec), "env": dict(spec.env)}


def _describe_step(step: Step) -> str:
    match step:
        case Dir():
            return f"make directory {step.path} (mode {step.mode:04o})"
        case Symlink():
            return f"link {step.path} -> {step.target}"
        case File():
            return f"write {step.path} ({len(step.content.encode())} bytes, mode {step.mode:04o})"
        case BindRo():
            return f"show host {step.source} at {step.path} read-only, nosuid, nodev"
        case BindRw():
            return f"show host {step.source} at {step.path} read-write, nosuid, nodev"
        case BindDev():
            return f"show device {step.source} at {step.path}"
        case Tmpfs():
            noexec = "" if step.exec_allowed else ", noexec"
            return f"private tmpfs at {step.path}, {step.size_bytes} bytes, {step.inodes_max} inodes{noexec}"
        case Proc():
            return f"new read-only proc at {step.path}"
        case DevMinimal():
            return f"minimal devices at {step.path}" + (" with pty" if step.pty else "")
        case Mask():
            return f"cover {', '.join(step.paths)}"
        case Overlay():
            kept = f"kept in {step.upper}" if step.upper is not None else "none, it becomes read-only"
            return f"show host tree {step.lower} at {step.path}, nosuid, nodev; changes: {kept}"


def describe(plan: Plan) -> list[str]:
    """The plan as readable lines, in the order in which it is carried out."""
    lines = [
        f"cell {plan.cell_id}, level {plan.level}, driver {plan.driver}, plan version {plan.version}",
        f"new namespaces: {', '.join(plan.namespaces) or 'none'}",
        describe_ids(plan.id_map),
    ]
    if "uts" in plan.namespaces:
        lines.append(f"host name {plan.hostname}")
    lines += [f"{i}. {_describe_step(step)}" for i, step in enumerate(plan.steps)]
    lines.append("no capabilities, empty bounding set, no_new_privs")
    if plan.landlock is None:
        lines.append("no Landlock")
    else:
        lines += [f"Landlock: {', '.join(r.access) or 'nothing'} beneath {r.path}" for r in plan.landlock.rules]
        lines.append(f"Landlock: TCP {'allowed' if plan.landlock.tcp else 'refused'}")
        if plan.landlock.scoped:
            lines.append("Landlock: no signals and no abstract sockets to outside the cell")
    shown = {RLIM_INFINITY: "unlimited"}
    lines += [f"rlimit {r.name}: {shown.get(r.soft, r.soft)} (hard {shown.get(r.hard, r.hard)})" for r in plan.rlimits]
    lines.append(f"seccomp profile {plan.seccomp_profile}")
    return [_printable(line) for line in lines]


def _printable(line: str) -> str:
    """Paths may hold control characters: none reaches a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
