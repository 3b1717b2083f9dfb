"""The observer: takes events of cells out of the kernel's ring buffer and writes them down, never as root.

Protocol with the spawner, one JSON object per SOCK_SEQPACKET message:
    -> {"op": "setup"}                       first, to a new one: load the programs, then become ordinary
    -> {"op": "ring"} with the ring          first, to a successor: the programs are there
    <- {"ev": "ready", "reason", "remedy", "tracepoints"} with watched map, ring and one program per tracepoint;
       none of them, and the reason, where the kernel does not let us
    -> {"op": "note", "cell", "event": {...}}         an event that the spawner saw itself
    -> {"op": "end", "cell", "dropped"}               the cell is over
    -> {"op": "traced", "cell", "duration_ms"} with the trace's area;   <- {"ev": "traced", "cell"}

All that needs privilege happens before the first event is read. A wake-up is followed by BATCH_S of sleep, so that a
burst costs one: the kernel wakes nobody while unread events lie in the ring. It gives way to the work it observes:
nice, and SCHED_BATCH, whose wake-ups preempt nobody (sched(7)). What a fork bomb can do: fill its own bucket in the
kernel, and its own file to its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import select
import signal
import socket
import time
from typing import Any, Final

from aether.contract.limits import CELLS_LIVE_MAX
from aether.spawner.eventlog import TRACE, EventLogs, event_line, line, trace_document
from aether.spawner.keeper import drop_privileges, receive
from aether.spawner.linux import kernel
from aether.spawner.linux.bpf import calls, layout, programs
from aether.spawner.linux.bpf.btf import Btf, BtfError
from aether.spawner.linux.bpf.permission import explain
from aether.spawner.linux.bpf.ring import Ring

RING_BYTES: Final = 2 << 20
BATCH_S: Final = 0.03
BATCH_RECORDS_MAX: Final = 4096
DRAIN_BATCHES_MAX: Final = 8
NICE: Final = 10


class Observer:
    """The loop's state. `directory` is a descriptor of `logs/jobs`, `ring` one of the ring buffer, or None."""

    def __init__(self, link: socket.socket, directory: int, ring: int | None) -> None:
        self._link = link
        self._logs = EventLogs(directory)
        self._ring = Ring(ring, RING_BYTES) if ring is not None else None
        self._dropped: dict[str, int] = {}
        self._epoll = select.epoll()
        self._epoll.register(link.fileno(), select.EPOLLIN)
        if ring is not None:
            self._epoll.register(ring, select.EPOLLIN)

    def run(self) -> None:
        """Until the spawner is gone."""
        while True:
            ready = {fd for fd, _ in self._epoll.poll()}
            if ready != {self._link.fileno()}:
                time.sleep(BATCH_S)
            self.drain()
            if self._link.fileno() in ready and not self._receive():
                return

    def drain(self) -> None:
        """Write down what lies in the ring now, one write per cell and batch."""
        for _ in range(DRAIN_BATCHES_MAX if self._ring is not None else 0):
            if not self._batch():
                return

    def _batch(self) -> bool:
        assert self._ring is not None
        epoch_us = (time.time_ns() - time.monotonic_ns()) // 1000
        lines: dict[str, list[bytes]] = {}
        for record in self._ring.take(BATCH_RECORDS_MAX):
            event = layout.read_event(record)
            kept = lines.setdefault(event.name, [])
            if event.dropped > self._dropped.get(event.name, 0):
                self._dropped[event.name] = event.dropped
                kept.append(line(time_us=epoch_us + event.time_ns // 1000, kind="dropped", count=event.dropped))
            kept.append(event_line(event, epoch_us))
        for cell, texts in lines.items():
            self._logs.append(cell, b"".join(texts))
        return bool(lines)

    def _receive(self) -> bool:
        """All messages that have come; False when the spawner is gone."""
        while True:
            try:
                data, fds = receive(self._link)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._perform(json.loads(data), fds)
            for fd in fds:
                os.close(fd)

    def _perform(self, message: dict[str, Any], fds: list[int]) -> None:
        match message["op"]:
            case "note":
                self._logs.append(message["cell"], line(**message["event"]))
            case "end":
                self._end(message["cell"], message["dropped"])
            case "traced":
                self._traced(message, fds)

    def _end(self, cell: str, dropped: int) -> None:
        self._dropped.pop(cell, None)
        self._logs.append(cell, line(time_us=time.time_ns() // 1000, kind="ended", count=dropped))

    def _traced(self, message: dict[str, Any], fds: list[int]) -> None:
        with mmap.mmap(fds[0], layout.TRACE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as area:
            trace = layout.read_trace(area[: layout.TRACE_BYTES])
        epoch_us = (time.time_ns() - time.monotonic_ns()) // 1000
        with contextlib.suppress(OSError):  # a full disk: the reader finds no trace
            document = trace_document(trace, kernel.ARCH, message["duration_ms"], epoch_us)
            self._logs.replace(message["cell"], TRACE, document)
        self._link.send(json.dumps({"ev": "traced", "cell": message["cell"]}).encode())


def set_up() -> tuple[dict[str, Any], list[int]]:
    """Make the maps, load the programs: the `ready` message and its descriptors (watched, ring, programs)."""
    made: list[int] = []
    try:
        made.append(calls.create_map(calls.HASH, 8, layout.WATCHED.size, 2 * CELLS_LIVE_MAX, "aether_watched"))
        made.append(calls.create_map(calls.RING_BUFFER, 0, 0, RING_BYTES, "aether_events"))
        codes = programs.observing(programs.read_fields(Btf.running()), made[0], made[1])
        made += [calls.load(code, f"aether_{name}") for name, code in codes.items()]
    except (OSError, BtfError) as error:
        for fd in made:
            os.close(fd)
        reason, remedy = explain(error)
        return {"ev": "ready", "reason": reason, "remedy": remedy, "tracepoints": []}, []
    return {"ev": "ready", "reason": "", "remedy": "", "tracepoints": list(codes)}, made


def begin(link: socket.socket) -> int | None:
    """The first message; the ring's descriptor when there is one. Raises OSError when the spawner is gone."""
    data, fds = receive(link)
    if not data:
        raise OSError("the spawner is gone")
    if json.loads(data)["op"] == "ring":
        return fds[0]
    ready, made = set_up()
    socket.send_fds(link, [json.dumps(ready).encode()], made)
    for fd in (*made[:1], *made[2:]):
        os.close(fd)
    return made[1] if made else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aether-observer")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--uid", type=int, default=-1)
    parser.add_argument("--gid", type=int, default=-1)
    options = parser.parse_args(argv)
    link = socket.socket(fileno=options.socket_fd)
    os.set_inheritable(options.socket_fd, False)
    directory = os.open(options.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.umask(0o027)
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when its spawner has ended
        signal.signal(signo, signal.SIG_IGN)
    ring = begin(link)
    drop_privileges(options.uid, options.gid)
    os.nice(NICE)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    link.setblocking(False)
    Observer(link, directory, ring).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
