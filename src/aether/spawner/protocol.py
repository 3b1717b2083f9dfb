"""The closed list of operations: their fields, strictly read, and the shape of replies and events.

One JSON object per SOCK_SEQPACKET message, at most SPAWNER_MESSAGE_BYTES_MAX; descriptors by SCM_RIGHTS.
    request  {"id": int, "op": str, "key": str, "args": {...}}
    reply    {"id": int, "ok": {...}} or {"id": int, "error": {"code", "message", "remedy"}}
    event    {"ev": str, ...}
Unknown operations and fields, missing fields and wrong types are refused. `key` makes cell.create and exec.start
idempotent: a repetition gets the existing cell or executable. Answers that may be large are a memfd of JSON
that comes with `{"ok": {"fd": 0}}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aether.contract import limits

PROTOCOL_VERSION = limits.PROTOCOL_VERSION
ID_MAX = 1 << 53
FILES_PER_MESSAGE_MAX = 200
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class RefusedError(Exception):
    """An operation that is not carried out: `code` is a key of contract.errors.KINDS."""

    def __init__(self, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.request_id = 0


Reader = Callable[[Any, str], Any]


def _bad(field: str, why: str) -> RefusedError:
    return RefusedError("PROTOCOL", f"cannot read {field[:120]}: {why}")


def integer(low: int, high: int) -> Reader:
    def read(value: Any, field: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _bad(field, f"not an integer within {low}..{high}")
        return value

    return read


def boolean(value: Any, field: str) -> bool:
    if not isinstance(value, bool):
        raise _bad(field, "not a boolean")
    return value


def text(chars_max: int) -> Reader:
    def read(value: Any, field: str) -> str:
        if not isinstance(value, str) or len(value) > chars_max or "\0" in value:
            raise _bad(field, f"not a string of at most {chars_max} characters")
        return value

    return read


def identifier(value: Any, field: str) -> str:
    """Safe as one part of a path: no slash, no leading dot."""
    if not isinstance(value, str) or _ID.fullmatch(value) is None:
        raise _bad(field, "not an identifier")
    return value


def anything(value: Any, field: str) -> Any:
    """Read by contract.cellplan instead."""
    return value


def optional(of: Reader) -> Reader:
    return lambda value, field: None if value is None else of(value, field)


def choice(*words: str) -> Reader:
    def read(value: Any, field: str) -> str:
        if value not in words:
            raise _bad(field, f"not one of {', '.join(words)}")
        return str(value)

    return read


def array(of: Reader, items_max: int, items_min: int = 0) -> Reader:
    def read(value: Any, field: str) -> list[Any]:
        if not isinstance(value, list) or not items_min <= len(value) <= items_max:
            raise _bad(field, f"not an array of {items_min}..{items_max} items")
        return [of(item, f"{field}[{number}]") for number, item in enumerate(value)]

    return read


def record(required: Mapping[str, Reader], **defaults: tuple[Reader, Any]) -> Reader:
    """An object with all of `required` and some of `defaults`, and nothing else."""

    def read(value: Any, field: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _bad(field, "not an object")
        for name in value:
            if name not in required and name not in defaults:
                raise _bad(f"{field}.{name}", "unknown field")
        out: dict[str, Any] = {}
        for name, reader in required.items():
            if name not in value:
                raise _bad(f"{field}.{name}", "missing")
            out[name] = reader(value[name], f"{field}.{name}")
        for name, (reader, default) in defaults.items():
            out[name] = reader(value[name], f"{field}.{name}") if name in value else default
        return out

    return read


_WALL = optional(integer(1, limits.TIMEOUT_MS_MAX))
_GRACE = integer(0, limits.STOP_GRACE_MS_MAX)
_LOG = record(
    {},
    rate=(integer(1, 1 << 40), limits.LOG_RATE_BYTES_PER_S),
    burst=(integer(4096, 1 << 40), limits.LOG_BURST_BYTES),
    head=(integer(0, 1 << 40), limits.LOG_HEAD_BYTES_MAX),
    tail=(integer(0, 1 << 40), limits.LOG_TAIL_BYTES_MAX),
)
_BYTES = optional(integer(0, 1 << 50))
_WEIGHT = optional(integer(1, limits.WEIGHT_MAX))
_RATE = optional(integer(1, 1 << 50))
_CPU_LIST = optional(text(limits.CPU_LIST_CHARS_MAX))
_LIMITS = record(
    {},
    memory_bytes=(optional(integer(1 << 20, 1 << 50)), None),
    memory_min_bytes=(_BYTES, None),
    memory_low_bytes=(_BYTES, None),
    memory_high_bytes=(_BYTES, None),
    swap_bytes=(_BYTES, None),
    cpu_millis=(optional(integer(1, 1 << 20)), None),
    cpu_weight=(_WEIGHT, None),
    cpuset_cpus=(_CPU_LIST, None),
    cpuset_mems=(_CPU_LIST, None),
    pids=(optional(integer(1, 1 << 22)), None),
    io_weight=(_WEIGHT, None),
    io_read_bps=(_RATE, None),
    io_write_bps=(_RATE, None),
    io_read_iops=(_RATE, None),
    io_write_iops=(_RATE, None),
    disk_bytes=(optional(integer(limits.DISK_BYTES_MIN, 1 << 50)), None),
)
_SCHED = record(
    {},
    policy=(choice("other", "batch", "idle", "fifo", "rr", "deadline"), "other"),
    priority=(integer(0, 99), 0),
    runtime_us=(integer(0, limits.SCHED_PERIOD_US_MAX), 0),
    deadline_us=(integer(0, limits.SCHED_PERIOD_US_MAX), 0),
    period_us=(integer(0, limits.SCHED_PERIOD_US_MAX), 0),
    nice=(integer(-20, 19), 0),
    io_class=(choice("none", "realtime", "best-effort", "idle"), "none"),
    io_priority=(integer(0, 7), 4),
)
_FILES = array(record({"path": text(limits.PATH_BYTES_MAX), "mode": integer(0, 0o777)}), FILES_PER_MESSAGE_MAX)
_OWNER = record(
    {
        "uid": integer(0, 1 << 32),
        "gid": integer(0, 1 << 32),
        "uid_first": integer(0, 1 << 32),
        "uid_count": integer(1, 1 << 17),
    }
)
_EXEC = record(
    {"spec": anything, "stdio": array(choice("null", "fd", "log", "tty", "pipe"), 3, 3)},
    wall_ms_max=(_WALL, None),
    grace_ms=(_GRACE, limits.STOP_GRACE_MS_DEFAULT),
    log=(_LOG, _LOG({}, "log")),
)
_CELL = {"cell": identifier}
_SIZE = integer(1, limits.TERMINAL_SIZE_MAX)

OPERATIONS: Mapping[str, Reader] = {
    "hello": record({"protocol_version": integer(0, 1 << 16)}, events=(boolean, False)),
    "probe": record({}),
    "cell.bundle": record({"plan": anything}),
    "blueprint.keep": record({"plan": anything, "limits": _LIMITS}, prepare=(boolean, False), zygote=(anything, None)),
    "cell.create": record(
        {},
        plan=(anything, None),
        limits=(_LIMITS, _LIMITS({}, "limits")),
        blueprint=(optional(record({"digest": text(64)} | _CELL)), None),
        files=(_FILES, []),
        work=(boolean, False),
        exec=(optional(_EXEC), None),
        once=(boolean, False),
        wall_ms_max=(_WALL, None),
        grace_ms=(_GRACE, limits.STOP_GRACE_MS_DEFAULT),
        parent=(optional(identifier), None),
        nestable=(boolean, False),
        sched=(optional(_SCHED), None),
    ),
    "exec.start": record(_CELL | {"exec": _EXEC}),
    "exec.signal": record(_CELL | {"exec": identifier, "signo": integer(1, 64)}),
    "cell.listen": record(_CELL, exec=(optional(identifier), None)),
    "exec.stop": record(_CELL | {"exec": identifier, "grace_ms": _GRACE}),
    "exec.terminal": record(_CELL | {"exec": identifier}),
    "exec.window": record(_CELL | {"exec": identifier, "rows": _SIZE, "columns": _SIZE}),
    "cell.stop": record(_CELL, grace_ms=(_GRACE, limits.STOP_GRACE_MS_DEFAULT)),
    "cell.kill": record(_CELL),
    "cell.freeze": record(_CELL | {"frozen": boolean}),
    "cell.limit": record(_CELL | {"limits": _LIMITS}),
    "cell.usage": record(_CELL),
    "cell.trace": record(
        _CELL | {"on": boolean}, duration_ms=(integer(1, limits.TRACE_MS_MAX), limits.TRACE_MS_DEFAULT)
    ),
    "cell.list": record({}),
    "cell.free": record(_CELL),
    "exit.ack": record(_CELL | {"exec": identifier}),
    "work.prepare": record(_CELL | {"owner": _OWNER, "files": _FILES}),
    "work.collect": record(
        _CELL | {"globs": array(text(limits.PATH_BYTES_MAX), limits.OUTPUT_GLOBS_MAX)},
        files_max=(integer(0, limits.OUTPUT_FILES_MAX), limits.OUTPUT_FILES_MAX),
        bytes_max=(integer(0, limits.OUTPUT_BYTES_MAX), limits.OUTPUT_BYTES_MAX),
    ),
    "work.diff": record(_CELL),
    "work.put": record(_CELL | {"path": text(limits.PATH_BYTES_MAX), "mode": integer(0, 0o777)}),
    "work.list": record(_CELL | {"path": text(limits.PATH_BYTES_MAX)}),
    "work.open": record(_CELL | {"path": text(limits.PATH_BYTES_MAX)}),
}
KEYED = frozenset({"cell.create", "exec.start"})


@dataclass(frozen=True, slots=True)
class Request:
    """One operation, its fields read; `key` is empty where it is not needed."""

    id: int
    op: str
    key: str
    args: dict[str, Any]


def parse_request(data: bytes) -> Request:
    """Raises RefusedError, with `request_id` set when the request could be identified."""
    request_id = 0
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or not set(value) <= {"id", "op", "key", "args"}:
            raise _bad("the request", "not an object of id, op, key, args")
        request_id = integer(1, ID_MAX)(value.get("id"), "id")
        reader = OPERATIONS.get(value["op"]) if isinstance(value.get("op"), str) else None
        if reader is None:
            raise _bad("op", "no such operation")
        key = text(limits.IDEMPOTENCY_KEY_CHARS_MAX)(value.get("key", ""), "key")
        if value["op"] in KEYED and not key:
            raise _bad("key", "missing")
        return Request(request_id, value["op"], key, reader(value.get("args", {}), "args"))
    except RefusedError as refused:
        refused.request_id = request_id
        raise
    except (ValueError, RecursionError) as error:
        unreadable = _bad("the request", "not JSON")
        unreadable.request_id = request_id
        raise unreadable from error


def encode_ok(request_id: int, value: dict[str, Any]) -> bytes:
    return json.dumps({"id": request_id, "ok": value}, separators=(",", ":")).encode()


def encode_error(request_id: int, refused: RefusedError) -> bytes:
    error = {"code": refused.code, "message": refused.message[:2000], "remedy": refused.remedy[:500]}
    return json.dumps({"id": request_id, "error": error}, separators=(",", ":")).encode()


def encode_event(name: str, value: dict[str, Any]) -> bytes:
    return json.dumps({"ev": name, **value}, separators=(",", ":")).encode()
