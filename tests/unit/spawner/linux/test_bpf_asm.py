"""The assembler against encodings of RFC 9669 and of the kernel's own examples, and the programs it makes."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.linux.bpf import layout, programs
from aether.spawner.linux.bpf.asm import Assembler, Reg

R0, R1, R2, R6, R10 = Reg.R0, Reg.R1, Reg.R2, Reg.R6, Reg.R10


def code(build: object) -> str:
    p = Assembler()
    build(p)  # type: ignore[operator]
    return p.assemble().hex()


GOLDEN = {
    # as llvm-objdump prints them for the same instructions
    "b700000000000000": lambda p: p.move(R0, 0),
    "9500000000000000": lambda p: p.exit(),
    "bf16000000000000": lambda p: p.move(R6, R1),
    "07020000f0ffffff": lambda p: p.alu("+", R2, -16),
    "0f21000000000000": lambda p: p.alu("+", R1, R2),
    "1f21000000000000": lambda p: p.alu("-", R1, R2),
    "5701000080000000": lambda p: p.alu("&", R1, 0x80),
    "7700000020000000": lambda p: p.alu(">>", R0, 32),
    "2701000010000000": lambda p: p.alu("*", R1, 16),
    "7916080000000000": lambda p: p.load(8, R6, R1, 8),
    "6116080000000000": lambda p: p.load(4, R6, R1, 8),
    "7b0af0ff00000000": lambda p: p.store(8, R10, -16, R0),
    "7a0af0ff01000000": lambda p: p.store(8, R10, -16, 1),
    "630af0ff00000000": lambda p: p.store(4, R10, -16, R0),
    "620af0ff01000000": lambda p: p.store(4, R10, -16, 1),
    "7206900000000000": lambda p: p.store(1, R6, 0x90, 0),
    "db10000000000000": lambda p: p.atomic_add(R0, 0, R1),
    "db10080001000000": lambda p: p.atomic_add(R0, 8, R1, fetch=True),
    "8500000001000000": lambda p: p.call(1),
    "18110000070000000000000000000000": lambda p: p.map(R1, 7),
    "18220000070000000000000010000000": lambda p: p.map_value(R2, 7, 16),
    "18010000efbeadde0000000078563412": lambda p: p.constant(R1, 0x12345678_DEADBEEF),
}


@pytest.mark.parametrize("expected", GOLDEN)
def test_encodings(expected: str) -> None:
    assert code(GOLDEN[expected]) == expected


def test_jumps_count_instructions_from_the_next_one() -> None:
    def build(p: Assembler) -> None:
        p.label("again")
        p.jump(R0, "==", 0, "out")
        p.constant(R1, 1)  # counts as two
        p.jump(R1, "!=", R2, "again")
        p.goto("again")
        p.label("out")
        p.exit()

    assert code(build) == (
        "1500040000000000"
        + "18010000010000000000000000000000"
        + "5d21fcff00000000"
        + "0500fbff00000000"
        + "95"
        + "00" * 7
    )


def test_labels_are_set_once_and_found() -> None:
    p = Assembler()
    p.label("a")
    with pytest.raises(ValueError, match="twice"):
        p.label("a")
    p.goto("nowhere")
    with pytest.raises(ValueError, match="not set"):
        p.assemble()
    far = Assembler()
    far.goto("end")
    for _ in range(1 << 15):
        far.move(R0, 0)
    far.label("end")
    with pytest.raises(ValueError, match="cannot assemble instruction 0"):
        far.assemble()


@given(st.integers(0, (1 << 64) - 1))
def test_constants_hold_64_bits(value: int) -> None:
    raw = bytes.fromhex(code(lambda p: p.constant(R1, value)))
    assert int.from_bytes(raw[4:8] + raw[12:16], "little") == value


def test_every_program_ends_and_jumps_inside_itself() -> None:
    """What the verifier would say first, without a kernel that lets us ask it."""
    numbers = {field.name: 8 * place for place, field in enumerate(dataclasses.fields(programs.Fields))}
    fields = programs.Fields(**numbers | {"victim_is_task": True})  # type: ignore[arg-type]
    made = programs.observing(fields, 3, 4)
    assert set(made) == {"sched_process_exec", "sched_process_exit", "signal_generate", "mark_victim"}
    made["trace"] = programs.trace_program(1 << 40, 5, (4, 4026531836))
    for text in made.values():
        steps = [text[at : at + 8] for at in range(0, len(text), 8)]
        assert steps[-1][0] == 0x95
        for at, step in enumerate(steps):
            if step[0] & 7 == 5 and step[0] not in (0x85, 0x95):
                offset = int.from_bytes(step[2:4], "little", signed=True)
                assert 0 <= at + 1 + offset < len(steps)
            if step[0] & 7 in (1, 2, 3) and step[0] & 0xE0 == 0x60 and step[1] & 15 == Reg.R10:
                assert -512 <= int.from_bytes(step[2:4], "little", signed=True) < 0, "the frame has 512 bytes"


def test_the_layouts_agree_with_themselves() -> None:
    assert layout.EVENT_BYTES == layout.PATH == 144
    assert layout.CALL.size <= layout.CALL_BYTES and layout.LAST_CALLS & (layout.LAST_CALLS - 1) == 0
    assert layout.WATCHED.size == layout.WATCHED_DROPPED + 8
