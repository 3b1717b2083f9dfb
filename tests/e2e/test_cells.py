"""Allocated cells, end to end: the real command, sockets, roles and kernel."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.allocations import CellState
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.limits import MIB
from aether.contract.paths import Layout
from tests.support import instance, machine

AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found
        for cell in found.cells.list():
            if cell.parent is None:
                found.cells.free(cell.cell_id, grace_ms=0)


def environment(layout: Layout) -> dict[str, str]:
    return {**os.environ, "AETHER_STATE": str(layout.root)}


def aether(layout: Layout, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=environment(layout), **more)


def until(true: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)
    return found


def test_a_session_by_the_command(layout: Layout, client: Client) -> None:
    made = aether(layout, "cell", "allocate", "agent", "--memory", "128M", "--idle-timeout", "10m")
    assert made.returncode == 0 and made.stdout.startswith("cell_"), made.stderr
    ran = aether(layout, "cell", "exec", "agent", "--", "sh", "-c", "echo out; echo err >&2; echo kept > f; exit 3")
    assert (ran.returncode, ran.stdout, ran.stderr) == (3, "out\n", "err\n")
    assert aether(layout, "cell", "exec", "agent", "--", "cat", "f").stdout == "kept\n", (
        "what one leaves the next finds"
    )
    fed = aether(layout, "cell", "exec", "-i", "agent", "--", "tr", "a-z", "A-Z", input="through stdin\n")
    assert fed.stdout == "THROUGH STDIN\n", fed.stderr
    killed = aether(layout, "cell", "exec", "agent", "--", "sh", "-c", "kill -9 $$")
    assert killed.returncode == 128 + 9
    late = aether(layout, "cell", "exec", "--timeout", "300ms", "agent", "--", "sleep", "60")
    assert late.returncode == 124
    assert aether(layout, "cell", "exec", "agent", "--", "true").returncode == 0, "only the late one ended"
    shown = json.loads(aether(layout, "cell", "show", "agent", "--json").stdout)
    assert (shown["state"], shown["limits"]["memory_bytes"], shown["idle_timeout_ms"]) == (
        "running",
        128 * MIB,
        600_000,
    )
    freed = aether(layout, "cell", "free", "agent")
    assert freed.stdout == "freed\n"
    gone = aether(layout, "cell", "exec", "agent", "--", "true")
    assert gone.returncode == 120 and "NO_SUCH_CELL" in gone.stderr


def test_background_processes_are_named_stopped_and_signalled(layout: Layout, client: Client) -> None:
    client.cells.allocate("agent")
    marker = f"9{os.getpid()}"
    script = f"trap 'echo hup' HUP; (setsid sleep {marker}1 &) ; while :; do sleep 0.05; done"
    started = aether(layout, "cell", "start", "agent", "server", "--", "sh", "-c", script)
    job_id = started.stdout.strip()
    until(lambda: machine.mentioning(f"{marker}1"))
    again = aether(layout, "cell", "start", "agent", "server", "--", "true")
    assert again.returncode == 120 and "NAME_TAKEN" in again.stderr
    aether(layout, "cell", "signal", "agent", "server", "HUP")
    until(lambda: b"".join(client.logs(job_id, stream="stdout")) == b"hup\n")
    other = client.cells.start("agent", ["sleep", f"{marker}2"], name="other")
    until(lambda: machine.mentioning(f"{marker}2"))
    stopped = aether(layout, "cell", "stop", "agent", "server", "--grace", "300ms")
    assert stopped.stdout == "cancelled\n", stopped.stderr
    assert machine.mentioning(f"{marker}2"), "its neighbour lives"
    assert [each.job_id for each in client.cells.show("agent").executables] == [other.job_id]
    client.cells.free("agent", grace_ms=0)
    view = client.wait(other.job_id)
    assert view.state is JobState.CANCELLED and view.error is not None and "its cell was freed" in view.error.message
    until(lambda: not machine.mentioning(marker))


def test_files_go_in_and_out(layout: Layout, client: Client, tmp_path: Path) -> None:
    with client.cell("files") as cell:
        big = os.urandom(3 * MIB)
        (tmp_path / "big").write_bytes(big)
        cell.put("in/big", tmp_path / "big")
        assert cell.exec(["sh", "-c", "cp in/big out && chmod 600 out && ln -s /etc/passwd link"]).ok
        assert cell.get("out") == big
        assert {entry.name: entry.kind for entry in cell.files()} == {"in": "directory", "out": "file", "link": "other"}
        cell.put("run.sh", b"#!/bin/sh\necho it runs\n", executable=True)
        assert cell.exec(["./run.sh"]).stdout == b"it runs\n"
        cell.put("link", b"in its place")
        assert cell.get("link") == b"in its place", "the link is replaced, not followed"
        assert cell.exec(["sh", "-c", "ln -s /etc dir; ln -s /etc/passwd again; mkfifo pipe"]).ok
        for path in ("again", "dir/passwd", "pipe", "nothing"):
            with pytest.raises(AetherError) as caught:
                cell.get(path)
            assert caught.value.code in ("OUTPUT_REFUSED", "NOT_FOUND"), path
        with pytest.raises(AetherError):
            cell.put("dir/passwd", b"x")
        shown = aether(layout, "cell", "get", "files", "link", "-o", str(tmp_path / "link"))
        assert shown.returncode == 0 and (tmp_path / "link").read_bytes() == b"in its place"
        assert aether(layout, "cell", "get", "files", "link", "-o", str(tmp_path / "link")).returncode == 120


def test_pause_resume_resize_and_stats(layout: Layout, client: Client) -> None:
    with client.cell("busy", limits=Limits(memory_bytes=64 * MIB, pids=64)) as cell:
        cell.start(["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > t; mv t n; done"], name="counter")
        until(lambda: cell.stats.executables == 1 and cell.get("n"))
        try:
            cell.pause()
        except AetherError as error:
            pytest.skip(error.message)
        still = cell.get("n")
        time.sleep(0.2)
        assert cell.get("n") == still
        with pytest.raises(AetherError) as caught:
            cell.exec(["true"])
        assert caught.value.code == "CELL_FROZEN"
        cell.resume()
        until(lambda: cell.get("n") not in (still, b""))
        first = cell.stats.usage
        assert (first.cpu_user_us or 0) + (first.cpu_system_us or 0) > 10_000
        client.cells.resize("busy", Limits(memory_bytes=96 * MIB, pids=32))
        assert cell.info.limits.memory_bytes == 96 * MIB
        watched = aether(layout, "cell", "stats", "busy")
        assert "of 96.0 MiB" in watched.stdout and "of 32" in watched.stdout


def test_an_idle_cell_goes_by_itself(client: Client) -> None:
    cell = client.cells.allocate("idle", idle_timeout_ms=500)
    view = until(lambda: (found := client.cells.show(cell.cell_id)).ended_at and found)
    assert (view.state, view.reason) == (CellState.FREED, "idle")
    assert [event.type for event in client.cells.events(cell.cell_id)][-1] == "cell.freed"


def test_cells_live_through_the_death_of_aetherd(layout: Layout, client: Client) -> None:
    cell = client.cells.allocate("lasting")
    job = client.cells.start("lasting", ["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done"], name="server")
    until(lambda: client.get(job.job_id).state is JobState.RUNNING)
    pid = instance.role_pid(layout, "aetherd")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: instance.role_pid(layout, "aetherd") not in (None, pid), 20)
    until(lambda: client.reachable(), 20)
    after = client.cells.show("lasting")
    assert (after.cell_id, after.state) == (cell.cell_id, CellState.RUNNING)
    assert [each.name for each in after.executables] == ["server"]
    assert client.cell("lasting").exec(["true"]).ok
    client.signal(job.job_id, signal.SIGTERM)
    assert client.wait(job.job_id, 10).exit_code == 7


def test_a_cell_killed_from_outside_is_lost_and_its_jobs_say_so(layout: Layout, client: Client) -> None:
    cell = client.cells.allocate("doomed")
    marker = f"6{os.getpid()}"
    job = client.cells.start("doomed", ["sleep", marker])
    pid = until(lambda: machine.mentioning(marker))[0]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert client.wait(job.job_id, 10).state is JobState.FAILED
    view = until(lambda: (found := client.cells.show(cell.cell_id)).ended_at and found)
    assert (view.state, view.reason) == (CellState.LOST, "cell-died")
    assert client.cells.allocate("doomed").cell_id != cell.cell_id, "its name is free again"


def test_isolation_is_not_given_up_without_permission(layout: Layout) -> None:
    for flag in ("--no-isolate-network", "--no-isolate-process"):
        refused = aether(layout, "cell", "allocate", "open", flag)
        assert refused.returncode == 121 and "isolation-stays" in refused.stderr, refused.stderr
        assert "cell.unisolate" in refused.stderr


@pytest.mark.parametrize(
    "name", ["", "../etc", "a/", "-a", "a b", "a_b", "x" * 64, "a//b", "é", "a\nb", "/".join("a" * 9)]
)
def test_hostile_names_are_refused(layout: Layout, name: str) -> None:
    refused = aether(layout, "cell", "allocate", "--", name)
    assert refused.returncode == 2 and "BAD_FIELD" in refused.stderr, refused.stderr


def test_receipts_of_guests_verify_offline(layout: Layout, client: Client, tmp_path: Path) -> None:
    with client.cell("proven") as cell:
        job = cell.exec(["echo", "evidence"]).job
        receipt = tmp_path / "receipt.json"
        receipt.write_bytes(client.receipt_bytes(job.job_id))
    verified = aether(layout, "verify", str(receipt), "--key", str(layout.audit_public_key))
    assert verified.returncode == 0, verified.stderr
    assert aether(layout, "audit", "verify").returncode == 0


class Terminal:
    """`aether` under a pseudo-terminal of the test's."""

    def __init__(self, layout: Layout, *words: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(AETHER, [str(AETHER), *words], environment(layout))
        self.seen = b""

    def says(self, wanted: bytes, timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while wanted not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    break
        assert wanted in self.seen, self.seen

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def ends(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_a_shell_on_a_terminal(layout: Layout, client: Client) -> None:
    import fcntl
    import struct
    import termios

    client.cells.allocate("shell")
    terminal = Terminal(layout, "cell", "exec", "-it", "shell", "--", "sh")
    terminal.type(b"echo $((40+2))\n")
    terminal.says(b"42")
    fcntl.ioctl(terminal.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 31, 97, 0, 0))
    os.kill(terminal.pid, signal.SIGWINCH)
    time.sleep(0.3)
    terminal.type(b"stty size; test -t 0 && echo is-a-tty\n")
    terminal.says(b"31 97")
    terminal.says(b"is-a-tty")
    terminal.type(b"sleep 1000\n")
    time.sleep(0.3)
    terminal.type(b"\x03")
    terminal.type(b"echo after-$((1+1))\n")
    terminal.says(b"after-2")
    terminal.type(b"exit 5\n")
    assert terminal.ends() == 5


def test_detaching_leaves_the_executable_and_its_terminal(layout: Layout, client: Client) -> None:
    client.cells.allocate("shell")
    job = client.cells.start("shell", ["sh", "-c", "echo first; read line; echo heard $line; exit 6"], stdio="tty")
    with client.attach(job.job_id) as connection:
        assert b"first" in connection.recv(4096)
        with pytest.raises(AetherError) as caught:
            client.attach(job.job_id)
        assert caught.value.code == "NOT_READY"
    until(lambda: client.get(job.job_id).state is JobState.RUNNING)

    def attached() -> Any:
        try:
            return client.attach(job.job_id)
        except AetherError:
            return None

    with until(attached) as connection:
        connection.sendall(b"hello\n")
        seen = b""
        while data := connection.recv(4096):
            seen += data
    assert b"heard hello" in seen
    assert client.wait(job.job_id, 10).exit_code == 6


def test_cells_lie_in_one_another(layout: Layout, client: Client) -> None:
    outer = client.cells.allocate("outer", limits=Limits(memory_bytes=128 * MIB))
    with pytest.raises(AetherError) as caught:
        client.cells.allocate("outer/inner", limits=Limits(memory_bytes=256 * MIB))
    assert caught.value.code == "BAD_FIELD" and "outer around it" in caught.value.message
    inner = client.cells.allocate("outer/inner", limits=Limits(memory_bytes=64 * MIB))
    assert inner.parent == "outer"
    shown = aether(layout, "cell", "list", "outer")
    assert [row.split("\t")[0] for row in shown.stdout.splitlines()] == ["NAME", "outer", "outer/inner"]
    for name in ("outer", "outer/inner"):
        assert aether(layout, "cell", "exec", name, "--", "true").returncode == 0
    job = client.cells.start("outer/inner", ["sleep", "1000"])
    until(lambda: client.get(job.job_id).state is JobState.RUNNING)
    try:
        client.cells.freeze("outer")
    except AetherError as error:
        pytest.skip(error.message)
    refused = aether(layout, "cell", "exec", "outer/inner", "--", "true")
    assert refused.returncode == 120 and "outer is frozen" in refused.stderr
    client.cells.thaw("outer")
    client.cells.free("outer", grace_ms=0)
    assert client.wait(job.job_id, 10).state is JobState.CANCELLED
    states = {client.cells.show(cell.cell_id).state for cell in (outer, inner)}
    assert states == {CellState.FREED} and client.cells.list() == ()


def test_the_output_of_the_shortest_commands_is_followed_to_its_end(client: Client) -> None:
    """Also while the outcome is on its way to the disk and the row does not know the executable yet."""
    with client.cell("short"):
        for _ in range(40):
            job = client.cells.start("short", ["echo", "all of it"])
            assert b"".join(client.logs(job.job_id, stream="stdout", follow=True)) == b"all of it\n"
