"""The pool: blueprints by digest, and prepared cells that serve one request each and leave nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aether.spawner import warm

if TYPE_CHECKING:
    from conftest import Rig

BLOCK = 65_536


def plan(rig: Rig) -> dict[str, Any]:
    ids = {"host_uid": 0x7000_0000, "host_gid": 0x7000_0000, "count": BLOCK, "init_uid": 0}
    if os.geteuid() != 0:
        ids = {"host_uid": os.geteuid(), "host_gid": os.getegid(), "count": 1, "init_uid": 1000}
    work = {"op": "bind_rw", "path": "/work", "source": f"{rig.work.path}/outline"}
    return {
        "cell_id": "outline",
        "level": "cell",
        "namespaces": ["user", "pid", "mnt", "net"],
        "id_map": ids | {"job_uid": 1000, "job_gid": 1000},
        "hostname": "cell",
        "steps": [{"op": "proc", "path": "/proc"}, work],
        "seccomp_profile": "cell",
        "landlock": None,
    }


def keep(rig: Rig, prepare: bool = True) -> str:
    value, _ = rig.client.call("blueprint.keep", {"plan": plan(rig), "limits": {}, "prepare": prepare})
    return str(value["digest"])


def run(rig: Rig, digest: str, name: str, script: str = "true", **more: Any) -> dict[str, Any]:
    spec = {"exec_id": f"exec_{name}", "argv": ["sh", "-c", script], "env": {"PATH": "/usr/bin:/bin"}}
    args = {
        "blueprint": {"digest": digest, "cell": name},
        "exec": {"spec": spec, "stdio": ["null", "log", "log"]},
        "once": True,
        "work": True,
    }
    made, _ = rig.client.call("cell.create", args | more, key=name)
    return made


def until_ready(rig: Rig, count: int = 1) -> None:
    rig.until(lambda: rig.warm.facts()["ready"] >= count)


def test_the_first_use_is_cold_and_the_next_takes_a_prepared_cell(rig: Rig) -> None:
    digest = keep(rig)
    assert keep(rig) == digest and rig.warm.facts() == {"ready": 0, "taken": 0}
    run(rig, digest, "a", "exit 3")
    assert rig.client.event("exec.exited", cell="a")["code"] == 3
    until_ready(rig)
    assert [cell["cell"] for cell in rig.client.json("cell.list", {})["cells"]] == ["a"], "the pool is in no list"
    made = run(rig, digest, "b", "exit 4")
    assert made["cell"] == "b" and rig.warm.facts()["taken"] == 1
    end = rig.client.event("exec.exited", cell="b")
    assert end["code"] == 4 and end["usage"]["wall_us"] > 0
    for name in "ab":
        rig.client.call("cell.free", {"cell": name})
    assert rig.client.json("cell.list", {}) == {"cells": []}


def test_a_prepared_cell_has_files_work_directory_and_uids_of_its_own(rig: Rig) -> None:
    digest = keep(rig)
    run(rig, digest, "a", "sleep 30")
    until_ready(rig)
    fd = os.memfd_create("input")
    os.write(fd, b"hello")
    spec = {"exec_id": "exec_b", "argv": ["sleep", "30"], "env": {"PATH": "/usr/bin:/bin"}}
    args = {
        "blueprint": {"digest": digest, "cell": "b"},
        "exec": {"spec": spec, "stdio": ["null", "log", "log"]},
        "files": [{"path": "in.txt", "mode": 0o644}],
        "work": True,
    }
    made, _ = rig.client.call("cell.create", args, fds=[fd], key="b")
    os.close(fd)
    assert rig.warm.facts()["taken"] == 1
    first = rig.client.json("cell.list", {})["cells"]
    if os.geteuid() == 0:
        assert len({cell["uid_first"] for cell in first}) == 2
    _, fds = rig.client.call("work.open", {"cell": "b", "path": "in.txt"})
    assert os.read(fds[0], 10) == b"hello"
    os.close(fds[0])
    place = rig.lifecycle.cells["b"].place
    assert place != "b" and (Path(rig.work.path) / place).is_dir()
    rig.client.call("cell.free", {"cell": "b"})
    assert not (Path(rig.work.path) / place).exists()
    assert made["uid_first"] == next(cell["uid_first"] for cell in first if cell["cell"] == "b")


def test_no_client_reaches_a_cell_of_the_pool(rig: Rig) -> None:
    digest = keep(rig)
    run(rig, digest, "a", "sleep 30")
    until_ready(rig)
    place = next(cell.cell_id for cell in rig.lifecycle.cells.values() if cell.warm)
    for op, args in (("cell.usage", {}), ("cell.kill", {}), ("cell.freeze", {"frozen": True})):
        with pytest.raises(AssertionError, match="NO_SUCH_CELL"):
            rig.client.call(op, {"cell": place} | args)
    rig.client.call("cell.free", {"cell": place})
    assert rig.warm.facts()["ready"] == 1 and rig.lifecycle.cells[place].state == "running"


def test_a_repeated_create_gets_the_cell_that_was_taken(rig: Rig) -> None:
    digest = keep(rig)
    run(rig, digest, "a", "sleep 30")
    until_ready(rig)
    run(rig, digest, "b", "sleep 30")
    assert run(rig, digest, "b", "sleep 30")["existing"] is True
    rig.client.call("cell.free", {"cell": "b"})
    with pytest.raises(AssertionError, match="GONE"):
        run(rig, digest, "b")


def test_a_prepared_cell_that_died_is_passed_over_and_leaves_nothing(rig: Rig) -> None:
    digest = keep(rig)
    run(rig, digest, "a")
    until_ready(rig)
    dead = next(cell for cell in rig.lifecycle.cells.values() if cell.warm)
    signal.pidfd_send_signal(dead.pidfd, signal.SIGKILL)
    rig.until(lambda: dead.cell_id not in rig.lifecycle.cells)
    assert not (Path(rig.work.path) / dead.place).exists()
    run(rig, digest, "b", "exit 5")
    assert rig.client.event("exec.exited", cell="b")["code"] == 5 and rig.warm.facts()["taken"] == 0
    assert [event for event in rig.client.events if event["ev"] == "cell.gone" and event["cell"] == dead.cell_id] == []


def test_a_prepared_cell_that_dies_as_it_is_taken_is_a_clear_refusal(rig: Rig) -> None:
    digest = keep(rig)
    run(rig, digest, "a", "sleep 30")
    until_ready(rig)
    taken = next(cell for cell in rig.lifecycle.cells.values() if cell.warm)
    signal.pidfd_send_signal(taken.pidfd, signal.SIGSTOP)  # it is asked, and never answers
    with pytest.raises(AssertionError, match="CELL_FAILED"):
        rig.loop.after(0.05, lambda: signal.pidfd_send_signal(taken.pidfd, signal.SIGKILL))
        run(rig, digest, "b")
    rig.until(lambda: "b" not in rig.lifecycle.cells)
    assert not (Path(rig.work.path) / taken.place).exists()


def test_what_nobody_uses_is_let_go(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "IDLE_S", 0.2)
    digest = keep(rig)
    run(rig, digest, "a")
    until_ready(rig)
    rig.until(lambda: all(not cell.warm for cell in rig.lifecycle.cells.values()))
    assert rig.warm.facts()["ready"] == 0
    run(rig, digest, "b")
    assert rig.client.event("exec.exited", cell="b")["code"] == 0


def test_a_blueprint_that_is_not_prepared_stays_cold(rig: Rig) -> None:
    digest = keep(rig, prepare=False)
    for name in "ab":
        run(rig, digest, name)
        rig.client.event("exec.exited", cell=name)
    assert rig.warm.facts() == {"ready": 0, "taken": 0}


def test_a_burst_is_answered_by_more_prepared_cells_up_to_the_bound(rig: Rig) -> None:
    digest = keep(rig)
    for number in range(warm.READY_MAX + 3):
        run(rig, digest, f"c{number}")
    until_ready(rig)
    assert rig.warm.facts()["ready"] <= warm.READY_MAX


def test_bad_requests(rig: Rig) -> None:
    with pytest.raises(AssertionError, match="NOT_FOUND"):
        run(rig, "0" * 64, "a")
    digest = keep(rig)
    with pytest.raises(AssertionError, match="PROTOCOL"):
        run(rig, digest, "a", plan=plan(rig))
    with pytest.raises(AssertionError, match="PROTOCOL"):
        rig.client.call("cell.create", {"once": True}, key="k")
    foreign = plan(rig) | {"steps": [{"op": "bind_rw", "path": "/work", "source": rig.work.path + "/other"}]}
    with pytest.raises(AssertionError, match="BAD_PLAN"):
        rig.client.call("blueprint.keep", {"plan": foreign, "limits": {}})


def test_old_blueprints_are_forgotten(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "BLUEPRINTS_MAX", 1)
    first = keep(rig)
    other, _ = rig.client.call("blueprint.keep", {"plan": plan(rig), "limits": {"pids": 5}})
    with pytest.raises(AssertionError, match="NOT_FOUND"):
        run(rig, first, "a")
    run(rig, other["digest"], "b")
