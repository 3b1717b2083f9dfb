"""Where the running kernel keeps the fields that the programs read: a small parser of BTF.

BTF (Documentation/bpf/btf.rst): a header, types one after the other, strings. A type is name offset, info (kind and
number of members) and size or type, then data whose length follows from the kind; ids count from 1. The whole is
walked once (about 60 ms for 5 MB); what is asked for is read from there.

Total: bytes that are no BTF, or end early, raise BtfError and nothing else.
"""

from __future__ import annotations

import struct
from array import array
from pathlib import Path
from typing import Final

VMLINUX: Final = Path("/sys/kernel/btf/vmlinux")
_MAGIC: Final = 0xEB9F
_HEADER: Final = struct.Struct("<HBBIIIII")
_PTR, _STRUCT, _UNION, _TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC_PROTO = 2, 4, 5, 8, 9, 10, 11, 13
_FIXED_WORDS: Final = {1: 1, 3: 3, 14: 1, 17: 1}
"""Words after the three of every type: INT, ARRAY, VAR, DECL_TAG."""
_MEMBER_WORDS: Final = {4: 3, 5: 3, 6: 2, 13: 2, 15: 3, 19: 3}
"""Words per member: STRUCT, UNION, ENUM, FUNC_PROTO, DATASEC, ENUM64."""
_KINDS: Final = 20
_BITFIELD_FLAG: Final = 1 << 31
_NESTING_MAX: Final = 8


class BtfError(ValueError):
    """Not BTF, or without what was asked for."""


class Btf:
    """Types of one kernel image."""

    def __init__(self, data: bytes) -> None:
        try:
            self._read(data)
        except (struct.error, IndexError, ValueError) as error:
            raise BtfError(f"cannot read BTF: {error}") from error

    @classmethod
    def running(cls) -> Btf:
        """That of the running kernel; raises BtfError when it gives none."""
        try:
            return cls(VMLINUX.read_bytes())
        except OSError as error:
            raise BtfError(f"cannot read {VMLINUX}: {error.strerror}") from error

    def _read(self, data: bytes) -> None:
        magic, version, _, header, type_at, type_bytes, text_at, text_bytes = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != 1:
            raise BtfError("not BTF version 1 of this byte order")
        types = data[header + type_at : header + type_at + type_bytes]
        self._text = data[header + text_at : header + text_at + text_bytes]
        if len(types) != type_bytes or len(self._text) != text_bytes or type_bytes % 4:
            raise BtfError("it ends early")
        self._words = memoryview(types).cast("I")
        self._starts, self._named = self._walk()

    def _walk(self) -> tuple[array[int], dict[tuple[int, int], int]]:
        """Where each type begins, and the ids of named structs and typedefs by (kind, name offset)."""
        words, end = self._words, len(self._words)
        starts, named = array("I", [0]), {}
        fixed = [_FIXED_WORDS.get(kind, 0) + 3 for kind in range(32)]
        per_member = [_MEMBER_WORDS.get(kind, 0) for kind in range(32)]
        at = 0
        while at < end:
            info = words[at + 1]
            kind = info >> 24 & 31
            if kind >= _KINDS or kind == 0:
                raise BtfError(f"unknown kind {kind}")
            if kind in (_STRUCT, _TYPEDEF):
                named[kind, words[at]] = len(starts)
            starts.append(at)
            at += fixed[kind] + per_member[kind] * (info & 0xFFFF)
        if at != end:
            raise BtfError("its last type ends early")
        return starts, named

    def _find(self, kind: int, name: str) -> int:
        """The id of a named type. A string of the table may be the tail of another: every occurrence is tried."""
        wanted = name.encode() + b"\0"
        at = self._text.find(wanted)
        while at >= 0:
            found = self._named.get((kind, at))
            if found is not None:
                return found
            at = self._text.find(wanted, at + 1)
        raise BtfError(f"this kernel's BTF has no {name}")

    def _name(self, offset: int) -> str:
        end = self._text.find(b"\0", offset)
        return self._text[offset:end].decode(errors="replace") if end >= 0 else ""

    def _start(self, type_id: int) -> int:
        if not 0 < type_id < len(self._starts):
            raise BtfError(f"type {type_id} does not exist")
        return self._starts[type_id]

    def _resolved(self, type_id: int) -> int:
        """Through typedefs and qualifiers."""
        for _ in range(_NESTING_MAX):
            at = self._start(type_id)
            if self._words[at + 1] >> 24 & 31 not in (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT):
                return type_id
            type_id = self._words[at + 2]
        raise BtfError("a type is nested too deeply")

    def offset(self, structure: str, member: str) -> int:
        """The byte offset of a member, also of one within anonymous structs and unions; raises BtfError."""
        found = self._offset(self._find(_STRUCT, structure), member, _NESTING_MAX)
        if found is None or found % 8:
            raise BtfError(f"this kernel's BTF has no {structure}.{member}")
        return found // 8

    def _offset(self, type_id: int, member: str, depth: int) -> int | None:
        at = self._start(self._resolved(type_id))
        info = self._words[at + 1]
        if depth == 0 or info >> 24 & 31 not in (_STRUCT, _UNION):
            return None
        for number in range(info & 0xFFFF):
            name, kind, bits = self._words[at + 3 + 3 * number : at + 6 + 3 * number]
            bits = bits & 0xFFFFFF if info & _BITFIELD_FLAG else bits
            if name and self._name(name) == member:
                return bits
            inner = None if name else self._offset(kind, member, depth - 1)
            if inner is not None:
                return bits + inner
        return None

    def trace_arguments(self, tracepoint: str) -> tuple[str, ...]:
        """What a raw tracepoint passes: for each argument the name of the struct it points to, else "".

        The kernel declares `typedef void (*btf_trace_NAME)(void *, ...)`. Raises BtfError when there is none.
        """
        at = self._start(self._find(_TYPEDEF, f"btf_trace_{tracepoint}"))
        at = self._start(self._words[at + 2])
        at = self._start(self._words[at + 2])
        info = self._words[at + 1]
        if info >> 24 & 31 != _FUNC_PROTO:
            raise BtfError(f"the type of tracepoint {tracepoint} is not a function")
        return tuple(self._pointed(self._words[at + 4 + 2 * number]) for number in range(1, info & 0xFFFF))

    def _pointed(self, type_id: int) -> str:
        if type_id == 0:
            return ""
        at = self._start(self._resolved(type_id))
        if self._words[at + 1] >> 24 & 31 != _PTR or self._words[at + 2] == 0:
            return ""
        at = self._start(self._resolved(self._words[at + 2]))
        return self._name(self._words[at]) if self._words[at + 1] >> 24 & 31 == _STRUCT else ""
