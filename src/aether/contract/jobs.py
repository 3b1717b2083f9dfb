"""The job: the request, its states, its view, and the errors it can end with.

States and their names on `/v1/tasks` are one table, STATUS_NAMES. A request is parsed once into these
frozen types; nothing inside the roles reads a dict again.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any, Final, Literal, TypeVar

import msgspec

from aether.contract import ids, limits
from aether.contract.cellnames import check_executable, check_name
from aether.contract.cells import REQUIREMENTS, Images, InputFile, Interpreter, Limits, Sched, Usage
from aether.contract.errors import AetherError, ErrorBody
from aether.contract.network import NOTHING, Network, Wanted, check_network
from aether.contract.secrets import check_secrets, path_of

SCHEMA_VERSION: Final = "1.0"
T = TypeVar("T")

Kind = Literal["command", "model"]
ModelOp = Literal["predict_next_state", "encode_state", "score_sequence"]
MODEL_OPS: Final = ("predict_next_state", "encode_state", "score_sequence")
Effect = Literal["pure", "cell", "read", "control"]
"""Effect class of an operation or job: `pure` leaves nothing but its answer, `cell` starts a cell."""


class JobState(StrEnum):
    QUEUED = "queued"
    WAITING_APPROVAL = "waiting_approval"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    LOST = "lost"


TERMINAL: Final = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.TIMED_OUT, JobState.CANCELLED, JobState.LOST}
)
STATUS_NAMES: Final = {
    JobState.QUEUED: "PENDING",
    JobState.WAITING_APPROVAL: "PENDING",
    JobState.RUNNING: "RUNNING",
    JobState.SUCCEEDED: "OK",
    JobState.FAILED: "ERROR",
    JobState.TIMED_OUT: "TIMEOUT",
    JobState.CANCELLED: "CANCELED",
    JobState.LOST: "ERROR",
}


Stdio = Literal["logs", "pipe", "tty"]
"""Where an executable's standard streams lead: stdin nothing and output kept (`logs`); the same with a stdin that
`job.attach` writes to (`pipe`); a terminal that `job.attach` reads and writes, whose output is not kept (`tty`)."""


class CommandParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`params` of a command job. `outputs` are globs relative to the work directory.

    With `cell` (a name) it is an executable of that allocated cell, `executable` its own name there: of `limits` only
    `timeout_ms` and `grace_ms` count then, the rest are the cell's. Only such a job may have a `stdio` but `logs`.
    With `python` it is what would follow `python` on a command line, and a started interpreter may run it.
    `network` is what it may reach; without it nothing but its own loopback.
    `secrets` are variables of its environment by reference (`contract.secrets`), resolved when it starts.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: str = "/work"
    limits: Limits = Limits()
    outputs: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    cell: str | None = None
    executable: str | None = None
    stdio: Stdio = "logs"
    network: Network | None = None
    python: Interpreter | None = None
    images: Images | None = None
    secrets: dict[str, str] = {}

    def wanted(self) -> Wanted:
        """What an authority is asked to allow: its network, and each secret as `env:NAME source`."""
        network = self.network.wanted() if self.network is not None else NOTHING
        read = tuple(f"r:{path}" for source in self.secrets.values() if (path := path_of(source)) is not None)
        asked = tuple(f"env:{name} {source}" for name, source in self.secrets.items())
        return Wanted(network.hosts, (*network.credentials, *asked), (*network.paths, *read))


class CommandInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`inputs` of a command job: files to place in the work directory, by artifact digest."""

    files: tuple[InputFile, ...] = ()


class ModelParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`params` of a model job: `model` is `id` or `id@version`; the rest belongs to the operation."""

    model: str
    horizons_s: tuple[float, ...] | None = None


class JobRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /v0/jobs`. `params` and `inputs` are parsed by `parse_request` for their kind."""

    kind: Kind
    op: str
    params: dict[str, Any]
    inputs: dict[str, Any] = {}
    labels: tuple[str, ...] = ()
    schema_version: Literal["1.0"] = SCHEMA_VERSION


