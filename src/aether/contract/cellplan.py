"""What a cell is made of, before anything privileged happens: the plan and the executable specification.

A plan is an ordered list of a few closed operations (the manner of mkosi's sandbox.py). It crosses from the
authority to the spawner as JSON, is parsed once into the frozen types below, can be printed
(`describe`, behind `aether cell explain`), and is then executed without any further decision.

Invariants
- Standard library only: the spawner imports this module and nothing else of the package.
- `parse_plan` and `parse_exec` are strict: an unknown field, a wrong type, a path that is not absolute and
  normalised, or a host source outside the roots given by the spawner is refused. Empty means nothing allowed.
- Everything in a plan is mandatory. What the host cannot do must be left out by who writes the plan; an
  operation that fails at launch ends the launch.
- Destinations (`path`) are paths inside the cell. Only `source` names the host.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Final, NoReturn, TypeVar, cast

PLAN_VERSION: Final = 1
STEPS_MAX: Final = 128
PATH_BYTES_MAX: Final = 1024
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
UID_MAX: Final = (1 << 32) - 2

LEVELS: Final = ("cell", "process")
NAMESPACES: Final = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
SECCOMP_PROFILES: Final = ("cell", "offline")
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


class PlanError(ValueError):
    """A plan or executable specification that is refused. `field` says where, `why` says why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"cannot use plan: {field}: {why}")
        self.field = field
        self.why = why


@dataclass(frozen=True, slots=True)
class IdMap:
    """Which host ids the cell's ids are.

    Block (`count` > 1, needs root): ids 0..count-1 inside are host_uid.., host_gid.. outside; PID 1 runs as
    `init_uid`, executables as `job_uid`, so that they can neither signal nor trace PID 1.
    Single (`count` == 1, any user): `job_uid` inside is `host_uid` outside, for PID 1 too.
    """

    host_uid: int
    host_gid: int
    count: int
    init_uid: int = 0
    job_uid: int = 1000
    job_gid: int = 1000


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


