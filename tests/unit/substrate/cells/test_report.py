"""What the spawner saw becomes what is recorded: nothing is claimed that was not shown."""

from __future__ import annotations

from typing import Any

import pytest

from aether.contract.cells import CellSpec
from aether.contract.errors import AetherError
from aether.substrate.cells.report import end_of, sandbox_report, usage_of, verify_required

PROCESS = {
    "uid": 1000,
    "no_new_privs": True,
    "seccomp_mode": 2,
    "cap_effective": 0,
    "cap_permitted": 0,
    "cap_inheritable": 0,
    "cap_bounding": 0,
}
SEEN: dict[str, Any] = {
    "executor": "native",
    "level": "cell",
    "namespaces": {"user": 1, "pid": 2, "mnt": 3, "net": 4},
    "landlock_abi": 7,
    "seccomp_profile": "cell",
    "limits": {"memory_bytes": "cgroup1:memory.limit_in_bytes"},
    "process": PROCESS,
}


def test_full() -> None:
    report = sandbox_report(SEEN, {"cgroup-cpu": "no"}, 7, "sha256:x")
    assert report.enforced == {
        "userns": True,
        "pidns": True,
        "mountns": True,
        "netns": True,
        "seccomp": "cell",
        "no_new_privs": True,
        "no_capabilities": True,
        "landlock": 7,
        "cgroup-memory": "cgroup1:memory.limit_in_bytes",
        "cell": True,
        "native": True,
    }
    assert report.missing == {"cgroup-cpu": "no"} and report.uid == 7


def test_a_runtime_is_named_with_its_version() -> None:
    report = sandbox_report(SEEN | {"driver": "runc", "executor": "runc 1.1.5"}, {}, 7, "sha256:x")
    assert report.enforced["runc"] == "runc 1.1.5" and report.enforced["cell"] and "native" not in report.enforced
    verify_required(CellSpec(argv=("x",), require=("runc",)), report)


GVISOR = SEEN | {
    "driver": "runsc",
    "executor": "runsc 2024",
    "level": "gvisor",
    "namespaces": {"user": 1, "mnt": 3, "net": 4},
    "landlock_abi": 0,
    "sandbox": {"seccomp": True, "namespaces": ["user", "pid"]},
    "limits": {"memory_bytes": "cgroup1:memory.limit_in_bytes", "pids": "cgroup1:pids.max"},
}


def test_gvisor_is_claimed_of_a_sandbox_that_the_host_confines() -> None:
    report = sandbox_report(GVISOR, {"cgroup-pids": "its own threads", "landlock": "none"}, 7, "sha256:x")
    assert report.level == "gvisor" and report.enforced["gvisor"] is True and report.enforced["cell"] is True
    assert report.enforced["pidns"] == "gvisor" and "cgroup-pids" not in report.enforced
    assert report.missing == {"cgroup-pids": "its own threads", "landlock": "none"}
    for change in (
        {"sandbox": {"seccomp": False, "namespaces": ["pid"]}},
        {"namespaces": {"mnt": 3, "net": 4}},
        {"namespaces": {"user": 1, "mnt": 3}},
    ):
        assert "gvisor" not in sandbox_report(GVISOR | change, {}, 7, "sha256:x").enforced


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"process": PROCESS | {"seccomp_mode": 0}}, "seccomp"),
        ({"process": PROCESS | {"no_new_privs": False}}, "no_new_privs"),
        ({"process": PROCESS | {"cap_bounding": 1}}, "no_capabilities"),
        ({"namespaces": {"user": 1, "mnt": 3}}, "cell"),
        ({"landlock_abi": 0}, "landlock"),
        ({"limits": {}}, "cgroup-memory"),
    ],
)
def test_what_was_not_seen_is_not_enforced_and_cannot_be_required(change: dict[str, Any], lost: str) -> None:
    report = sandbox_report(SEEN | change, {}, 7, "")
    assert lost not in report.enforced
    with pytest.raises(AetherError) as refused:
        verify_required(CellSpec(argv=("x",), require=(lost,)), report)
    assert refused.value.code == "LEVEL_UNMET"
    verify_required(CellSpec(argv=("x",), require=(lost,)), sandbox_report(SEEN, {}, 7, ""))


def test_usage_is_measured_or_null() -> None:
    usage = usage_of({"wall_us": 5, "cpu_user_us": 0, "memory_peak_bytes": None, "sources": {}, "memory_bytes": 3})
    assert (usage.wall_us, usage.cpu_user_us, usage.memory_peak_bytes, usage.io_read_bytes) == (5, 0, None, None)
    assert usage.basis == {"wall_us": "measured", "cpu_user_us": "measured"}
    assert usage_of(None).basis == {}


def test_end() -> None:
    view = {
        "exec": "e",
        "code": None,
        "signal": 9,
        "oom": True,
        "timed_out": False,
        "reason": "killed",
        "usage": {"wall_us": 1},
    }
    end = end_of("c", view)
    assert (end.cell_id, end.exec_id, end.exit.signal, end.exit.oom_killed) == ("c", "e", 9, True)
    assert end.exit.reason == "killed" and end.usage.wall_us == 1
