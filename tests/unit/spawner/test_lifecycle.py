"""Cells from create to free, on real processes behind a double of PID 1."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from aether.substrate.cells.logs import ExecLog

if TYPE_CHECKING:
    from conftest import Rig

Create = Callable[..., dict[str, Any]]


def memfd(data: bytes) -> int:
    fd = os.memfd_create("input")
    os.write(fd, data)
    return fd


def open_fds() -> int:
    gc.collect()  # of former rigs
    return len(list(Path("/proc/self/fd").iterdir()))


def run(rig: Rig, create: Create, argv: list[str], name: str = "a", **more: Any) -> dict[str, Any]:
    rig.client.call("cell.create", create(name, argv, **more), key="k")
    return rig.client.event("exec.exited", cell=name)


def test_create_and_first_executable_in_one_message(rig: Rig, create: Create) -> None:
    end = run(rig, create, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (end["code"], end["signal"], end["timed_out"], end["reason"]) == (7, None, False, None)
    usage = end["usage"]
    assert (usage["stdout_bytes"], usage["stderr_bytes"], usage["output_dropped_bytes"]) == (4, 4, 0)
    assert usage["wall_us"] > 0
    if rig.cgroups.kind != "none":
        assert usage["cpu_user_us"] is not None and usage["sources"]["cpu"].startswith("cgroup")
    gone = rig.client.event("cell.gone", cell="a")
    assert gone["reason"] is None
    page = ExecLog(rig.state / "logs/a", "exec_a").read("all", 0)
    assert sorted(chunk.data for chunk in page.chunks) == [b"err\n", b"out\n"]
    rig.client.call("cell.free", {"cell": "a"})
    assert rig.client.json("cell.list", {}) == {"cells": []}


def test_all_output_is_kept_when_the_exit_is_told(rig: Rig, create: Create) -> None:
    """A background process holds the pipe open; what was written before the exit is there nevertheless."""
    argv = ["sh", "-c", "sleep 30 & head -c 50000 /dev/zero; echo last"]
    end = run(rig, create, argv, once=False)
    assert end["usage"]["stdout_bytes"] == 50_005
    assert ExecLog(rig.state / "logs/a", "exec_a").read("stdout", 50_000).data == b"last\n"


def test_a_silent_executable_leaves_an_empty_log_that_has_ended(rig: Rig, create: Create) -> None:
    """Nobody waits for the keeper then; it hears of it afterwards, so that whoever follows the log is told the end."""
    end = run(rig, create, ["true"])
    assert (end["usage"]["stdout_bytes"], end["usage"]["output_dropped_bytes"]) == (0, 0)
    log = ExecLog(rig.state / "logs/a", "exec_a")
    rig.until(lambda: log.read("all", 0).ended)


def test_output_of_one_that_runs_on_is_kept_while_it_runs(rig: Rig, create: Create) -> None:
    rig.client.call("cell.create", create("a", ["sh", "-c", "echo early; sleep 30"]), key="k")
    log = ExecLog(rig.state / "logs/a", "exec_a")
    rig.until(lambda: log.read("stdout", 0).data == b"early\n")
    rig.client.call("cell.free", {"cell": "a"})


def test_repeated_create_is_the_same_cell(rig: Rig, create: Create) -> None:
    args = create("a", ["sleep", "30"])
    first, _ = rig.client.call("cell.create", args, key="k")
    again, _ = rig.client.call("cell.create", args, key="k")
    assert again["existing"] and again["execs"] == first["execs"]
    with pytest.raises(AssertionError, match="IDEMPOTENCY_CONFLICT"):
        rig.client.call("cell.create", args, key="other")
    rig.client.call("cell.free", {"cell": "a"})
    with pytest.raises(AssertionError, match="GONE"):
        rig.client.call("cell.create", args, key="k")


def test_two_creates_at_once_start_one_cell(rig: Rig, create: Create) -> None:
    args = create("a", ["sh", "-c", "echo once >> marks"], work=True)
    args["exec"]["spec"]["cwd"] = f"{rig.work.path}/a"
    numbers = [rig.client.send("cell.create", args, key="k") for _ in range(2)]
    rig.client.event("exec.exited", cell="a")
    rig.until(lambda: rig.client.pump() or all(n in rig.client._replies for n in numbers))
    assert Path(rig.work.path, "a/marks").read_text() == "once\n"


def test_exits_are_kept_until_acknowledged(rig: Rig, create: Create) -> None:
    """The client dies, the executable ends, another client finds the status."""
    rig.client.call("cell.create", create("a", ["sh", "-c", "sleep 0.1; exit 3"]), key="k")
    rig.client.close()
    rig.until(lambda: rig.lifecycle.cells["a"].state == "gone")
    second = rig.connect()
    (cell,) = second.json("cell.list", {})["cells"]
    assert cell["state"] == "gone" and cell["execs"][0]["code"] == 3
    second.call("exit.ack", {"cell": "a", "exec": "exec_a"})
    (cell,) = second.json("cell.list", {})["cells"]
    assert cell["execs"] == []
    second.call("cell.free", {"cell": "a"})


def test_kill_takes_the_whole_tree(rig: Rig, create: Create) -> None:
    if rig.cgroups.kind == "none":
        pytest.skip("the double has no pid namespace: only a cgroup finds its grandchildren")
    stubborn = "trap '' TERM; while :; do sleep 1; done"
    script = f'(setsid sh -c "{stubborn}" &); {stubborn}'
    rig.client.call("cell.create", create("a", ["sh", "-c", script]), key="k")
    rig.until(lambda: len(rig.cgroups.procs(rig.lifecycle.cells["a"].cgroup)) >= 4)
    pids = rig.cgroups.procs(rig.lifecycle.cells["a"].cgroup)
    rig.client.call("cell.kill", {"cell": "a"})
    end = rig.client.event("exec.exited", cell="a")
    assert end["signal"] == signal.SIGKILL and end["reason"] == "killed"
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_stop_gives_grace(rig: Rig, create: Create) -> None:
    rig.client.call(
        "cell.create", create("a", ["sh", "-c", "trap 'exit 5' TERM; while :; do sleep 0.01; done"]), key="k"
    )
    time.sleep(0.1)
    rig.client.call("cell.stop", {"cell": "a", "grace_ms": 5000})
    assert rig.client.event("exec.exited", cell="a")["code"] == 5


def test_stop_kills_after_the_grace(rig: Rig, create: Create) -> None:
    rig.client.call("cell.create", create("a", ["sh", "-c", "trap '' TERM; while :; do sleep 0.01; done"]), key="k")
    time.sleep(0.1)
    began = time.monotonic()
    rig.client.call("cell.stop", {"cell": "a", "grace_ms": 200})
    end = rig.client.event("exec.exited", cell="a")
    assert end["signal"] == signal.SIGKILL and end["reason"] == "killed" and not end["timed_out"]
    assert 0.2 <= time.monotonic() - began < 2


def test_deadline_holds_without_a_client(rig: Rig, create: Create) -> None:
    script = ["sh", "-c", "trap '' TERM; while :; do sleep 0.01; done"]
    args = create("a", script, exec={"wall_ms_max": 150, "grace_ms": 100})
    rig.client.call("cell.create", args, key="k")
    rig.client.close()
    rig.until(lambda: rig.lifecycle.cells["a"].state == "gone")
    (cell,) = rig.connect().json("cell.list", {})["cells"]
    (end,) = cell["execs"]
    assert end["timed_out"] and end["signal"] == signal.SIGKILL and end["reason"] == "timed-out"
    assert 250_000 <= end["usage"]["wall_us"] < 2_000_000


def test_cell_deadline_stops_all(rig: Rig, create: Create) -> None:
    rig.client.call("cell.create", create("a", ["sleep", "30"], wall_ms_max=150, grace_ms=1000), key="k")
    end = rig.client.event("exec.exited", cell="a")
    assert end["timed_out"] and end["signal"] == signal.SIGTERM


def test_several_executables_in_one_cell(rig: Rig, create: Create) -> None:
    rig.client.call("cell.create", create("a", ["sleep", "30"], once=False), key="k")
    spec = {"exec_id": "second", "argv": ["sh", "-c", "echo two; exit 2"], "env": {"PATH": "/usr/bin:/bin"}}
    args = {"cell": "a", "exec": {"spec": spec, "stdio": ["null", "log", "log"]}}
    rig.client.call("exec.start", args, key="k2")
    assert rig.client.event("exec.exited", exec="second")["code"] == 2
    again, _ = rig.client.call("exec.start", args, key="k2")
    assert again["state"] == "ended"
    rig.client.call("exec.signal", {"cell": "a", "exec": "exec_a", "signo": signal.SIGUSR1})
    assert rig.client.event("exec.exited", exec="exec_a")["signal"] == signal.SIGUSR1
    assert rig.lifecycle.cells["a"].state == "running"


def test_passed_descriptors_reach_the_executable(rig: Rig, create: Create) -> None:
    read_end, write_end = os.pipe()
    args = create("a", ["sh", "-c", "cat; echo extra >&3"])
    args["exec"]["stdio"] = ["fd", "log", "null"]
    args["exec"]["spec"]["extra_fds"] = 1
    stdin = memfd(b"from stdin\n")
    os.lseek(stdin, 0, os.SEEK_SET)
    rig.client.call("cell.create", args, fds=[stdin, write_end], key="k")
    rig.client.event("exec.exited", cell="a")
    assert os.read(read_end, 100) == b"extra\n"
    assert ExecLog(rig.state / "logs/a", "exec_a").read("stdout", 0).data == b"from stdin\n"
    for fd in (stdin, read_end, write_end):
        os.close(fd)


def test_wrong_number_of_descriptors_is_refused(rig: Rig, create: Create) -> None:
    before = open_fds()
    fd = memfd(b"")
    with pytest.raises(AssertionError, match="PROTOCOL"):
        rig.client.call("cell.create", create("a", ["true"]), fds=[fd], key="k")
    with pytest.raises(AssertionError, match="no descriptors"):
        rig.client.call("cell.list", {}, fds=[fd])
    os.close(fd)
    assert open_fds() == before
    assert rig.client.json("cell.list", {}) == {"cells": []}


def test_failed_launch_leaves_nothing(rig: Rig, create: Create) -> None:
    before = open_fds()
    rig.launcher.fail = "cannot start cell: unshare: refused"
    with pytest.raises(AssertionError, match="CELL_FAILED: cannot start cell: unshare"):
        rig.client.call("cell.create", create("a", ["true"], work=True), key="k")
    rig.until(lambda: not rig.lifecycle.cells)
    assert list(Path(rig.work.path).iterdir()) == []
    rig.loop.turn(0.05)
    assert open_fds() == before
    rig.client.call("cell.create", create("a", ["true"]), key="k")
    rig.client.event("exec.exited", cell="a")


def test_inputs_outputs_and_removal(rig: Rig, create: Create) -> None:
    args = create("a", ["sh", "-c", "cat in/a.txt > out.txt; ln -s /etc/passwd link.txt"])
    args["exec"]["spec"]["cwd"] = f"{rig.work.path}/a"
    args["files"] = [{"path": "in/a.txt", "mode": 0o644}, {"path": "big", "mode": 0o600}]
    small, big = memfd(b"input"), memfd(b"x" * 3_000_000)
    rig.client.call("cell.create", args, fds=[small, big], key="k")
    rig.client.event("cell.gone", cell="a")
    if os.geteuid() == 0:  # the double does not change ids
        os.chown(f"{rig.work.path}/a/out.txt", rig.lifecycle.cells["a"].owner.uid, 0)
    found = rig.client.json("work.collect", {"cell": "a", "globs": ["*.txt"]})
    assert found["files"] == [{"path": "out.txt", "size_bytes": 5}]
    assert "symbolic" in found["refused"]["link.txt"]
    reply, (fd,) = rig.client.call("work.open", {"cell": "a", "path": "out.txt"})
    assert reply["size_bytes"] == 5 and os.read(fd, 10) == b"input"
    os.close(fd)
    for path in ("link.txt", "../../x", "/etc/passwd"):
        with pytest.raises(AssertionError, match="OUTPUT_REFUSED"):
            rig.client.call("work.open", {"cell": "a", "path": path})
    rig.client.call("cell.free", {"cell": "a"})
    assert not Path(rig.work.path, "a").exists()
    for fd in (small, big):
        os.close(fd)


def test_many_inputs_go_ahead_of_the_cell(rig: Rig, create: Create) -> None:
    fd = memfd(b"x")
    args = create("a", ["sh", "-c", "ls | wc -l"], work=True)
    owner = {"uid": os.geteuid(), "gid": os.getegid(), "uid_first": os.geteuid(), "uid_count": 1}
    if os.geteuid() == 0:
        first = args["plan"]["id_map"]["host_uid"]
        owner = {"uid": first + 1000, "gid": first + 1000, "uid_first": first, "uid_count": 65536}
    for batch in range(2):
        files = [{"path": f"f{batch}-{number}", "mode": 0o644} for number in range(200)]
        rig.client.call("work.prepare", {"cell": "a", "owner": owner, "files": files}, fds=[fd] * 200)
    args["exec"]["spec"]["cwd"] = f"{rig.work.path}/a"
    rig.client.call("cell.create", args, key="k")
    rig.client.event("exec.exited", cell="a")
    assert ExecLog(rig.state / "logs/a", "exec_a").read("stdout", 0).data == b"400\n"
    os.close(fd)


def test_prepared_and_never_created_is_freed(rig: Rig) -> None:
    first = 0x7000_0000
    owner = {"uid": os.geteuid(), "gid": os.getegid(), "uid_first": os.geteuid(), "uid_count": 1}
    if os.geteuid() == 0:
        owner = {"uid": first + 1000, "gid": first + 1000, "uid_first": first, "uid_count": 65536}
    rig.client.call("work.prepare", {"cell": "a", "owner": owner, "files": []})
    assert Path(rig.work.path, "a").is_dir()
    rig.client.call("cell.free", {"cell": "a"})
    assert not Path(rig.work.path, "a").exists()


def test_keeper_death_loses_no_byte(rig: Rig, create: Create) -> None:
    rig.client.call(
        "cell.create", create("a", ["sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done"]), key="k"
    )
    rig.loop.turn(0.15)
    os.kill(rig.keeper.pid, signal.SIGKILL)
    end = rig.client.event("exec.exited", cell="a")
    assert end["usage"]["stdout_bytes"] == 12
    assert ExecLog(rig.state / "logs/a", "exec_a").read("stdout", 0).data == b"1\n2\n3\n4\n5\n6\n"


def test_oom_is_visible(rig: Rig, create: Create) -> None:
    if "memory_bytes" in rig.cgroups.probe()["missing"]:
        pytest.skip("no memory controller")
    argv = ["python3", "-c", "x = bytearray(300 << 20)"]
    end = run(rig, create, argv, limits={"memory_bytes": 64 << 20, "swap_bytes": 0})
    assert end["oom"] and end["signal"] == signal.SIGKILL and end["usage"]["oom_kills"] >= 1


def test_block_of_uids_is_exclusive(rig: Rig, create: Create) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: only then cells have blocks")
    rig.client.call("cell.create", create("a", ["sleep", "30"], slot=3), key="k")
    with pytest.raises(AssertionError, match="holds it"):
        rig.client.call("cell.create", create("b", ["true"], slot=3), key="k")
    rig.client.call("cell.free", {"cell": "a"})
    rig.client.call("cell.create", create("b", ["true"], slot=3), key="k")
    rig.client.event("exec.exited", cell="b")


def test_freeze_stops_the_clock_of_the_job(rig: Rig, create: Create) -> None:
    if rig.cgroups.kind == "none":
        pytest.skip("no cgroup to freeze")
    rig.client.call("cell.create", create("a", ["sh", "-c", "while :; do :; done"]), key="k")
    rig.client.call("cell.freeze", {"cell": "a", "frozen": True})

    def stands() -> bool:
        """It takes the kernel until the task's next turn to stop it."""
        before = rig.client.call("cell.usage", {"cell": "a"})[0]["cpu_user_us"]
        time.sleep(0.2)
        return bool(rig.client.call("cell.usage", {"cell": "a"})[0]["cpu_user_us"] == before)

    rig.until(stands)
    rig.client.call("cell.kill", {"cell": "a"})


