"""A helper of the spawner: a child that runs one module of ours as an ordinary user, started again when it dies.

Messages are JSON objects over one SOCK_SEQPACKET pair, with descriptors. A restart waits RESTART_S, so that a helper
that cannot start does not take the machine with it; its owner is told of every start and says again what counts. One
that breaks the protocol is killed.
A helper ends by itself once the spawner is gone and what it has taken on is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aether.spawner.channel import ChannelClosedError, Message, Outbox, receive
from aether.spawner.loop import WRITE, Loop

RESTART_S = 0.2


@dataclass(frozen=True, slots=True)
class HelperOptions:
    """Where a helper writes and as whom; `uid` and `gid` are -1 when the spawner is not root."""

    directory: str
    uid: int = -1
    gid: int = -1


class Helper:
    """One running child. `on_start()` after each start; `on_message(value, fds)`, which owns the descriptors."""

    def __init__(
        self,
        loop: Loop,
        module: str,
        options: HelperOptions,
        on_start: Callable[[], None],
        on_message: Callable[[dict[str, Any], tuple[int, ...]], None],
    ) -> None:
        self._loop = loop
        self._module = module
        self._options = options
        self._on_start = on_start
        self._on_message = on_message
        self._pid = self._pidfd = -1
        self._sock: socket.socket | None = None
        self._outbox: Outbox | None = None
        self._closing = False

    @property
    def pid(self) -> int:
        return self._pid

    def start(self) -> None:
        if self._closing:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        options = self._options
        # The module path of this process, and nothing that an environment could add to it.
        code = f"import sys; sys.path[:] = {sys.path!r}; from {self._module} import main; sys.exit(main())"
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
        self._on_start()

    def put(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send, or drop between two helpers: the next one is told by `on_start`. Takes over the descriptors."""
        if self._outbox is None:
            for fd in fds:
                os.close(fd)
            return
        try:
            self._outbox.put(json.dumps(message).encode(), tuple(fds))
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
                self._hear(message)
        except ChannelClosedError:
            self._drop_socket()

    def _hear(self, message: Message) -> None:
        """A helper reads bytes of cells and could be taken over: what it says wrongly ends it and nothing else."""
        try:
            self._on_message(self._read(message), message.fds)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            raise ChannelClosedError("a helper broke the protocol") from None

    def _read(self, message: Message) -> Any:
        try:
            return json.loads(message.data)
        except (ValueError, RecursionError):
            message.close()
            raise

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
        self._loop.after(RESTART_S, self.start)

    def close(self, wait_s: float = 1.0) -> None:
        """Let it take the rest and end; it is killed when it does not within `wait_s`."""
        self._closing = True
        if self._pid < 0:
            return
        self._loop.remove(self._pidfd)
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
