"""Caveats: what narrows a ticket. Pure: their bytes, and what each allows.

A caveat is `u8 type, u16 length, value`. A value is a list of texts (`u16 length, UTF-8` each), a u64, or a unit and a
u64 (docs/formats.md "Ticket"). Every caveat of every link must allow a request; a list names what is allowed, so
the empty list allows nothing (but `labels`: what every job must carry); a type that this version does not know
allows nothing.

Patterns in lists are a text that must be equal, or a prefix followed by `*`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from aether.contract.network import Rule, parse_rule
from aether.contract.units import UNITS

CAVEATS_MAX: Final = 64
ITEMS_MAX: Final = 256
JOB_OPERATIONS: Final = frozenset({"job.submit", "cell.explain"})
"""Operations that are about a job to be: kinds and models bind them."""
LABELLED: Final = JOB_OPERATIONS | {"cell.allocate"}
"""Those that make a cell: labels, hosts and paths bind them."""

CaveatType = Literal[
    "role", "operations", "kinds", "models", "labels", "hosts", "paths", "expires", "budget", "cells", "unknown"
]  # fmt: skip
_TYPES: Final[dict[int, CaveatType]] = {
    1: "role", 2: "operations", 3: "kinds", 4: "models", 5: "labels", 6: "hosts", 7: "paths", 8: "expires", 9: "budget",
    10: "cells",
}  # fmt: skip
_NUMBERS: Final = {name: number for number, name in _TYPES.items()}
_LISTS: Final = frozenset({"role", "operations", "kinds", "models", "labels", "hosts", "paths", "cells"})
_HEAD: Final = struct.Struct(">BH")
_U16: Final = struct.Struct(">H")
_U64: Final = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Caveat:
    """One narrowing. `items` for lists, `number` for `expires` (ms since the epoch) and `budget` (of unit items[0]).

    An unknown caveat has the type `unknown`.
    """

    type: CaveatType
    items: tuple[str, ...] = ()
    number: int = 0

    def __str__(self) -> str:
        if self.type == "expires":
            return f"expires={self.number}"
        if self.type == "budget":
            return f"budget={self.number} {self.items[0]}"
        return f"{self.type}={','.join(self.items)}"


@dataclass(frozen=True, slots=True)
class Request:
    """What a ticket is asked to allow. `hosts` and `paths` (`verb:path`) are those a job declares; `cells` the names
    of allocated cells that it is about."""

    operation: str
    kind: str | None = None
    model: str | None = None
    labels: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()


def role(name: str) -> Caveat:
    return Caveat("role", (name,))


def operations(*patterns: str) -> Caveat:
    return Caveat("operations", patterns)


def kinds(*names: str) -> Caveat:
    return Caveat("kinds", names)


def models(*patterns: str) -> Caveat:
    """A model id allows all its versions, `id@version` only that one."""
    return Caveat("models", patterns)


def labels(*names: str) -> Caveat:
    """Every job carries all of these (a data-flow mark can be added, not dropped)."""
    return Caveat("labels", names)


def hosts(*patterns: str) -> Caveat:
    return Caveat("hosts", patterns)


def paths(*grants: str) -> Caveat:
    """`<verbs>:<path>`: letters of `rwx` on the path and what is below it."""
    return Caveat("paths", grants)


def cells(*patterns: str) -> Caveat:
    """Names of allocated cells; commands run in one of them and nowhere else."""
    return Caveat("cells", patterns)


def expires(epoch_ms: int) -> Caveat:
    return Caveat("expires", (), epoch_ms)


def budget(unit: str, amount: int) -> Caveat:
    """At most `amount` of `unit` (UNITS) through this link and all derived from it."""
    return Caveat("budget", (unit,), amount)


def encode(caveats: Sequence[Caveat]) -> bytes:
    """The bytes of one block; raises ValueError for what cannot be written or would be refused when read."""
    parts: list[bytes] = []
    for caveat in caveats:
        value = _encode_value(caveat)
        parts.append(_HEAD.pack(_NUMBERS[caveat.type], len(value)) + value)
    block = b"".join(parts)
    if decode(block) != tuple(caveats):
        raise ValueError(f"cannot write caveats {', '.join(map(str, caveats))}")
    return block


def decode(block: bytes) -> tuple[Caveat, ...]:
    """The caveats of one block; raises ValueError when it is malformed."""
    found: list[Caveat] = []
    at, end = 0, len(block)
    while at < end:
        if end - at < 3 or len(found) == CAVEATS_MAX:
            raise ValueError("a caveat is cut off, or there are too many")
        number, length = _HEAD.unpack_from(block, at)
        at += 3
        if length > end - at:
            raise ValueError("a caveat is cut off")
        found.append(_decode_value(number, block[at : at + length]))
        at += length
    return tuple(found)


def allows(caveat: Caveat, request: Request, now_ms: int) -> bool:
    """Whether one caveat allows the request. Budgets are the accounts' to check, roles the policy's."""
    kind, items = caveat.type, caveat.items
    if kind in ("role", "budget"):
        return True
    if kind == "expires":
        return now_ms < caveat.number
    if kind == "operations":
        return matches(request.operation, items)
    if kind == "unknown":
        return False
    if kind == "cells":
        bound = bool(request.cells) or (request.kind == "command" and request.operation == "job.submit")
        return not bound or (bool(request.cells) and all(matches(name, items) for name in request.cells))
    if kind == "labels":
        return request.operation not in LABELLED or set(items) <= set(request.labels)
    if kind == "hosts":
        return request.operation not in LABELLED or all(_host_allowed(host, items) for host in request.hosts)
    if kind == "paths":
        return request.operation not in LABELLED or all(_path_allowed(path, items) for path in request.paths)
    if request.operation not in JOB_OPERATIONS:
        return True
    if kind == "kinds":
        return request.kind in items
    return request.kind != "model" or (request.model is not None and _model_allowed(request.model, items))


def matches(text: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is equal to `text`, or ends in `*` and begins it."""
    return any(text == p or (p.endswith("*") and text.startswith(p[:-1])) for p in patterns)


