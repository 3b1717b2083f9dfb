"""The keeper: takes the output of executables out of their pipes and keeps it, never as root.

Protocol with the spawner, one JSON object per SOCK_SEQPACKET message:
    -> {"op": "watch", "cell", "exec", "streams": [0, 1], "rate", "burst", "head", "tail"}
       with one pipe's read end per stream; a repeated watch of the same executable is ignored. Without streams it is
       over and was silent: an empty log, and no answer
    -> {"op": "flush", "exec"}     take what lies in the pipes now, whatever the rate, then answer
    <- {"ev": "ended", "exec", "output": {stream: {bytes, dropped}}}    every writer is gone
    <- {"ev": "flushed", "exec", "output"}

Bounds: two token buckets per executable, bytes and chunks. A stream whose bucket is empty is not read, so a
flooding job blocks on its own pipe and costs nobody else; tiny writes gather in the pipe meanwhile. Each ready
pipe gets one read per round. A flush reads at most the pipe's capacity per stream: all that was written before.
When the spawner is gone its cells die with it: the keeper takes the rest and ends.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from aether.spawner.joblog import JobLog
from aether.spawner.linux import idspace, kernel

READ_BYTES = 64 * 1024
CHUNKS_PER_S = 2_000
CHUNKS_BURST = 4_000
MESSAGE_BYTES_MAX = 4096
FDS_MAX = 8
ORPHAN_S = 5.0
"""How long pipes may stay open after the spawner died."""
_F_GETPIPE_SZ = 1032
_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


@dataclass(slots=True)
class Bucket:
    """Tokens per second up to `burst`; may go below zero by one chunk, which then has to be waited for."""

    rate: float
    burst: float
    level: float
    at_s: float

    def take(self, amount: float, now_s: float) -> None:
        self.level = min(self.burst, self.level + (now_s - self.at_s) * self.rate) - amount
        self.at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until there is a token; 0 when there is one."""
        level = self.level + (now_s - self.at_s) * self.rate
        return 0.0 if level > 0 else (1.0 - level) / self.rate


@dataclass(slots=True)
class Watched:
    """One executable's open pipes: `fds` maps a descriptor to its stream number."""

    exec_id: str
    log: JobLog
    bytes: Bucket
    chunks: Bucket
    fds: dict[int, int] = field(default_factory=dict)
    resume_s: float | None = None


