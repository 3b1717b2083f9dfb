"""Cells in cells, resized, scheduled and mended, on real processes behind a double of PID 1."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aether.spawner.linux import sched as scheduling
from aether.spawner.linux.sched import Sched
from aether.spawner.upkeep import Upkeep

if TYPE_CHECKING:
    from conftest import Rig

Create = Callable[..., dict[str, Any]]
SLEEP = ["sleep", "60"]


def start(rig: Rig, create: Create, name: str, slot: int, **more: Any) -> dict[str, Any]:
    reply, _ = rig.client.call("cell.create", create(name, SLEEP, slot, once=False, **more), key=name)
    return reply


def need(rig: Rig, *limits: str) -> None:
    missing = rig.cgroups.probe()["missing"]
    for limit in limits:
        if limit in missing:
            pytest.skip(f"{limit}: {missing[limit]}")


def test_cells_nest_and_end_with_the_cell_around_them(rig: Rig, create: Create) -> None:
    need(rig, "pids")
    start(rig, create, "a", 0, nestable=True, limits={"pids": 20})
    inner = start(rig, create, "b", 1, nestable=True, parent="a", limits={"pids": 10})
    assert inner["parent"] == "a"
    start(rig, create, "c", 2, parent="b")
    names = [rig.lifecycle.cells[name].cgroup.name for name in "abc"]
    assert names == ["a", "a/b", "a/b/c"]
    assert len(rig.cgroups.procs(rig.lifecycle.cells["a"].cgroup)) == 6
    with pytest.raises(AssertionError, match=r"LIMIT_REFUSED: .*pids 11 is above the 10"):
        start(rig, create, "d", 3, parent="b", limits={"pids": 11})
    with pytest.raises(AssertionError, match=r"BAD_FIELD: .*not created nestable"):
        start(rig, create, "d", 3, parent="c")
    with pytest.raises(AssertionError, match="NO_SUCH_CELL"):
        start(rig, create, "d", 3, parent="nobody")
    rig.client.call("cell.free", {"cell": "a"})
    for name in "cb":
        assert rig.client.event("cell.gone", cell=name)["reason"] == "parent-ended"
    assert {cell["state"] for cell in rig.client.json("cell.list", {})["cells"]} == {"gone"}
    assert not list(Path("/sys/fs/cgroup").glob(f"**/aether-{rig.instance}/a"))


def test_the_end_of_pid_1_takes_the_cells_inside(rig: Rig, create: Create) -> None:
    need(rig, "pids")
    start(rig, create, "a", 0, nestable=True)
    start(rig, create, "b", 1, parent="a")
    os.kill(rig.lifecycle.cells["a"].pid, 9)
    assert rig.client.event("cell.gone", cell="b")["reason"] == "parent-ended"
    rig.client.event("cell.gone", cell="a")


def test_freezing_reaches_down(rig: Rig, create: Create) -> None:
    need(rig, "pids")
    start(rig, create, "a", 0, nestable=True)
    start(rig, create, "b", 1, parent="a")
    rig.client.call("cell.freeze", {"cell": "a", "frozen": True})
    cells = {cell["cell"]: cell["frozen"] for cell in rig.client.json("cell.list", {})["cells"]}
    assert cells == {"a": True, "b": True}
    rig.client.call("cell.freeze", {"cell": "a", "frozen": False})
    rig.client.call("cell.kill", {"cell": "a"})
    rig.client.event("cell.gone", cell="b")


def test_limits_change_while_it_lives(rig: Rig, create: Create) -> None:
    need(rig, "pids", "memory_bytes", "cpu_millis")
    start(rig, create, "a", 0, limits={"pids": 20})
    wanted = {"pids": 30, "memory_bytes": 64 << 20, "cpu_millis": 250, "memory_min_bytes": 4096}
    told, _ = rig.client.call("cell.limit", {"cell": "a", "limits": wanted})
    assert {"pids", "memory_bytes", "cpu_millis"} <= set(told["limits"])
    assert ("memory_min_bytes" in told["missing"]) == ("memory_min_bytes" not in told["limits"])
    with pytest.raises(AssertionError, match=r"LIMIT_REFUSED: cannot resize cell a: cannot set cpuset_cpus"):
        rig.client.call("cell.limit", {"cell": "a", "limits": {"cpuset_cpus": "3-1"}})
    usage, _ = rig.client.call("cell.usage", {"cell": "a"})
    assert usage["throttled_count"] is not None and isinstance(usage["pressure"], dict)
    rig.client.call("cell.free", {"cell": "a"})


def test_a_cgroup_that_somebody_changed_is_mended_and_told(rig: Rig, create: Create) -> None:
    need(rig, "pids")
    start(rig, create, "a", 0, limits={"pids": 20})
    upkeep = Upkeep(rig.loop, rig.cgroups, rig.lifecycle.cells, rig.server.emit)
    cell = rig.lifecycle.cells["a"]
    upkeep.look(cell)
    assert cell.altered == ()
    (bound,) = (
        path for path in Path("/sys/fs/cgroup").glob(f"**/aether-{rig.instance}/a/pids.max") if path.read_text() != ""
    )
    bound.write_text("1000")
    upkeep.look(cell)
    assert bound.read_text() == "20\n"
    found = rig.client.event("cell.altered", cell="a")["found"]
    assert found == ["pids was changed to 1000"]
    (told,) = rig.client.json("cell.list", {})["cells"]
    assert told["altered"] == found


@pytest.mark.parametrize(
    "asked",
    [
        {"policy": "batch", "nice": 5},
        {"policy": "idle", "io_class": "idle"},
        {"nice": 10, "io_class": "best-effort", "io_priority": 6},
        {"policy": "fifo", "priority": 3},
        {"policy": "rr", "priority": 2, "io_class": "realtime", "io_priority": 1},
        {"nice": -5},
    ],
)
def test_a_class_is_inherited_from_pid_1(rig: Rig, create: Create, asked: dict[str, Any]) -> None:
    missing = scheduling.missing()
    if missing and (asked.get("policy") in missing or asked.get("nice", 0) < 0):
        pytest.skip(str(missing))
    start(rig, create, "a", 0, sched=asked)
    cell = rig.lifecycle.cells["a"]
    for pid in rig.cgroups.procs(cell.cgroup):
        assert scheduling.seen(pid) == Sched(**asked)
    (view,) = rig.client.json("cell.list", {})["cells"]
    assert view["report"]["sched"] == Sched(**asked).describe()
    rig.client.call("cell.free", {"cell": "a"})


def test_a_deadline_is_the_executables_own(rig: Rig, create: Create) -> None:
    if scheduling.missing():
        pytest.skip(str(scheduling.missing()))
    times = {"policy": "deadline", "runtime_us": 2000, "deadline_us": 50_000, "period_us": 100_000}
    start(rig, create, "a", 0, sched=times)
    cell = rig.lifecycle.cells["a"]
    classes = {scheduling.seen(pid).policy for pid in rig.cgroups.procs(cell.cgroup)}
    assert classes == {"other", "deadline"}
    greedy = times | {"runtime_us": 94_000, "deadline_us": 94_000}
    with pytest.raises(AssertionError, match="CELL_FAILED: cannot schedule as deadline"):
        for slot in range(1, (os.cpu_count() or 1) + 2):  # more than there are CPUs to guarantee it on
            start(rig, create, f"b{slot}", slot, sched=greedy)


@pytest.mark.parametrize(
    "asked",
    [
        {"policy": "fifo"},
        {"policy": "other", "priority": 3},
        {"policy": "deadline", "runtime_us": 5},
        {"runtime_us": 5, "deadline_us": 5, "period_us": 5},
        {"policy": "idle", "nice": 3},
    ],
)
def test_what_does_not_go_together_is_refused(rig: Rig, create: Create, asked: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="BAD_FIELD: cannot schedule the cell"):
        start(rig, create, "a", 0, sched=asked)
    assert not rig.lifecycle.cells