class ArtifactRef(msgspec.Struct, frozen=True, kw_only=True):
    """An output of a job: `name` is its path in the work directory."""

    name: str
    digest: str
    size_bytes: int
    media_type: str = "application/octet-stream"


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as every interface shows it; what does not apply is null. Times are RFC 3339 UTC."""

    job_id: str
    request_id: str
    kind: str
    op: str
    state: JobState
    tenant_id: str
    node_id: str
    principal: str
    attempt: int
    labels: tuple[str, ...]
    schema_version: str
    input_hash: str
    model_id: str | None = None
    model_version: str | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    error: ErrorBody | None = None
    result_digest: str | None = None
    result_bytes: int | None = None
    artifacts: tuple[ArtifactRef, ...] = ()
    usage: Usage | None = None
    cell_id: str | None = None
    exec_id: str | None = None
    intent_index: int | None = None
    outcome_index: int | None = None
    argv: tuple[str, ...] | None = None
    cell: str | None = None
    """The name of the allocated cell that it is an executable of."""
    executable: str | None = None
    approval_id: str | None = None
    """The approval that it waits or waited for."""
    replay_of: str | None = None
    """The job whose input it has again."""


_LABEL: Final = re.compile(limits.LABEL_PATTERN)
_SAFE_PART: Final = re.compile(r"[^\x00-\x1f\x7f/]+")
_CPU_LIST: Final = re.compile(limits.CPU_LIST_PATTERN)
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def parse_command(request: JobRequest) -> tuple[CommandParams, CommandInputs]:
    """The typed parameters of a command job; raises AetherError BAD_FIELD naming the field."""
    if request.op != "run":
        raise AetherError("BAD_FIELD", f"cannot run a command job: op {request.op!r} is not 'run'")
    params = _convert(request.params, CommandParams, "params")
    inputs = _convert(request.inputs, CommandInputs, "inputs")
    _check_argv(params)
    _check_python(params)
    check_require(params.require)
    _check_env(params.env)
    check_bounds(params.limits)
    check_images(params.images)
    _check_paths(params, inputs)
    check_secrets(params.secrets, params.env)
    if params.network is not None:
        if params.cell is not None:
            raise AetherError("BAD_FIELD", "cannot run a command job: params.network is the cell's, not its guests'")
        check_network(params.network)
    if params.cell is not None:
        check_name(params.cell)
        if params.images is not None:
            raise AetherError("BAD_FIELD", "cannot run a command job: params.images are the cell's, not its guests'")
    if params.executable is not None:
        check_executable(params.executable)
    if params.cell is None and (params.executable is not None or params.stdio != "logs"):
        raise AetherError("BAD_FIELD", "cannot run a command job: params.executable and stdio need params.cell")
    return params, inputs


def parse_model(request: JobRequest) -> ModelParams:
    """The typed parameters of a model job; its inputs are the runtime's to check. Raises BAD_FIELD."""
    if request.op not in MODEL_OPS:
        raise AetherError("BAD_FIELD", f"cannot run a model job: op {request.op!r} is none of {', '.join(MODEL_OPS)}")
    params = _convert(request.params, ModelParams, "params")
    if not params.model or len(params.model) > 128:
        raise AetherError("BAD_FIELD", "cannot run a model job: params.model is empty or too long")
    return params


def check_labels(labels: tuple[str, ...]) -> None:
    """Labels are few, short and lower case; raises BAD_FIELD."""
    if len(labels) > limits.LABELS_MAX:
        raise AetherError("BAD_FIELD", f"cannot accept {len(labels)} labels: the bound is {limits.LABELS_MAX}")
    for label in labels:
        if _LABEL.fullmatch(label) is None:
            raise AetherError("BAD_FIELD", f"cannot accept label {label[:80]!r}: it must match {limits.LABEL_PATTERN}")


def check_relative_path(path: str, what: str) -> None:
    """A relative path below the work directory without `.`/`..`/control characters; raises BAD_FIELD."""
    parts = path.split("/")
    bad = (
        not path
        or len(path.encode("utf-8", "surrogatepass")) > limits.PATH_BYTES_MAX
        or any(part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts)
        or any(_SAFE_PART.fullmatch(part) is None for part in parts)
    )
    if bad:
        raise AetherError("BAD_FIELD", f"cannot accept {what} {path[:80]!r}: not a plain relative path")


