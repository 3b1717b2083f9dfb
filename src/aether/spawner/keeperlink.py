"""The spawner's side of the keeper: start it, hand it pipes, restart it when it dies.

The spawner keeps a duplicate of every pipe's read end until its writers are gone, so a dead keeper costs no byte
that was still in a pipe: the next one gets the same pipes and continues the files. Restarts wait RESTART_S, so
that a keeper that cannot start does not take the machine with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aether.spawner.channel import ChannelClosedError, Outbox, receive
from aether.spawner.loop import WRITE, Loop

RESTART_S = 0.2
EndHandler = Callable[[str, dict[str, Any], bool], None]
"""Called with the executable, `{stream: {bytes, dropped}}` and whether every writer is gone."""


@dataclass(frozen=True, slots=True)
class KeeperOptions:
    """Where logs go and as whom; `uid` and `gid` are -1 when the spawner is not root."""

    directory: str
    uid: int = -1
    gid: int = -1


class KeeperLink:
    """One running keeper and what it watches."""

    def __init__(self, loop: Loop, options: KeeperOptions, on_output: EndHandler) -> None:
        self._loop = loop
        self._options = options
        self._on_output = on_output
        self._watched: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
        self._pid = self._pidfd = -1
        self._sock: socket.socket | None = None
        self._outbox: Outbox | None = None
        self._closing = False
        self._start()

    @property
    def pid(self) -> int:
        return self._pid

    def _start(self) -> None:
        if self._closing:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        options = self._options
        # The module path of this process, and nothing that an environment could add to it.
        code = f"import sys; sys.path[:] = {sys.path!r}; from aether.spawner.keeper import main; sys.exit(main())"
        command = [sys.executable, "-I", "-c", code, "--socket-fd", "3", "--directory", options.directory]
        command += ["--uid", str(options.uid), "--gid", str(options.gid)]
        actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)]
        self._pid = os.posix_spawn(
            command[0],
            command,
            {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            file_actions=actions,
            setsigmask=[],
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD],
        )
        theirs.close()
        self._pidfd = os.pidfd_open(self._pid)
        self._sock, self._outbox = ours, Outbox(self._loop, ours)
        self._loop.add(ours.fileno(), self._on_socket)
        self._loop.add(self._pidfd, self._on_exit)
        for message, fds in list(self._watched.values()):
            self._put(message, tuple(os.dup(fd) for fd in fds))

    def watch(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Keep the output of `message["exec"]`; takes over `fds`, one read end per stream."""
        exec_id = message["exec"]
        self._watched[exec_id] = (message, fds)
        self._put(message, tuple(os.dup(fd) for fd in fds))

    def flush(self, exec_id: str) -> None:
        """Ask for what is in the pipes now; answered through the handler."""
        if exec_id in self._watched:
            self._put({"op": "flush", "exec": exec_id}, ())

    def forget(self, exec_id: str) -> None:
        """Its writers are gone: nothing is left to hand to a next keeper."""
        _, fds = self._watched.pop(exec_id, ({}, ()))
        for fd in fds:
            os.close(fd)

    def _put(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        if self._outbox is None:  # between two keepers: the next one is told all
            for fd in fds:
                os.close(fd)
            return
        try:
            self._outbox.put(json.dumps(message).encode(), fds)
        except ChannelClosedError:
            self._drop_socket()

    def _on_socket(self, events: int) -> None:
        try:
            if events & WRITE and self._outbox is not None:
                self._outbox.flush()
            while self._sock is not None:
                message = receive(self._sock)
                if message is None:
                    return
                message.close()
                event = json.loads(message.data)
                ended = event["ev"] == "ended"
                if ended:
                    self.forget(event["exec"])
                self._on_output(event["exec"], event["output"], ended)
        except ChannelClosedError:
            self._drop_socket()

    def _drop_socket(self) -> None:
        if self._sock is not None and self._outbox is not None:
            self._loop.remove(self._sock.fileno())
            self._outbox.close()
            self._sock.close()
        self._sock = self._outbox = None

    def _on_exit(self, _: int) -> None:
        self._loop.remove(self._pidfd)
        os.close(self._pidfd)
        os.waitpid(self._pid, 0)
        self._pid = self._pidfd = -1
        self._drop_socket()
        self._loop.after(RESTART_S, self._start)

    def close(self, wait_s: float = 1.0) -> None:
        """Let it take the rest and end; it is killed when it does not within `wait_s`."""
        self._closing = True
        if self._pid < 0:
            return
        self._loop.remove(self._pidfd)
        for exec_id in list(self._watched):
            self.forget(exec_id)
        self._drop_socket()
        deadline = self._loop.clock_s() + wait_s
        ended = []
        self._loop.add(self._pidfd, lambda _: ended.append(True))
        while not ended and self._loop.clock_s() < deadline:
            self._loop.turn(max(0.0, deadline - self._loop.clock_s()))
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._loop.remove(self._pidfd)
        os.close(self._pidfd)
        os.waitpid(self._pid, 0)
        self._pid = self._pidfd = -1
