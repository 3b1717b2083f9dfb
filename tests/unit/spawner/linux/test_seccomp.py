"""The filter, run by a small interpreter of classic BPF over every number on both architectures."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from aether.spawner.linux import seccomp

ALLOW, KILL = seccomp.ALLOW, seccomp.KILL
ARCHES = ("x86_64", "aarch64")


def run(code: bytes, number: int, arch: int, *args: int) -> int:
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *args, *[0] * (6 - len(args)))
    at = accumulator = 0
    for _ in range(len(code) // 8):
        op, true, false, value = struct.unpack_from("<HBBI", code, at * 8)
        at += 1
        if op == seccomp.LD_ABS:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif op == seccomp.RET:
            return int(value)
        else:
            holds = {
                seccomp.JEQ: accumulator == value,
                seccomp.JGT: accumulator > value,
                seccomp.JGE: accumulator >= value,
                seccomp.JSET: bool(accumulator & value),
            }[op]
            at += true if holds else false
    raise AssertionError("the program does not return")


def refused(code: int) -> int:
    return 0x00050000 | code


@pytest.mark.parametrize("arch", ARCHES)
def test_every_number_answers_as_in_the_table(arch: str) -> None:
    code = seccomp.filter_program("cell", arch)
    audit = seccomp.AUDIT_ARCH[arch]
    table = {getattr(r, arch): refused(r.errno) for r in seccomp.REFUSED.values()}
    checked = {getattr(c, arch) for c in seccomp.CHECKED.values()}
    for number in range(seccomp.REVIEWED_MAX + 1):
        if number not in checked:
            assert run(code, number, audit) == table.get(number, ALLOW), number
    for number in (seccomp.REVIEWED_MAX + 1, 600, 0x3FFFFFFF):
        assert run(code, number, audit) == refused(errno.ENOSYS)


@pytest.mark.parametrize("arch", ARCHES)
def test_arguments(arch: str) -> None:
    code = seccomp.filter_program("cell", arch)
    audit = seccomp.AUDIT_ARCH[arch]

    def call(name: str, *args: int) -> int:
        return run(code, getattr(seccomp.CHECKED[name], arch), audit, *args)

    eperm = refused(errno.EPERM)
    assert call("clone", 17) == call("clone", 0x003D0F00) == ALLOW
    assert {call("clone", 1 << bit | 17) for bit in (17, 25, 26, 27, 28, 29, 30)} == {eperm}
    assert call("clone", 1 << 32 | 17) == ALLOW
    assert call("unshare", 0x80) == eperm
    assert call("unshare", 0x400) == ALLOW
    assert call("prlimit64", 0) == ALLOW
    assert call("prlimit64", 1) == eperm
    assert call("personality", 0xFFFFFFFF) == call("personality", 0) == ALLOW
    assert call("personality", 0x0400000) == eperm
    assert [call("ioctl", 0, request) for request in (0x5412, 0x541C, 0x5423)] == [eperm] * 3
    assert call("ioctl", 0, 0xFFFFFFFF00005412) == eperm  # the kernel reads 32 bits
    assert call("ioctl", 0, 0x5401) == ALLOW
    assert [call("socket", family, 1, protocol) for family in (2, 10) for protocol in (0, 6)] == [ALLOW] * 4
    assert [call("socket", family, 2 | 0o2004000, protocol) for family in (2, 10) for protocol in (0, 17)] == [
        ALLOW
    ] * 4
    assert call("socket", 1, 5, 0) == ALLOW
    others = [call("socket", 2, 1, protocol) for protocol in (1, 33, 58, 132, 136, 262, 1 << 31)]
    others += [call("socket", 10, kind | 0o2000000, 0) for kind in (4, 5, 6, 10, 15)]
    assert set(others) == {refused(errno.EPROTONOSUPPORT)}
    assert call("socket", 16, 3, 0) == ALLOW
    assert call("socket", 16, 3, 9) == call("socket", 17) == call("socket", 38) == refused(errno.EAFNOSUPPORT)


@pytest.mark.parametrize("arch", ARCHES)
def test_offline_knows_only_unix_sockets(arch: str) -> None:
    code = seccomp.filter_program("offline", arch)
    number = getattr(seccomp.CHECKED["socket"], arch)
    answers = {family: run(code, number, seccomp.AUDIT_ARCH[arch], family) for family in range(46)}
    assert [family for family, answer in answers.items() if answer == ALLOW] == [1]


def test_foreign_architectures_are_killed() -> None:
    code = seccomp.filter_program("cell", "x86_64")
    assert run(code, 39, 0x40000003) == KILL  # i386
    assert run(code, seccomp.X32_BIT + 39, seccomp.AUDIT_ARCH["x86_64"]) == KILL
    assert run(seccomp.filter_program("cell", "aarch64"), 39, 0x40000028) == KILL  # arm


def test_numbers_are_unique_and_every_entry_has_a_reason() -> None:
    for arch in ARCHES:
        entries = [*seccomp.REFUSED.values(), *seccomp.CHECKED.values()]
        numbers = [n for e in entries if (n := getattr(e, arch)) is not None]
        assert len(numbers) == len(set(numbers))
        assert max(numbers) <= seccomp.REVIEWED_MAX
    assert all(entry.reason for entry in seccomp.REFUSED.values())


@pytest.mark.parametrize("arch", ARCHES)
def test_the_program_is_small(arch: str) -> None:
    assert len(seccomp.filter_program("cell", arch)) // 8 < 160


HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm/unistd_64.h")),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"),),
}


@pytest.mark.parametrize("arch", ARCHES)
def test_numbers_are_those_of_the_kernels_headers(arch: str) -> None:
    header = next((path for path in HEADERS[arch] if path.exists()), None)
    if header is None:
        pytest.skip("the kernel's headers are not installed")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    known = {name: int(number) for name, number in re.findall(pattern, header.read_text())}
    entries = {**seccomp.REFUSED, **seccomp.CHECKED}
    for name, entry in entries.items():
        number = getattr(entry, arch)
        if number in known.values() or name in known:
            assert known.get(name) == number, name