def _convert(value: Any, to: type[T], what: str) -> T:
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        raise AetherError("BAD_FIELD", f"cannot read {what}: {str(error)[:400]}") from error


def _check_argv(params: CommandParams) -> None:
    argv = params.argv
    if not argv or not argv[0]:
        raise AetherError("BAD_FIELD", "cannot run a command job: params.argv is empty")
    if len(argv) > limits.ARGV_ITEMS_MAX or sum(len(a.encode()) + 1 for a in argv) > limits.ARGV_BYTES_MAX:
        raise AetherError("BAD_FIELD", "cannot run a command job: params.argv is too long")
    if any("\0" in a for a in argv):
        raise AetherError("BAD_FIELD", "cannot run a command job: params.argv holds a NUL character")


def _check_python(params: CommandParams) -> None:
    """`argv` as the interpreter reads it: a script, -c CODE or -m MODULE; raises BAD_FIELD."""
    python = params.python
    if python is None:
        return
    first = params.argv[0]
    if params.cell is not None or params.images is not None:
        raise AetherError("BAD_FIELD", "cannot run a command job: params.python goes without cell and images")
    if first.startswith("-") and (first not in ("-c", "-m") or len(params.argv) < 2):
        why = "params.argv begins with a script, or with -c CODE or -m MODULE"
        raise AetherError("BAD_FIELD", f"cannot run a command job with params.python: {why}")
    if len(python.imports) > limits.PYTHON_IMPORTS_MAX:
        why = f"params.python.imports has more than {limits.PYTHON_IMPORTS_MAX}"
        raise AetherError("BAD_FIELD", f"cannot run a command job: {why}")
    for name in python.imports:
        if len(name) > limits.PYTHON_MODULE_CHARS_MAX or not all(part.isidentifier() for part in name.split(".")):
            raise AetherError("BAD_FIELD", f"cannot import {name[:80]!r}: not the name of a module")


def check_require(words: tuple[str, ...]) -> None:
    """Raises BAD_FIELD for a word that is neither a rung nor a mechanism."""
    for word in words:
        if word not in REQUIREMENTS:
            raise AetherError(
                "BAD_FIELD", f"cannot require {word[:80]!r}: it is none of {', '.join(sorted(REQUIREMENTS))}"
            )


def _check_env(env: dict[str, str]) -> None:
    if (
        len(env) > limits.ENV_ITEMS_MAX
        or sum(len(k) + len(v.encode()) + 2 for k, v in env.items()) > limits.ENV_BYTES_MAX
    ):
        raise AetherError("BAD_FIELD", "cannot run a command job: params.env is too large")
    for name, value in env.items():
        if _ENV_NAME.fullmatch(name) is None or "\0" in value:
            raise AetherError("BAD_FIELD", f"cannot run a command job: params.env has a bad entry {name[:80]!r}")


def check_bounds(asked: Limits) -> None:
    """Raises BAD_FIELD naming the limit that is out of bounds."""
    bounds = {
        "memory_bytes": (limits.MEMORY_BYTES_MIN, 1 << 50),
        "cpu_millis": (limits.CPU_MILLIS_MIN, 1_024_000),
        "pids": (1, limits.PIDS_MAX),
        "tmp_bytes": (0, 1 << 40),
        "nofile": (16, 1 << 20),
        "file_bytes": (0, 1 << 50),
        "disk_bytes": (limits.DISK_BYTES_MIN, 1 << 50),
        "timeout_ms": (1, limits.TIMEOUT_MS_MAX),
        "grace_ms": (0, limits.STOP_GRACE_MS_MAX),
    }
    bounds |= dict.fromkeys(("memory_min_bytes", "memory_low_bytes", "memory_high_bytes", "swap_bytes"), (0, 1 << 50))
    bounds |= dict.fromkeys(("cpu_weight", "io_weight"), (1, limits.WEIGHT_MAX))
    bounds |= dict.fromkeys(("io_read_bps", "io_write_bps", "io_read_iops", "io_write_iops"), (1, 1 << 50))
    for name, (low, high) in bounds.items():
        value = getattr(asked, name)
        if value is not None and not low <= value <= high:
            raise AetherError("BAD_FIELD", f"cannot accept limits.{name} = {value}: not within {low}..{high}")
    for name in ("cpuset_cpus", "cpuset_mems"):
        text = getattr(asked, name)
        if text is not None and (len(text) > limits.CPU_LIST_CHARS_MAX or not _CPU_LIST.fullmatch(text)):
            raise AetherError("BAD_FIELD", f"cannot accept limits.{name} = {text[:80]!r}: no list such as 0-3,6")
    if asked.sched is not None:
        _check_sched(asked.sched)