def _model_allowed(model: str, items: Sequence[str]) -> bool:
    return matches(model, items) or model.partition("@")[0] in items


def _host_allowed(asked: str, items: Sequence[str]) -> bool:
    """Whether a rule that a job asks for lies within one that the caveat names, where the port may be left out."""
    if matches(asked, items):
        return True
    try:
        wanted = parse_rule(asked, any_port=True)
    except ValueError:
        return False
    return any(granted.covers(wanted) for granted in map(_granted_rule, items) if granted is not None)


def _granted_rule(text: str) -> Rule | None:
    try:
        return parse_rule(text, any_port=True)
    except ValueError:
        return None


def _path_allowed(asked: str, grants: Sequence[str]) -> bool:
    verbs, _, path = asked.partition(":")
    parts = path.split("/")
    if not path.startswith("/") or ".." in parts:
        return False
    for grant in grants:
        granted, _, root = grant.partition(":")
        root = root.rstrip("/")
        if set(verbs) <= set(granted) and (path == root or path.startswith(root + "/")):
            return True
    return False


def _encode_value(caveat: Caveat) -> bytes:
    if caveat.type == "expires":
        return _U64.pack(caveat.number)
    if caveat.type == "budget":
        return _pack_text(caveat.items[0]) + _U64.pack(caveat.number)
    return b"".join(_pack_text(item) for item in caveat.items)


def _pack_text(text: str) -> bytes:
    raw = text.encode()
    return _U16.pack(len(raw)) + raw


def _decode_value(number: int, value: bytes) -> Caveat:
    name = _TYPES.get(number)
    if name in _LISTS:
        items, end = _texts(value, len(value))
        if end != len(value) or (name == "role" and len(items) != 1):
            raise ValueError(f"caveat {name} is malformed")
        return Caveat(name, items)
    if name == "expires":
        if len(value) != 8:
            raise ValueError("caveat expires is malformed")
        return Caveat(name, (), _U64.unpack(value)[0])
    if name == "budget":
        unit, end = _texts(value, len(value) - 8)
        if end != len(value) - 8 or len(unit) != 1:
            raise ValueError("caveat budget is malformed")
        return Caveat(name, unit, _U64.unpack_from(value, end)[0]) if unit[0] in UNITS else Caveat("unknown")
    return Caveat("unknown")


def _texts(value: bytes, end: int) -> tuple[tuple[str, ...], int]:
    items: list[str] = []
    at = 0
    while at + 2 <= end and len(items) < ITEMS_MAX:
        (length,) = _U16.unpack_from(value, at)
        if at + 2 + length > end:
            raise ValueError("a text is cut off")
        items.append(value[at + 2 : at + 2 + length].decode())
        at += 2 + length
    return tuple(items), at
