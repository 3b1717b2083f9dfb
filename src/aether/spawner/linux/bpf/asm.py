"""An assembler for eBPF: one method per kind of instruction, labels as jump targets, bytes out.

An instruction is 8 bytes: opcode, destination and source register, offset, immediate; a 64-bit immediate takes
two. Encoding: RFC 9669 (BPF Instruction Set Architecture). Pure: nothing here talks to the kernel.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, Literal

Size = Literal[1, 2, 4, 8]
Condition = Literal["==", ">", ">=", "&", "!=", "<", "<=", "s>", "s<"]
Operator = Literal["+", "-", "*", "|", "&", "<<", ">>"]


class Reg(IntEnum):
    """R0 result, R1-R5 arguments (lost in a call), R6-R9 kept, R10 the frame's end (read only)."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10


_SIZES: Final[dict[int, int]] = {4: 0x00, 2: 0x08, 1: 0x10, 8: 0x18}
_OPERATORS: Final[dict[str, int]] = {"+": 0x00, "-": 0x10, "*": 0x20, "|": 0x40, "&": 0x50, "<<": 0x60, ">>": 0x70}
_CONDITIONS: Final[dict[str, int]] = {
    "==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "s>": 0x60, "<": 0xA0, "<=": 0xB0, "s<": 0xC0,
}  # fmt: skip
_LDX, _ST, _STX, _JMP, _ALU64 = 0x01, 0x02, 0x03, 0x05, 0x07
_REGISTER, _MEMORY, _ATOMIC, _IMMEDIATE64 = 0x08, 0x60, 0xC0, 0x18
_MOVE, _GOTO, _CALL, _EXIT = 0xB0, 0x05, 0x85, 0x95
_ADD, _FETCH = 0x00, 0x01
_MAP_FD, _MAP_VALUE = 1, 2


class Assembler:
    """Collects instructions; `assemble` resolves the labels."""

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}
        self._fresh = 0

    def _put(self, opcode: int, dst: int = 0, src: int = 0, offset: int | str = 0, immediate: int = 0) -> None:
        self._code.append((opcode, dst, src, offset, immediate))

    def move(self, dst: Reg, value: Reg | int) -> None:
        self._alu(_MOVE, dst, value)

    def alu(self, operator: Operator, dst: Reg, value: Reg | int) -> None:
        """`dst = dst operator value` in 64 bits; an immediate is 32 bits, sign-extended."""
        self._alu(_OPERATORS[operator], dst, value)

    def _alu(self, operation: int, dst: Reg, value: Reg | int) -> None:
        if isinstance(value, Reg):
            self._put(_ALU64 | _REGISTER | operation, dst, value)
        else:
            self._put(_ALU64 | operation, dst, immediate=value)

    def load(self, size: Size, dst: Reg, base: Reg, offset: int) -> None:
        """`dst = *(base + offset)`, zero-extended."""
        self._put(_LDX | _MEMORY | _SIZES[size], dst, base, offset)

    def store(self, size: Size, base: Reg, offset: int, value: Reg | int) -> None:
        """`*(base + offset) = value`"""
        if isinstance(value, Reg):
            self._put(_STX | _MEMORY | _SIZES[size], base, value, offset)
        else:
            self._put(_ST | _MEMORY | _SIZES[size], base, 0, offset, value)

    def atomic_add(self, base: Reg, offset: int, value: Reg, *, fetch: bool = False) -> None:
        """64-bit `*(base + offset) += value`; with `fetch` the old content replaces `value` (Linux 5.12)."""
        self._put(_STX | _ATOMIC | _SIZES[8], base, value, offset, _ADD | (_FETCH if fetch else 0))

    def jump(self, dst: Reg, condition: Condition, value: Reg | int, label: str) -> None:
        """To `label` when `dst condition value` (unsigned, but for s> and s<); `&` asks for a common bit."""
        opcode = _JMP | _CONDITIONS[condition]
        if isinstance(value, Reg):
            self._put(opcode | _REGISTER, dst, value, label)
        else:
            self._put(opcode, dst, 0, label, value)

    def goto(self, label: str) -> None:
        self._put(_GOTO, offset=label)

    def label(self, name: str) -> None:
        """Names the next instruction; raises ValueError when the name is taken."""
        if name in self._labels:
            raise ValueError(f"cannot assemble: label {name!r} is set twice")
        self._labels[name] = len(self._code)

    def fresh(self) -> str:
        """A label name that nobody else uses."""
        self._fresh += 1
        return f".{self._fresh}"

    def call(self, helper: int) -> None:
        self._put(_CALL, immediate=helper)

    def exit(self) -> None:
        self._put(_EXIT)

    def constant(self, dst: Reg, value: int) -> None:
        """A 64-bit immediate."""
        self._wide(dst, 0, value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF)

    def map(self, dst: Reg, fd: int) -> None:
        """The map behind the descriptor `fd`; the kernel replaces it by the map's address at load."""
        self._wide(dst, _MAP_FD, fd, 0)

    def map_value(self, dst: Reg, fd: int, offset: int = 0) -> None:
        """The address of `offset` within the only element of an array map."""
        self._wide(dst, _MAP_VALUE, fd, offset)

    def _wide(self, dst: Reg, kind: int, low: int, high: int) -> None:
        self._put(_IMMEDIATE64, dst, kind, immediate=low)
        self._put(0, immediate=high)

    def assemble(self) -> bytes:
        """Raises ValueError for a label that was never set or is too far."""
        out = []
        for at, (opcode, dst, src, offset, immediate) in enumerate(self._code):
            if isinstance(offset, str):
                if offset not in self._labels:
                    raise ValueError(f"cannot assemble: label {offset!r} is not set")
                offset = self._labels[offset] - at - 1
            try:
                out.append(struct.pack("<BBhI", opcode, src << 4 | dst, offset, immediate & 0xFFFFFFFF))
            except struct.error as error:
                raise ValueError(f"cannot assemble instruction {at}: {error}") from error
        return b"".join(out)
