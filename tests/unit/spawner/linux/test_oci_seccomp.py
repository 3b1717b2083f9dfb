"""The profile in OCI words says what the filter says: every refused call, and every call whose arguments decide."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.linux import seccomp
from aether.spawner.linux.oci_seccomp import complement, oci_seccomp
from tests.unit.spawner.linux.test_seccomp import run

ARCHES = ("x86_64", "aarch64")
PROFILES = {(profile, arch): oci_seccomp(profile, arch) for profile in ("cell", "offline") for arch in ARCHES}
INTERESTING = (0, 1, 2, 3, 4, 5, 6, 8, 10, 16, 17, 0x80, 0x5412, 0x541C, 0x5423, 0x20000, 0x10000000, 0xFFFFFFFF)


def answer(profile: dict[str, Any], name: str, args: tuple[int, ...]) -> int:
    """What libseccomp makes of the profile: the rules that match agree, and no match is the default."""
    found = set()
    for rule in profile["syscalls"]:
        conditions = rule.get("args", [])
        met = all(args[c["index"]] & c["value"] == c["valueTwo"] for c in conditions)
        if name in rule["names"] and met:
            found.add(seccomp.ALLOW if rule["action"] == "SCMP_ACT_ALLOW" else 0x00050000 | rule["errnoRet"])
    assert len(found) <= 1, (name, args, found)
    return found.pop() if found else 0x00050000 | int(profile["defaultErrnoRet"])


@pytest.mark.parametrize("arch", ARCHES)
def test_refused_calls_answer_alike(arch: str) -> None:
    code = seccomp.filter_program("cell", arch)
    for name, call in seccomp.REFUSED.items():
        number = getattr(call, arch)
        if number is not None:
            assert answer(PROFILES["cell", arch], name, (0,) * 6) == run(code, number, seccomp.AUDIT_ARCH[arch])


@given(
    st.sampled_from(sorted(PROFILES)),
    st.sampled_from(sorted(seccomp.CHECKED)),
    st.lists(st.one_of(st.sampled_from(INTERESTING), st.integers(0, 0xFFFFFFFF)), min_size=3, max_size=3),
)
def test_arguments_decide_alike(key: tuple[str, str], name: str, args: list[int]) -> None:
    profile, arch = key
    number = getattr(seccomp.CHECKED[name], arch)
    expected = run(seccomp.filter_program(profile, arch), number, seccomp.AUDIT_ARCH[arch], *args)
    assert answer(PROFILES[key], name, (*args, 0, 0, 0)) == expected


def test_what_nobody_reviewed_answers_as_absent() -> None:
    profile = PROFILES["cell", "x86_64"]
    assert profile["defaultErrnoRet"] == errno.ENOSYS and answer(profile, "tomorrows_call", (0,) * 6) == 0x50026
    allowed = set(profile["syscalls"][0]["names"])
    assert not allowed & (set(seccomp.REFUSED) | set(seccomp.CHECKED)) and {"read", "futex", "openat2"} <= allowed


@given(st.sets(st.integers(0, 0xFFFFFFFF), max_size=6), st.integers(0, 0xFFFFFFFF))
def test_complement(values: set[int], number: int) -> None:
    matches = [mask for mask, value in complement(values) if number & mask == value]
    assert len(matches) == (number not in values)