class Keeper:
    """The loop's state. `directory` is a descriptor of `logs/jobs`."""

    def __init__(self, link: socket.socket, directory: int) -> None:
        self._link = link
        self._directory = directory
        self._epoll = select.epoll()
        self._epoll.register(link.fileno(), select.EPOLLIN)
        self._watched: dict[str, Watched] = {}
        self._of_fd: dict[int, Watched] = {}
        self._orphan_until_s: float | None = None

    def run(self) -> None:
        """Until the spawner is gone and the pipes are empty."""
        while self._orphan_until_s is None or (self._of_fd and time.monotonic() < self._orphan_until_s):
            for fd, _ in self._epoll.poll(self._timeout_s()):
                if fd == self._link.fileno():
                    self._receive()
                elif fd in self._of_fd:
                    self._read(self._of_fd[fd], fd)
            self._resume()
        for watched in list(self._watched.values()):
            for fd in list(watched.fds):
                self._end(watched, fd)

    def _timeout_s(self) -> float:
        """Seconds to sleep at most; -1 is for ever."""
        now_s = time.monotonic()
        waits = [w.resume_s - now_s for w in self._watched.values() if w.resume_s is not None]
        if self._orphan_until_s is not None:
            waits.append(self._orphan_until_s - now_s)
        return max(0.0, min(waits)) if waits else -1.0

    def _receive(self) -> None:
        try:
            data, fds = receive(self._link)
        except OSError:
            data, fds = b"", []
        if not data:
            self._epoll.unregister(self._link.fileno())
            self._orphan_until_s = time.monotonic() + ORPHAN_S
            return
        message = json.loads(data)
        if message["op"] == "watch":
            self._watch(message, fds)
        elif message["op"] == "flush":
            self._flush(message["exec"])

    def _watch(self, message: dict[str, Any], fds: list[int]) -> None:
        exec_id = message["exec"]
        if exec_id in self._watched or len(fds) != len(message["streams"]):
            for fd in fds:
                os.close(fd)
            return
        now_s = time.monotonic()
        log = self._open_log(message)
        watched = Watched(
            exec_id,
            log,
            Bucket(message["rate"], message["burst"], message["burst"], now_s),
            Bucket(CHUNKS_PER_S, CHUNKS_BURST, CHUNKS_BURST, now_s),
        )
        if not fds:
            log.close()
            return
        self._watched[exec_id] = watched
        for fd, stream in zip(fds, message["streams"], strict=True):
            os.set_blocking(fd, False)
            watched.fds[fd] = stream
            self._of_fd[fd] = watched
            self._epoll.register(fd, select.EPOLLIN)

    def _open_log(self, message: dict[str, Any]) -> JobLog:
        with contextlib.suppress(FileExistsError):
            os.mkdir(message["cell"], 0o750, dir_fd=self._directory)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = os.open(message["cell"], flags, dir_fd=self._directory)
        try:
            return JobLog(
                directory,
                message["exec"],
                streams=message["streams"],
                head=message["head"],
                tail=message["tail"],
                wall_us=time.time_ns() // 1000,
            )
        finally:
            os.close(directory)

    def _read(self, watched: Watched, fd: int) -> int:
        """One chunk of a ready pipe; the bytes taken."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self._end(watched, fd)
            return 0
        now_ns = time.monotonic_ns()
        watched.log.append(watched.fds[fd], data, now_ns // 1000, time.time_ns() // 1000)
        now_s = now_ns / 1e9
        watched.bytes.take(len(data), now_s)
        watched.chunks.take(1, now_s)
        wait_s = max(watched.bytes.wait_s(now_s), watched.chunks.wait_s(now_s))
        if wait_s > 0 and watched.resume_s is None:
            watched.resume_s = now_s + wait_s
            for paused in watched.fds:  # EPOLLHUP is reported even with an empty mask, so take it out
                self._epoll.unregister(paused)
        return len(data)

    def _resume(self) -> None:
        now_s = time.monotonic()
        for watched in self._watched.values():
            if watched.resume_s is not None and watched.resume_s <= now_s:
                watched.resume_s = None
                for fd in watched.fds:
                    self._epoll.register(fd, select.EPOLLIN)

    def _end(self, watched: Watched, fd: int) -> None:
        stream = watched.fds.pop(fd)
        del self._of_fd[fd]
        if watched.resume_s is None:
            self._epoll.unregister(fd)
        os.close(fd)
        watched.log.end(stream)
        if not watched.fds:
            del self._watched[watched.exec_id]
            output = watched.log.totals()
            watched.log.close()
            self._send({"ev": "ended", "exec": watched.exec_id, "output": output})

    def _flush(self, exec_id: str) -> None:
        watched = self._watched.get(exec_id)
        if watched is None:
            return
        for fd in list(watched.fds):
            room = fcntl.fcntl(fd, _F_GETPIPE_SZ)
            while room > 0 and fd in watched.fds:
                taken = self._read(watched, fd)
                if taken == 0:
                    break
                room -= taken
        if exec_id in self._watched:
            self._send({"ev": "flushed", "exec": exec_id, "output": watched.log.totals()})

    def _send(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the spawner is gone: there is nobody to tell
            self._link.send(json.dumps(event).encode())


def receive(link: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, close-on-exec; an empty message is the peer's end.

    socket.recv_fds ignores its flags in Python 3.11 and would hand out inheritable descriptors.
    Raises OSError EPROTO when the kernel had to drop something.
    """
    fds = array.array("i")
    space = socket.CMSG_SPACE(FDS_MAX * fds.itemsize)
    data, ancillary, flags, _ = link.recvmsg(MESSAGE_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        for fd in fds:
            os.close(fd)
        raise OSError(71, "a message or its descriptors were truncated")
    return data, list(fds)


def drop_privileges(uid: int, gid: int) -> None:
    """Become `uid`/`gid` for good when root, and hold no capability; in any case gain nothing by exec and be no one's
    to trace. The root of a user namespace of lent ids is the user that it is outside and stays so."""
    if os.geteuid() == 0:
        if idspace.here().kind == "root":
            if uid <= 0 or gid <= 0:
                raise PermissionError("cannot keep logs as root: give --uid and --gid")
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        kernel.set_capabilities(0)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aether-keeper")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--uid", type=int, default=-1)
    parser.add_argument("--gid", type=int, default=-1)
    options = parser.parse_args(argv)
    link = socket.socket(fileno=options.socket_fd)
    os.set_inheritable(options.socket_fd, False)
    directory = os.open(options.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.umask(0o027)
    drop_privileges(options.uid, options.gid)
    for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when its spawner has ended
        signal.signal(signo, signal.SIG_IGN)
    Keeper(link, directory).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
