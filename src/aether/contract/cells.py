"""What a cell is asked to be, what it used, how its executable ended, what the kernel enforced."""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

import msgspec

from aether.contract import limits
from aether.contract.cellplan import DRIVERS
from aether.contract.network import Network

Level = Literal["process", "cell", "gvisor"]
RUNGS: Final = ("process", "cell", "wasm", "gvisor", "microvm", "pod")
"""Kinds of isolation by name; a rung without a driver on this node cannot be required."""
Requirement = Literal[
    "process", "cell", "userns", "netns", "pidns", "mountns", "seccomp", "landlock", "cgroup-memory", "cgroup-cpu",
    "cgroup-pids",
]  # fmt: skip

REQUIREMENTS: Final = frozenset(RUNGS) | frozenset(DRIVERS) | frozenset(get_args(Requirement))
"""What `require` may name: a rung, a mechanism, or the driver that is to build the cell."""


SchedPolicy = Literal["other", "batch", "idle", "fifo", "rr", "deadline"]
IoClass = Literal["none", "realtime", "best-effort", "idle"]


class Sched(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the kernel schedules everything in a cell (sched(7), ioprio_set(2)).

    `priority` (1..99) goes with fifo and rr; the three times with deadline, for the executable itself and not for what
    it forks; `nice` (0 leaves the node's) with other and batch; `io_class` none follows the nice value.
    """

    policy: SchedPolicy = "other"
    priority: int = 0
    runtime_us: int = 0
    deadline_us: int = 0
    period_us: int = 0
    nice: int = 0
    io_class: IoClass = "none"
    io_priority: int = 4

    @property
    def raises(self) -> bool:
        """Whether it puts the cell before others: the policy decides who may."""
        return self.policy in ("fifo", "rr", "deadline") or self.nice < 0 or self.io_class == "realtime"


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of a cell. Bytes, thousandths of a CPU, counts; `timeout_ms` is wall time from the start.

    Null leaves the kernel's default. memory: `memory_bytes` kills, `high` slows down and reclaims, `low` and `min` are
    kept from being reclaimed; weights (1..10000, default 100) share what is contended; `cpuset_*` are lists such as
    `0-3,6`; the `io_*` rates hold for the disk of the state directory; `disk_bytes` is what the cell keeps there. What
    a host cannot hold is in the sandbox report's `missing`.
    """

    memory_bytes: int = limits.MEMORY_BYTES_DEFAULT
    cpu_millis: int = limits.CPU_MILLIS_DEFAULT
    pids: int = limits.PIDS_DEFAULT
    tmp_bytes: int = limits.TMP_BYTES_DEFAULT
    nofile: int = limits.NOFILE_DEFAULT
    file_bytes: int = limits.FILE_BYTES_DEFAULT
    disk_bytes: int = limits.DISK_BYTES_DEFAULT
    timeout_ms: int = limits.TIMEOUT_MS_DEFAULT
    grace_ms: int = limits.STOP_GRACE_MS_DEFAULT
    memory_min_bytes: int | None = None
    memory_low_bytes: int | None = None
    memory_high_bytes: int | None = None
    swap_bytes: int | None = None
    cpu_weight: int | None = None
    cpuset_cpus: str | None = None
    cpuset_mems: str | None = None
    io_weight: int | None = None
    io_read_bps: int | None = None
    io_write_bps: int | None = None
    io_read_iops: int | None = None
    io_write_iops: int | None = None
    sched: Sched | None = None

    @property
    def raises(self) -> bool:
        """Whether they put the cell before others."""
        return self.sched is not None and self.sched.raises


class InputFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file to place at `path` (relative to /work): an artifact's digest. `mode` is 0o644 or 0o755."""

    path: str
    artifact: str
    executable: bool = False


class Images(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a cell is made of besides this host's own programs: images, by digest.

    `root` is the whole root in place of the host's, read-only unless `writable`; `work` lies under /work, whose
    changes go on top. What is changed in one of them is kept until the cell is freed; with `keep_diff` a job keeps it
    as artifacts.
    """

    root: str | None = None
    writable: bool = False
    work: str | None = None
    keep_diff: bool = False

    @property
    def changed(self) -> str | None:
        """The image that changes are made to; None when there is none."""
        return self.root if self.writable else self.work


class Interpreter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Run `argv` by this installation's Python, started ahead where it can be; `imports` are modules it has loaded."""

    imports: tuple[str, ...] = ()


class CellSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The isolation a job gets. `argv[0]` is looked up in the cell's PATH; `cwd` is inside the cell.

    `readonly_dirs` are host directories shown read-only at `/mnt/<name>` (only the authority fills them:
    model packages, for instance). `channel` gives the executable a connected SOCK_STREAM socket as fd 3.
    `require` lists levels and mechanisms without which the cell must not start. Without `isolate_network` the cell
    shares the host's network, without `isolate_process` its processes, System V IPC and host name are the host's.
    `network` is what it may reach through egressd; without it there is no way out.
    `secrets` are variables by reference, which the authority puts into `env` right before the executable starts.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = "/work"
    limits: Limits = Limits()
    require: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    readonly_dirs: dict[str, str] = {}
    channel: bool = False
    images: Images | None = None
    isolate_network: bool = True
    isolate_process: bool = True
    network: Network | None = None
    python: Interpreter | None = None
    secrets: dict[str, str] = {}


class ExitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How an executable ended: exactly one of `code` and `signal` is set, or both are null when unknown."""

    code: int | None = None
    signal: int | None = None
    oom_killed: bool = False
    timed_out: bool = False
    reason: str | None = None
    """`spawner-died`, `killed` (stop), ... when the end was not the executable's own."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What was used; null where nothing measured it. `basis` is `measured` or `apportioned` per figure."""

    wall_us: int | None = None
    cpu_user_us: int | None = None
    cpu_system_us: int | None = None
    memory_peak_bytes: int | None = None
    io_read_bytes: int | None = None
    io_write_bytes: int | None = None
    pids_peak: int | None = None
    oom_kills: int | None = None
    throttled_us: int | None = None
    stdout_bytes: int | None = None
    stderr_bytes: int | None = None
    output_dropped_bytes: int | None = None
    batch_size: int | None = None
    basis: dict[str, str] = {}


class Contention(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell had to wait for; empty or null where the kernel does not tell.

    `memory_events`: how often a limit was met (`low`, `high`, `max`, `oom`). `pressure`: of `cpu`, `memory` and `io`
    the time in which some or all (`full`) processes waited, in us and as a share of the last 10 s (accounting/psi.rst).
    """

    throttled_count: int | None = None
    memory_events: dict[str, int] = {}
    pressure: dict[str, dict[str, float]] = {}


class SandboxReport(msgspec.Struct, frozen=True, kw_only=True):
    """The sandbox as the kernel enforced it (read back, not as asked); logged by digest.

    `enforced` maps a mechanism to what was seen; `missing` maps a mechanism to the reason it is absent.
    """

    level: str
    executor: str
    enforced: dict[str, Any]
    missing: dict[str, str]
    uid: int | None = None
    plan_digest: str | None = None


class ExecEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an executable as the supervisor hands it on."""

    cell_id: str
    exec_id: str
    exit: ExitStatus
    usage: Usage
