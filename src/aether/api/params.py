"""Query parameters: each is a name, a schema, and one strict parser from text to a request field.

Parsers are pure and total: they return the value or raise AetherError BAD_REQUEST naming the parameter.
An unknown parameter and one given twice (unless it is a list) are refused, so a misspelt filter is never
silently ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import parse_qsl

from aether.contract import approvals, cellnames, ids, images, limits, ticketcalls
from aether.contract.approvals import ApprovalState
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, check_labels, check_relative_path

_WAIT: Final = re.compile(r"([0-9]{1,6})(\.[0-9]{1,3})?(ms|s|m)?", re.ASCII)
_CURSOR: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_OFFSET_MAX: Final = (1 << 53) - 1
_UNIT_MS: Final = {"ms": 1.0, "s": 1000.0, "m": 60_000.0}
QUERY_PARAMETERS_MAX: Final = 32


@dataclass(frozen=True, slots=True, eq=False)
class Param:
    """One query parameter: `field` of the request it fills, its schema, whether it repeats. Compared by identity."""

    name: str
    field: str
    schema: Mapping[str, Any]
    parse: Callable[[str], Any]
    summary: str
    repeats: bool = False
    required: bool = False


def _refuse(name: str, text: str, why: str) -> AetherError:
    return AetherError("BAD_REQUEST", f"cannot read parameter {name}={text[:80]!r}: {why}")


def parse_wait(text: str) -> int:
    """`10s`, `500ms`, `1m` or plain seconds, as ms; cut to WAIT_S_MAX."""
    match = _WAIT.fullmatch(text)
    if match is None:
        raise _refuse("wait", text, "not a duration such as 10s or 500ms")
    whole, fraction, unit = match.groups()
    asked_ms = float(whole + (fraction or "")) * _UNIT_MS[unit or "s"]
    return min(int(asked_ms), int(limits.WAIT_S_MAX * 1000))


def parse_limit(text: str) -> int:
    """1..PAGE_ITEMS_MAX."""
    if not (text.isascii() and text.isdigit()) or len(text) > 6 or not 1 <= int(text) <= limits.PAGE_ITEMS_MAX:
        raise _refuse("limit", text, f"not within 1..{limits.PAGE_ITEMS_MAX}")
    return int(text)


def parse_flag(text: str) -> bool:
    """`1`/`true` or `0`/`false`."""
    if text in ("1", "true"):
        return True
    if text in ("0", "false"):
        return False
    raise _refuse("follow", text, "not one of 1, true, 0, false")


def parse_offset(text: str) -> int:
    """A byte offset below 2^53."""
    if not (text.isascii() and text.isdigit()) or len(text) > 16 or int(text) > _OFFSET_MAX:
        raise _refuse("cursor", text, "not a byte offset")
    return int(text)


def parse_cursor(text: str) -> str:
    """A page cursor, as the previous page's `next_cursor` named it."""
    if _CURSOR.fullmatch(text) is None:
        raise _refuse("cursor", text, "not a cursor of a previous page")
    return text


def parse_stream(text: str) -> str:
    """`stdout`, `stderr` or `all`."""
    if text not in ("stdout", "stderr", "all"):
        raise _refuse("stream", text, "not one of stdout, stderr, all")
    return text


def parse_state(text: str) -> JobState:
    """A job state's name."""
    try:
        return JobState(text)
    except ValueError:
        raise _refuse("state", text, f"not one of {', '.join(s.value for s in JobState)}") from None


def parse_approval_state(text: str) -> ApprovalState:
    """The name of an approval's state."""
    try:
        return ApprovalState(text)
    except ValueError:
        raise _refuse("state", text, f"not one of {', '.join(s.value for s in ApprovalState)}") from None


def parse_label(text: str) -> str:
    """A label."""
    try:
        check_labels((text,))
    except AetherError as error:
        raise _refuse("label", text, f"it must match {limits.LABEL_PATTERN}") from error
    return text