def _check_sched(asked: Sched) -> None:
    """What does not go together, as far as a JSON Schema can say it; the spawner checks it again, and that the times
    of a deadline rise."""
    times = (asked.runtime_us, asked.deadline_us, asked.period_us)
    priorities = range(1, 100) if asked.policy in ("fifo", "rr") else range(1)
    wrong = (
        (not -20 <= asked.nice <= 19, "nice goes from -20 to 19"),
        (not 0 <= asked.io_priority <= 7, "io_priority goes from 0 to 7"),
        (asked.nice != 0 and asked.policy not in ("other", "batch"), "nice goes with other and batch"),
        (
            asked.priority not in priorities,
            "a priority from 1 to 99 goes with fifo and rr, and with them alone",
        ),
        (
            (asked.policy == "deadline") != any(times)
            or (asked.policy == "deadline" and not 2 <= min(times) <= max(times) <= limits.SCHED_PERIOD_US_MAX),
            f"deadline, and it alone, takes three times of 2 to {limits.SCHED_PERIOD_US_MAX} us",
        ),
    )
    for is_wrong, why in wrong:
        if is_wrong:
            raise AetherError("BAD_FIELD", f"cannot accept limits.sched: {why}")


def check_images(images: Images | None) -> None:
    """Digests of images, and at most one that changes are made to; raises BAD_ID, BAD_FIELD."""
    if images is None:
        return
    for digest in (images.root, images.work):
        if digest is not None:
            ids.parse_digest(digest)
    if images.writable and (images.root is None or images.work is not None):
        raise AetherError("BAD_FIELD", "cannot make a root writable: it needs images.root, and no images.work")
    if images.keep_diff and images.changed is None:
        raise AetherError("BAD_FIELD", "cannot keep changes: neither the root nor /work lies over an image")


def _check_paths(params: CommandParams, inputs: CommandInputs) -> None:
    if len(inputs.files) > limits.INPUT_FILES_MAX:
        raise AetherError(
            "BAD_FIELD", f"cannot accept {len(inputs.files)} input files: the bound is {limits.INPUT_FILES_MAX}"
        )
    seen: set[str] = set()
    for file in inputs.files:
        check_relative_path(file.path, "input file")
        if file.path in seen:
            raise AetherError("BAD_FIELD", f"cannot accept input file {file.path[:80]!r} twice")
        seen.add(file.path)
    if len(params.outputs) > limits.OUTPUT_GLOBS_MAX:
        raise AetherError(
            "BAD_FIELD", f"cannot accept {len(params.outputs)} outputs: the bound is {limits.OUTPUT_GLOBS_MAX}"
        )
    for glob in params.outputs:
        check_relative_path(glob, "output")
    cwd = params.cwd
    rooted = params.images is not None and params.images.root is not None and cwd.startswith("/")
    inside = cwd == "/work" or cwd.startswith("/work/") or rooted
    plain = cwd == "/" or not any(part in ("", ".", "..") for part in cwd[1:].split("/"))
    if not inside or not plain or "\0" in cwd or len(cwd.encode()) > limits.PATH_BYTES_MAX:
        raise AetherError("BAD_FIELD", f"cannot accept cwd {cwd[:80]!r}: it must be /work or below")
