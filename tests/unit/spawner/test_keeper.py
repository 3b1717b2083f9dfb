"""The keeper as a process: what it keeps, how it bounds a flood, what survives its death."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.substrate.cells.logs import ExecLog

MIB = 1 << 20


class Keeper:
    """A keeper process and the spawner's end of its socket."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link = ours
        self.link.settimeout(20)
        command = [sys.executable, "-m", "aether.spawner.keeper", "--socket-fd", str(theirs.fileno())]
        command += ["--directory", str(directory)]
        if os.geteuid() == 0:
            os.chown(directory, 65534, 65534)
            command += ["--uid", "65534", "--gid", "65534"]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.link.sendmsg([json.dumps(message).encode()], rights)

    def watch(self, exec_id: str, fds: list[int], **options: int) -> None:
        bounds = {"rate": 100 * MIB, "burst": 100 * MIB, "head": MIB, "tail": 4 * MIB} | options
        streams = list(range(len(fds)))
        self.send({"op": "watch", "cell": "c", "exec": exec_id, "streams": streams, **bounds}, fds)

    def event(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.link.recv(4096))
        return value

    def log(self, exec_id: str) -> ExecLog:
        return ExecLog(self.directory / "c", exec_id)

    def close(self) -> None:
        self.link.close()
        self.process.wait(10)


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Keeper]:
    directory = tmp_path / "jobs"
    directory.mkdir()
    running = Keeper(directory)
    yield running
    running.close()


def pipes(count: int) -> tuple[list[int], list[int]]:
    pairs = [os.pipe() for _ in range(count)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_keeps_both_streams_in_arrival_order(keeper: Keeper) -> None:
    reads, writes = pipes(2)
    keeper.watch("e", reads)
    close(reads)
    for number in range(10):
        os.write(writes[number % 2], b"%d\n" % number)
        keeper.send({"op": "flush", "exec": "e"})
        assert keeper.event()["ev"] == "flushed"
    close(writes)
    assert keeper.event() == {
        "ev": "ended",
        "exec": "e",
        "output": {"stdout": {"bytes": 10, "dropped": 0}, "stderr": {"bytes": 10, "dropped": 0}},
    }
    log = keeper.log("e")
    page = log.read("all", 0)
    assert page.data == b"".join(b"%d\n" % number for number in range(10))
    assert page.ended and page.cursor == 20
    assert [chunk.stream for chunk in page.chunks] == ["stdout", "stderr"] * 5
    times = [chunk.wall_us or 0 for chunk in page.chunks]
    assert times == sorted(times) and abs(times[0] / 1e6 - time.time()) < 60
    assert log.read("stderr", 0).data == b"1\n3\n5\n7\n9\n"
    assert log.read("stderr", 4, 3).data == b"5\n7"
    assert log.read("all", 5, 4).data == b"\n3\n4"
    mode = (keeper.directory / "c" / "e.stdout").stat().st_mode
    assert mode & 0o777 == 0o640


def test_flush_answers_with_everything_written_before(keeper: Keeper) -> None:
    reads, writes = pipes(1)
    keeper.watch("e", reads, rate=1, burst=4096)
    close(reads)
    os.write(writes[0], b"x" * 60_000)
    keeper.send({"op": "flush", "exec": "e"})
    assert keeper.event()["output"]["stdout"]["bytes"] == 60_000
    close(writes)


def test_flood_is_bounded_and_harms_nobody(keeper: Keeper) -> None:
    """64 MiB at 40 MiB/s through a pipe whose job may keep 1 + 2 MiB: the rate holds, disk use is bounded, the
    middle is dropped and counted, and a neighbour's line passes at once meanwhile."""
    flood_reads, flood_writes = pipes(1)
    quiet_reads, quiet_writes = pipes(1)
    keeper.watch("flood", flood_reads, rate=40 * MIB, burst=MIB, head=MIB, tail=2 * MIB)
    keeper.watch("quiet", quiet_reads)
    close(flood_reads + quiet_reads)
    total = 64 * MIB

    def write() -> None:
        line = (b"0123456789abcdef" * 4096)[: 64 * 1024]
        for _ in range(total // len(line)):
            os.write(flood_writes[0], line)
        os.close(flood_writes[0])

    began = time.monotonic()
    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.2)
    os.write(quiet_writes[0], b"still here\n")
    close(quiet_writes)
    first = keeper.event()
    assert first["exec"] == "quiet" and time.monotonic() - began < 1.0
    ended = keeper.event()
    writer.join()
    took_s = time.monotonic() - began
    assert took_s >= (total - MIB) / (40 * MIB) * 0.9
    output = ended["output"]["stdout"]
    assert output["bytes"] == total
    kept = total - output["dropped"]
    assert 3 * MIB <= kept <= 3 * MIB + 512 * 1024
    data = keeper.directory / "c" / "flood.stdout"
    assert data.stat().st_size == total
    assert data.stat().st_blocks * 512 <= kept + 64 * 1024
    log = keeper.log("flood")
    cursor, seen, dropped = 0, b"", 0
    while True:
        page = log.read("all", cursor)
        seen += page.data
        dropped += page.dropped_bytes
        cursor = page.cursor
        if page.ended:
            break
    assert b"\0" not in seen
    assert len(seen) == kept and dropped == output["dropped"] and cursor == total


def test_tiny_writes_gather_in_the_pipe(keeper: Keeper) -> None:
    """The index grows with chunks, so chunks per second are bounded too."""
    reads, writes = pipes(1)
    keeper.watch("e", reads)
    close(reads)
    end_s = time.monotonic() + 1.0
    while time.monotonic() < end_s:
        for _ in range(100):
            os.write(writes[0], b".")
    close(writes)
    event = keeper.event()
    records = ((keeper.directory / "c" / "e.index").stat().st_size - 128) / 40
    assert event["output"]["stdout"]["bytes"] >= 10_000
    assert records <= 4_000 + 2_000 * 3


def test_next_keeper_continues(keeper: Keeper, tmp_path: Path) -> None:
    reads, writes = pipes(1)
    keeper.watch("e", reads)
    os.write(writes[0], b"before ")
    keeper.send({"op": "flush", "exec": "e"})
    keeper.event()
    keeper.process.send_signal(signal.SIGKILL)
    keeper.process.wait()
    os.write(writes[0], b"between ")
    keeper.link.close()
    second = Keeper(keeper.directory)
    second.watch("e", reads)
    close(reads)
    os.write(writes[0], b"after")
    close(writes)
    assert second.event()["output"]["stdout"] == {"bytes": 20, "dropped": 0}
    page = second.log("e").read("all", 0)
    assert page.data == b"before between after" and page.ended
    second.close()


def test_ends_with_the_spawner_and_keeps_the_rest(keeper: Keeper) -> None:
    reads, writes = pipes(1)
    keeper.watch("e", reads)
    close(reads)
    os.write(writes[0], b"last words")
    keeper.link.close()
    close(writes)
    assert keeper.process.wait(10) == 0
    page = keeper.log("e").read("stdout", 0)
    assert page.data == b"last words" and page.ended


def test_runs_as_nobody(keeper: Keeper) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: only then is there something to give up")
    reads, writes = pipes(1)
    keeper.watch("e", reads)
    close(reads + writes)
    keeper.event()
    status = Path(f"/proc/{keeper.process.pid}/status").read_text()
    assert "Uid:\t65534\t65534\t65534\t65534" in status
    assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
