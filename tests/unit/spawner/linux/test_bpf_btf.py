"""BTF: a small image built by hand, this kernel's, and bytes that are cut short or wrong."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.linux.bpf.btf import VMLINUX, Btf, BtfError

STRUCT, UNION, PTR, TYPEDEF, FUNC_PROTO, INT = 4, 5, 2, 8, 13, 1


class Image:
    """Builds BTF; `add` answers with the id of the type."""

    def __init__(self) -> None:
        self.text, self.types, self.count = b"\0", b"", 0

    def name(self, name: str) -> int:
        if not name:
            return 0
        at = len(self.text)
        self.text += name.encode() + b"\0"
        return at

    def add(self, kind: int, name: str, size: int, *members: tuple[str, int, int], words: tuple[int, ...] = ()) -> int:
        self.types += struct.pack("<III", self.name(name), kind << 24 | len(members), size)
        for member, of, bits in members:
            parts = (self.name(member), of) if kind == FUNC_PROTO else (self.name(member), of, bits)
            self.types += struct.pack(f"<{len(parts)}I", *parts)
        self.types += struct.pack(f"<{len(words)}I", *words)
        self.count += 1
        return self.count

    def bytes(self) -> bytes:
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.text))
        return head + self.types + self.text


def image() -> bytes:
    made = Image()
    number = made.add(INT, "int", 4, words=(32,))
    inner = made.add(UNION, "", 8, ("left", number, 0), ("right", number, 32))
    task = made.add(STRUCT, "task", 32, ("pid", number, 0), ("", inner, 64), ("flag", number, 129))
    pointer = made.add(PTR, "", task)
    void = made.add(PTR, "", 0)
    proto = made.add(FUNC_PROTO, "", 0, ("", void, 0), ("", pointer, 0), ("", number, 0))
    function = made.add(PTR, "", proto)
    made.add(TYPEDEF, "btf_trace_born", function)
    made.add(STRUCT, "other_task", 8, ("pid", number, 32))
    return made.bytes()


def test_offsets() -> None:
    btf = Btf(image())
    assert btf.offset("task", "pid") == 0
    assert btf.offset("task", "left") == 8 and btf.offset("task", "right") == 12
    assert btf.offset("other_task", "pid") == 4
    assert btf.trace_arguments("born") == ("task", "")


@pytest.mark.parametrize(
    ("structure", "member"), [("task", "absent"), ("absent", "pid"), ("task", "flag"), ("int", "x")]
)
def test_what_is_not_there(structure: str, member: str) -> None:
    with pytest.raises(BtfError, match="no "):
        Btf(image()).offset(structure, member)
    with pytest.raises(BtfError, match="no btf_trace_died"):
        Btf(image()).trace_arguments("died")


@given(st.integers(0, len(image()) - 1))
def test_cut_short(length: int) -> None:
    with pytest.raises(BtfError):
        Btf(image()[:length])


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    with pytest.raises(BtfError):
        Btf(data)


@given(st.integers(24, len(image()) - 1), st.integers(0, 255))
def test_one_wrong_byte_never_ends_otherwise(at: int, value: int) -> None:
    data = bytearray(image())
    data[at] = value
    try:
        btf = Btf(bytes(data))
        btf.offset("task", "left")
        btf.trace_arguments("born")
    except BtfError:
        pass


def test_this_kernel() -> None:
    if not VMLINUX.exists():
        pytest.skip(f"this kernel has no {VMLINUX}")
    btf = Btf.running()
    assert btf.trace_arguments("sched_process_exec")[0] == "task_struct"
    offsets = [btf.offset("task_struct", name) for name in ("tgid", "real_parent", "comm", "exit_code")]
    assert len(set(offsets)) == 4 and all(0 < offset < 16384 for offset in offsets)
    assert btf.offset("pid", "numbers") > btf.offset("pid", "level")
