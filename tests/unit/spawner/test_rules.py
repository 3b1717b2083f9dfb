"""What a well-formed plan may still not ask for, whatever roots the spawner was given."""

from __future__ import annotations

import os
from typing import Any

import pytest

from aether.contract import limits
from aether.spawner.protocol import RefusedError
from aether.spawner.rules import Rules, check_owner, exec_spec

STATE = "/var/lib/aether"
RULES = Rules(("/usr", "/", STATE), STATE, f"{STATE}/cells/abcd1234")
INSIDE = (f"{STATE}/cells", RULES.work, f"{RULES.work}/cell_b", f"{STATE}/keysmodels", f"{STATE}/models-private")
FIRST = limits.CELL_UID_BASE


def plan(op: str, source: str, **ids: int) -> dict[str, Any]:
    mine = {"host_uid": os.geteuid(), "host_gid": os.getegid(), "count": 1, "init_uid": 1000}
    block = {"host_uid": FIRST, "host_gid": FIRST, "count": limits.CELL_UID_BLOCK}
    return {
        "cell_id": "cell_a",
        "level": "cell",
        "namespaces": ["user", "pid", "mnt", "net"],
        "id_map": (block if os.geteuid() == 0 else mine) | ids,
        "hostname": "cell",
        "steps": [{"op": op, "path": "/x", "source": source}],
        "seccomp_profile": "cell",
        "landlock": None,
    }


@pytest.mark.parametrize("source", ["/usr/bin", f"{STATE}/models/m/1", f"{STATE}/artifacts", f"{STATE}/keys/models"])
def test_shown(source: str) -> None:
    assert RULES.plan(plan("bind_ro", source)).cell_id == "cell_a"
    assert RULES.plan(plan("bind_rw", f"{RULES.work}/cell_a"))


@pytest.mark.parametrize(
    "source",
    [STATE, "/", "/var", "/var/lib", f"{STATE}/keys", f"{STATE}/db", f"{STATE}/run", f"{STATE}/logs/jobs", *INSIDE],
)
def test_not_shown(source: str) -> None:
    for op in ("bind_ro", "bind_rw"):
        with pytest.raises(RefusedError) as refused:
            RULES.plan(plan(op, source))
        assert refused.value.code == "BAD_PLAN"


@pytest.mark.parametrize("source", ["/usr", "/tmp", f"{RULES.work}/cell_a/../cell_b", f"{RULES.work}/cell_ab"])
def test_not_writable(source: str) -> None:
    with pytest.raises(RefusedError):
        RULES.plan(plan("bind_rw", source))


def test_ids() -> None:
    bad: list[dict[str, int]] = [
        {"host_uid": 0, "host_gid": 0, "count": 1, "init_uid": 1000},
        {"host_uid": 1000, "host_gid": 1000, "count": 65536, "init_uid": 0},
        {"host_uid": FIRST + 1, "host_gid": FIRST, "count": 65536, "init_uid": 0},
        {"host_uid": FIRST, "host_gid": 0, "count": 65536, "init_uid": 0},
        {"host_uid": FIRST, "host_gid": FIRST, "count": 65537, "init_uid": 0},
        {"host_uid": FIRST + limits.CELL_UID_SLOTS * 65536, "host_gid": FIRST, "count": 65536, "init_uid": 0},
    ]
    for ids in bad:
        if os.geteuid() != 0 and ids["host_uid"] == os.geteuid():
            continue
        with pytest.raises(RefusedError):
            RULES.plan(plan("bind_ro", "/usr", **ids))


def test_one_bad_step_refuses_the_whole_plan() -> None:
    steps = [{"op": "bind_ro", "path": "/usr", "source": "/usr"}, {"op": "proc", "path": "/proc"}]
    rules = Rules(("/usr",), STATE, RULES.work)
    asked = plan("bind_ro", "/usr/lib")
    asked["steps"] = [*steps, {"op": "bind_rw", "path": "/work", "source": f"{RULES.work}/cell_a"}]
    assert [step.op for step in rules.plan(asked).steps] == ["bind_ro", "proc", "bind_rw"]
    asked["steps"].append({"op": "bind_ro", "path": "/y", "source": "/etc"})
    with pytest.raises(RefusedError):
        rules.plan(asked)


def test_owners_lie_in_their_block() -> None:
    if os.geteuid() != 0:
        with pytest.raises(RefusedError):
            check_owner({"uid": 0, "gid": 0, "uid_first": 0, "uid_count": 1})
        return
    good = {"uid": FIRST + 1000, "gid": FIRST + 1000, "uid_first": FIRST, "uid_count": 65536}
    assert check_owner(good).uid == FIRST + 1000
    for change in ({"uid": 0}, {"gid": 0}, {"uid_first": 0}, {"uid_count": 1}, {"uid": FIRST + 65536}):
        with pytest.raises(RefusedError):
            check_owner(good | change)


def test_stdio_is_given_beside_the_executable() -> None:
    spec = {"exec_id": "e", "argv": ["x"]}
    assert exec_spec(spec, ["null", "log", "fd"]).stdio == ("null", "fd", "fd")
    for value, stdio in (
        (spec | {"stdio": ["fd"] * 3}, ["null"] * 3),
        (spec, ["log", "null", "null"]),
        (5, ["null"] * 3),
    ):
        with pytest.raises(RefusedError):
            exec_spec(value, stdio)