def parse_approval(text: str) -> str:
    """The id of an approval."""
    return ids.parse(ids.APPROVAL, text)


def parse_job(text: str) -> str:
    """A job id."""
    return ids.parse(ids.JOB, text)


def parse_cell(text: str) -> str:
    """A cell's id or name, its labels separated by `:` or `/`."""
    return cellnames.reference(text)


def parse_file(text: str) -> str:
    """A plain relative path below the work directory."""
    try:
        check_relative_path(text, "file")
    except AetherError as error:
        raise _refuse("path", text, "not a plain relative path") from error
    return text


def parse_directory(text: str) -> str:
    """The same, or nothing for the work directory itself."""
    return parse_file(text) if text else text


def parse_executable(text: str) -> bool:
    """`1`/`true` or `0`/`false`."""
    if text in ("1", "true", "0", "false"):
        return text in ("1", "true")
    raise _refuse("executable", text, "not one of 1, true, 0, false")


_UUID7: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
JOB_ID_SCHEMA: Final = {"type": "string", "pattern": f"^job_{_UUID7}$"}
DIGEST_SCHEMA: Final = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}

WAIT: Final = Param(
    "wait",
    "wait_ms",
    {"type": "string", "pattern": r"^[0-9]{1,6}(\.[0-9]{1,3})?(ms|s|m)?$", "examples": ["10s"]},
    parse_wait,
    f"Wait up to this long for a terminal state: 10s, 500ms, 1m. Cut to {limits.WAIT_S_MAX:.0f}s.",
)
LIMIT: Final = Param(
    "limit",
    "limit",
    {"type": "integer", "minimum": 1, "maximum": limits.PAGE_ITEMS_MAX, "default": limits.PAGE_ITEMS_DEFAULT},
    parse_limit,
    "How many entries a page holds.",
)
STATE: Final = Param(
    "state",
    "state",
    {"type": "array", "items": {"type": "string", "enum": [s.value for s in JobState]}},
    parse_state,
    "Only jobs in this state; may be repeated.",
    repeats=True,
)
JOB_CURSOR: Final = Param(
    "cursor", "cursor", JOB_ID_SCHEMA, parse_job, "Continue after this job: the previous page's `next_cursor`."
)
CURSOR: Final = Param(
    "cursor",
    "cursor",
    {"type": "string", "pattern": f"^{_CURSOR.pattern}$"},
    parse_cursor,
    "Continue after the previous page: its `next_cursor`.",
)
FOLLOW: Final = Param(
    "follow",
    "follow",
    {"type": "string", "enum": ["1", "true", "0", "false"], "default": "0"},
    parse_flag,
    "Keep the answer open until the executable ends.",
)
STREAM: Final = Param(
    "stream",
    "stream",
    {"type": "string", "enum": ["stdout", "stderr", "all"], "default": "all"},
    parse_stream,
    "Which output.",
)
OFFSET: Final = Param(
    "cursor",
    "cursor",
    {"type": "integer", "minimum": 0, "maximum": _OFFSET_MAX, "default": 0},
    parse_offset,
    "Start at this byte of the output.",
)
CELL_SCHEMA: Final = {"type": "string", "pattern": cellnames.PATH_NAME_PATTERN}
WITHIN: Final = Param("within", "within", CELL_SCHEMA, parse_cell, "Only this cell and those in it.")
START: Final = Param(
    "start",
    "start",
    {"type": "integer", "minimum": 0, "maximum": _OFFSET_MAX, "default": 0},
    parse_offset,
    "Begin at this index of the log: the previous page's `next_index`.",
)
_PART: Final = r"(?!\.{1,2}(/|$))[^\u0000-\u001f\u007f/]{1,255}"
RELATIVE_PATH: Final = rf"^{_PART}(/{_PART})*$"
FILE: Final = Param(
    "path",
    "path",
    {"type": "string", "pattern": RELATIVE_PATH},
    parse_file,
    "A file below the work directory.",
    required=True,
)
DIRECTORY: Final = Param(
    "path",
    "path",
    {"type": "string", "pattern": rf"^({_PART}(/{_PART})*)?$", "default": ""},
    parse_directory,
    "A directory below the work directory.",
)
EXECUTABLE: Final = Param(
    "executable",
    "executable",
    {"type": "string", "enum": ["1", "true", "0", "false"], "default": "0"},
    parse_executable,
    "Whether the file may be executed.",
)
LINK_SCHEMA: Final = {"type": "string", "pattern": ticketcalls.LINK_PATTERN}
IMAGE_SCHEMA: Final = {"type": "string", "pattern": images.REFERENCE_PATTERN}
IMAGE_NAME: Final = Param(
    "name",
    "name",
    {"type": "string", "pattern": rf"^{images.NAME_PATTERN}$", "maxLength": images.NAME_CHARS_MAX},
    images.check_name,
    "The image's name from now on; whatever had it loses it.",
)
APPROVAL_SCHEMA: Final = {"type": "string", "pattern": f"^approval_{_UUID7}$"}
APPROVAL_STATE: Final = Param(
    "state",
    "state",
    {"type": "array", "items": {"type": "string", "enum": [s.value for s in ApprovalState]}},
    parse_approval_state,
    "Only approvals in this state; may be repeated.",
    repeats=True,
)
APPROVAL: Final = Param(
    "approval",
    "approval_ms",
    {"type": "string", "pattern": r"^[0-9]{1,6}(ms|s|m|h|d)$", "examples": ["30m"]},
    approvals.parse_expiry,
    "How long it may wait for an approval, if the policy demands one: 30m, 24h; cut to 7d.",
)
LABEL: Final = Param(
    "label",
    "labels",
    {"type": "array", "items": {"type": "string", "pattern": limits.LABEL_PATTERN}, "maxItems": limits.LABELS_MAX},
    parse_label,
    f"A label that it carries from now on; may be repeated, at most {limits.LABELS_MAX} times.",
    repeats=True,
)
JOB: Final = Param("job", "job_id", JOB_ID_SCHEMA, parse_job, "Only artifacts of this job.")