def test_bad_plans_are_refused(rig: Rig, create: Create) -> None:
    good = create("a", ["true"])
    work = rig.work.path
    shows: list[tuple[str, str, str]] = [
        ("bind_ro", "/etc/shadow", "outside"),
        ("bind_ro", str(rig.state / "keys"), "outside"),
        ("bind_rw", f"{work}/other", "own work directory"),
        ("bind_rw", "/usr", "own work directory"),
        ("bind_ro", f"{work}/other", "state directory"),
        ("bind_dev", "/dev/sda", "not an allowed device"),
    ]
    for op, source, why in shows:
        plan = good["plan"] | {
            "level": "cell",
            "namespaces": ["user", "pid", "mnt"],
            "steps": [{"op": op, "path": "/x", "source": source}],
        }
        with pytest.raises(AssertionError, match=f"BAD_PLAN.*{why}"):
            rig.client.call("cell.create", good | {"plan": plan}, key="k")
    for ids in (
        {"host_uid": 0, "host_gid": 0, "count": 1, "init_uid": 1000},
        {"host_uid": 1000, "host_gid": 1000, "count": 2000},
    ):
        with pytest.raises(AssertionError, match="BAD_PLAN"):
            rig.client.call("cell.create", good | {"plan": good["plan"] | {"id_map": ids}}, key="k")


def test_a_client_that_sends_rubbish_hurts_nobody(rig: Rig, create: Create) -> None:
    bad = rig.connect()
    bad._sock.send(b"\xff\xfe rubbish")
    bad._sock.send(b'{"id": 1, "op": "cell.kill"}')
    rig.loop.turn(0.05)
    bad._sock.close()
    assert run(rig, create, ["true"])["code"] == 0