Step = Dir | Symlink | File | BindRo | BindRw | BindDev | Tmpfs | Proc | DevMinimal | Mask
STEP_TYPES: Final[Mapping[str, type[Step]]] = {
    t.op: t for t in (Dir, Symlink, File, BindRo, BindRw, BindDev, Tmpfs, Proc, DevMinimal, Mask)
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
    is the only one where the host's network would be in reach.
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

_T = TypeVar("_T")


def _refuse(field: str, why: str) -> NoReturn:
    raise PlanError(field, why)


def _object(value: object, field: str, required: Collection[str], optional: Collection[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(field, "must be an object")
    for name in value:
        if name not in required and name not in optional:
            _refuse(f"{field}.{name}"[:120], "unknown field")
    for name in required:
        if name not in value:
            _refuse(f"{field}.{name}", "missing")
    return cast("dict[str, Any]", value)


def _dataclass_object(value: object, field: str, kind: type[Any], *also: str) -> dict[str, Any]:
    """Required are the fields of `kind` without a default."""
    names = {f.name: f.default is MISSING for f in fields(kind)}
    required = [*also, *(n for n, needed in names.items() if needed)]
    return _object(value, field, required, [n for n, needed in names.items() if not needed])


def _int(value: object, field: str, low: int, high: int) -> int:
    """Integers above 2^53 may travel as decimal strings."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(field, f"must be an integer from {low} to {high}")
    return value


def _bool(value: object, field: str) -> bool:
    if not isinstance(value, bool):
        _refuse(field, "must be true or false")
    return value


def _text(value: object, field: str, bytes_max: int) -> str:
    if not isinstance(value, str):
        _refuse(field, "must be a string")
    if "\0" in value:
        _refuse(field, "must not hold NUL")
    try:
        size = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        _refuse(field, "must be valid text")
    if size > bytes_max:
        _refuse(field, f"must be at most {bytes_max} bytes")
    return value


def _match(value: object, field: str, pattern: re.Pattern[str]) -> str:
    text = _text(value, field, 256)
    if not pattern.fullmatch(text):
        _refuse(field, f"must match {pattern.pattern}")
    return text


def _choice(value: object, field: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        _refuse(field, f"must be one of {', '.join(allowed)}")
    return value


def _list(value: object, field: str, count_max: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        _refuse(field, "must be a list")
    if len(value) > count_max:
        _refuse(field, f"must have at most {count_max} entries")
    return list(value)


def _path(value: object, field: str) -> str:
    """Absolute, normalised, without '..': the text is the path that is used."""
    path = _text(value, field, PATH_BYTES_MAX)
    if not path.startswith("/") or path.startswith("//") or posixpath.normpath(path) != path:
        _refuse(field, "must be an absolute normalised path")
    return path


def _below_root(value: object, field: str) -> str:
    path = _path(value, field)
    if path == "/":
        _refuse(field, "must not be the root itself")
    return path


def is_beneath(path: str, root: str) -> bool:
    """Lexically: `path` is `root` or lies below it."""
    return root == "/" or path == root or path.startswith(root + "/")


@dataclass(frozen=True, slots=True)
class _Allowed:
    roots: tuple[str, ...]
    devices: frozenset[str]

    def source(self, value: object, field: str) -> str:
        path = _path(value, field)
        if not any(is_beneath(path, root) for root in self.roots):
            _refuse(field, "lies outside the allowed roots")
        return path

    def device(self, value: object, field: str) -> str:
        path = _path(value, field)
        if path not in self.devices:
            _refuse(field, "is not an allowed device")
        return path


def _parse_step(value: object, field: str, allowed: _Allowed) -> Step:
    if not isinstance(value, dict) or not isinstance(value.get("op"), str):
        _refuse(field, "must be an object with an op")
    kind = STEP_TYPES.get(value["op"])
    if kind is None:
        _refuse(f"{field}.op", f"must be one of {', '.join(STEP_TYPES)}")
    obj = _dataclass_object(value, field, kind, "op")
    given = {name: obj[name] for name in obj if name != "op"}
    checks: dict[str, Any] = {
        "path": _below_root,
        "mode": lambda v, f: _int(v, f, 0, 0o1777),
        "target": lambda v, f: _text(v, f, PATH_BYTES_MAX),
        "content": lambda v, f: _text(v, f, CONTENT_BYTES_MAX),
        "source": allowed.device if kind is BindDev else allowed.source,
        "size_bytes": lambda v, f: _int(v, f, 4096, TMPFS_BYTES_MAX),
        "inodes_max": lambda v, f: _int(v, f, 1, INODES_MAX),
        "exec_allowed": _bool,
        "pty": _bool,
        "paths": lambda v, f: tuple(_below_root(p, f) for p in _list(v, f, MASK_PATHS_MAX)),
    }
    step = kind(**{name: checks[name](item, f"{field}.{name}") for name, item in given.items()})
    if isinstance(step, Symlink) and not step.target:
        _refuse(f"{field}.target", "must not be empty")
    return step


def _parse_id_map(value: object, field: str) -> IdMap:
    obj = _dataclass_object(value, field, IdMap)
    numbers = {name: _int(item, f"{field}.{name}", 0, UID_MAX) for name, item in obj.items()}
    ids = IdMap(**numbers)
    if ids.count < 1 or ids.host_uid + ids.count > UID_MAX or ids.host_gid + ids.count > UID_MAX:
        _refuse(f"{field}.count", "the block leaves the range of ids")
    if ids.job_uid == 0:
        _refuse(f"{field}.job_uid", "executables never run as root of the cell")
    if ids.count == 1:
        if ids.init_uid != ids.job_uid:
            _refuse(f"{field}.init_uid", "a single id serves PID 1 and executables")
        return ids
    if ids.host_uid < 1 or ids.host_gid < 1:
        _refuse(field, "the block must not hold the host's root")
    if max(ids.init_uid, ids.job_uid, ids.job_gid) >= ids.count:
        _refuse(f"{field}.count", "the block is smaller than its ids")
    if ids.init_uid == ids.job_uid:
        _refuse(f"{field}.init_uid", "must differ from job_uid")
    return ids


def _parse_landlock(value: object, field: str) -> Landlock | None:
    if value is None:
        return None
    obj = _dataclass_object(value, field, Landlock)
    rules = []
    for i, item in enumerate(_list(obj["rules"], f"{field}.rules", LANDLOCK_RULES_MAX)):
        at = f"{field}.rules[{i}]"
        rule = _dataclass_object(item, at, LandlockRule)
        words = _list(rule["access"], f"{at}.access", len(LANDLOCK_ACCESS))
        access = tuple(_choice(w, f"{at}.access", LANDLOCK_ACCESS) for w in words)
        rules.append(LandlockRule(_path(rule["path"], f"{at}.path"), access))
    flags = {n: _bool(obj[n], f"{field}.{n}") for n in ("tcp", "scoped") if n in obj}
    return Landlock(tuple(rules), **flags)


def _parse_rlimits(value: object, field: str) -> tuple[Rlimit, ...]:
    result = []
    for i, item in enumerate(_list(value, field, RLIMITS_MAX)):
        at = f"{field}[{i}]"
        obj = _dataclass_object(item, at, Rlimit)
        name = _choice(obj["name"], f"{at}.name", RLIMIT_NAMES)
        soft = _int(obj["soft"], f"{at}.soft", 0, RLIM_INFINITY)
        hard = _int(obj["hard"], f"{at}.hard", 0, RLIM_INFINITY)
        if soft > hard:
            _refuse(f"{at}.soft", "must not exceed hard")
        result.append(Rlimit(name, soft, hard))
    return tuple(result)


def parse_plan(obj: object, *, source_roots: Sequence[str], devices: Collection[str] = ()) -> Plan:
    """JSON object -> Plan, or PlanError.

    `source_roots`: absolute normalised host directories under which bind sources may lie; `devices`: device
    nodes that `bind_dev` may show. The check is lexical; the executor resolves beneath the same roots.
    """
    allowed = _Allowed(tuple(source_roots), frozenset(devices))
    top = _dataclass_object(obj, "plan", Plan)
    _int(top.get("version", PLAN_VERSION), "plan.version", PLAN_VERSION, PLAN_VERSION)
    names = [_choice(n, "plan.namespaces", NAMESPACES) for n in _list(top["namespaces"], "plan.namespaces", 7)]
    plan = Plan(
        cell_id=_match(top["cell_id"], "plan.cell_id", _ID),
        level=_choice(top["level"], "plan.level", LEVELS),
        namespaces=tuple(n for n in NAMESPACES if n in names),
        id_map=_parse_id_map(top["id_map"], "plan.id_map"),
        hostname=_match(top["hostname"], "plan.hostname", _HOSTNAME),
        steps=tuple(
            _parse_step(s, f"plan.steps[{i}]", allowed)
            for i, s in enumerate(_list(top["steps"], "plan.steps", STEPS_MAX))
        ),
        seccomp_profile=_choice(top["seccomp_profile"], "plan.seccomp_profile", SECCOMP_PROFILES),
        landlock=_parse_landlock(top["landlock"], "plan.landlock"),
        rlimits=_parse_rlimits(top.get("rlimits", []), "plan.rlimits"),
    )
    _check_whole(plan)
    return plan


def _check_whole(plan: Plan) -> None:
    if "net" not in plan.namespaces and plan.seccomp_profile != "offline":
        _refuse("plan.seccomp_profile", "without a network namespace it must be offline")
    if sum(len(s.content.encode("utf-8", "surrogateescape")) for s in plan.steps if isinstance(s, File)) > (
        CONTENT_BYTES_MAX
    ):
        _refuse("plan.steps", f"literal files must total at most {CONTENT_BYTES_MAX} bytes")
    if plan.level == "process":
        if plan.namespaces or plan.steps:
            _refuse("plan.level", "a process-level plan has no namespaces and no steps")
        return
    if "pid" not in plan.namespaces or "mnt" not in plan.namespaces:
        _refuse("plan.namespaces", "a cell needs pid and mnt")
    if not plan.steps:
        _refuse("plan.steps", "a cell without steps has an empty root")
    if plan.id_map.count == 1 and "user" not in plan.namespaces:
        _refuse("plan.namespaces", "a single-id cell needs user")


def parse_exec(obj: object) -> ExecSpec:
    """JSON object -> ExecSpec, or PlanError. `env` is an object of strings."""
    top = _dataclass_object(obj, "exec", ExecSpec)
    argv = tuple(_text(a, "exec.argv", EXEC_BYTES_MAX) for a in _list(top["argv"], "exec.argv", ARGS_MAX))
    if not argv or not argv[0]:
        _refuse("exec.argv", "must name a program")
    env_obj = top.get("env", {})
    if not isinstance(env_obj, dict) or len(env_obj) > ENV_MAX:
        _refuse("exec.env", f"must be an object with at most {ENV_MAX} entries")
    env = tuple((_match(k, "exec.env", _ENV_NAME), _text(v, "exec.env", EXEC_BYTES_MAX)) for k, v in env_obj.items())
    size = sum(len(a.encode("utf-8", "surrogateescape")) + 1 for a in argv)
    size += sum(len(k) + len(v.encode("utf-8", "surrogateescape")) + 2 for k, v in env)
    if size > EXEC_BYTES_MAX:
        _refuse("exec", f"argv and env must total at most {EXEC_BYTES_MAX} bytes")
    kinds = _list(top.get("stdio", ["null"] * 3), "exec.stdio", 3)
    if len(kinds) != 3:
        _refuse("exec.stdio", "must have three entries")
    stdio = tuple(_choice(k, "exec.stdio", STDIO_KINDS) for k in kinds)
    return ExecSpec(
        exec_id=_match(top["exec_id"], "exec.exec_id", _ID),
        argv=argv,
        env=env,
        cwd=_path(top.get("cwd", "/"), "exec.cwd"),
        stdio=cast("tuple[str, str, str]", stdio),
        extra_fds=_int(top.get("extra_fds", 0), "exec.extra_fds", 0, EXTRA_FDS_MAX),
        rlimits=_parse_rlimits(top.get("rlimits", []), "exec.rlimits"),
        tty=_bool(top.get("tty", False), "exec.tty"),
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


def describe(plan: Plan) -> list[str]:
    """The plan as readable lines, in the order in which it is carried out."""
    ids = plan.id_map
    lines = [
        f"cell {plan.cell_id}, level {plan.level}, plan version {plan.version}",
        f"new namespaces: {', '.join(plan.namespaces) or 'none'}",
    ]
    if ids.count == 1:
        lines.append(f"ids: {ids.job_uid}:{ids.job_gid} inside is {ids.host_uid}:{ids.host_gid} on the host")
    else:
        last = ids.host_uid + ids.count - 1
        lines.append(
            f"ids: 0-{ids.count - 1} inside are {ids.host_uid}-{last} on the host; "
            f"PID 1 is {ids.init_uid}, executables are {ids.job_uid}:{ids.job_gid}"
        )
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