def parse_query(query: bytes, params: tuple[Param, ...]) -> dict[str, Any]:
    """The request fields that a raw query string names; raises BAD_REQUEST or BAD_ID."""
    if not query and not params:
        return {}
    return dict(_parse_short(query, params) if len(query) <= 64 else _parse(query, params))


def _parse(query: bytes, params: tuple[Param, ...]) -> dict[str, Any]:
    by_name = {param.name: param for param in params}
    fields: dict[str, Any] = {}
    try:
        pairs = parse_qsl(
            query.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=QUERY_PARAMETERS_MAX,
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise AetherError("BAD_REQUEST", f"cannot read the query string: {error}") from error
    for name, text in pairs:
        param = by_name.get(name)
        if param is None:
            known = ", ".join(by_name) or "none"
            raise AetherError("BAD_REQUEST", f"cannot accept query parameter {name[:80]!r}: this path takes {known}")
        if param.repeats:
            fields[param.field] = (*fields.get(param.field, ()), param.parse(text))
            most = param.schema.get("maxItems", QUERY_PARAMETERS_MAX)
            if len(fields[param.field]) > most:
                raise AetherError("BAD_REQUEST", f"cannot accept query parameter {name!r} more than {most} times")
        elif param.field in fields:
            raise AetherError("BAD_REQUEST", f"cannot accept query parameter {name!r}: it is given twice")
        else:
            fields[param.field] = param.parse(text)
    for param in params:
        if param.required and param.field not in fields:
            raise AetherError("BAD_REQUEST", f"cannot do without the query parameter {param.name!r}")
    return fields


# The same few short queries (`wait=10s`) come with every job; parsing one costs 6 us, finding it 0.2 us.
_parse_short = lru_cache(maxsize=512)(_parse)
