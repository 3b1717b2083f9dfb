"""The authority's connection to the spawner: one-message JSON calls over SOCK_SEQPACKET, in asyncio.

A call answers with the reply and its descriptors, which are the caller's to close, or raises AetherError: the
spawner's own refusal, or UNAVAILABLE when the connection is lost. Nothing is retried here: the verbs that change
something are idempotent, so `Connector` reconnects and its user decides.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import json
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from aether.contract.errors import KINDS, AetherError
from aether.contract.limits import LINK_CALLS_IN_FLIGHT_MAX, PROTOCOL_VERSION, SPAWNER_MESSAGE_BYTES_MAX

FDS_MAX: Final = 250
CALL_TIMEOUT_S: Final = 120.0
"""Longer than any operation of the spawner; a spawner that hangs longer is restarted by its supervisor."""
RECONNECT_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_encode: Final = msgspec.json.encode
_SPACE: Final = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call answered: the fields of `ok`, and descriptors owned by the caller."""

    value: dict[str, Any]
    fds: tuple[int, ...]

    def json(self) -> Any:
        """The JSON document behind the first descriptor; closes all."""
        try:
            with open(self.fds[0], "rb", closefd=False) as file:
                return json.load(file)
        finally:
            self.close()

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class SpawnerLink:
    """One connection. `on_event(name, fields)` is called for each event; `on_close()` once at the end."""

    def __init__(
        self, sock: socket.socket, on_event: Callable[[str, dict[str, Any]], None], on_close: Callable[[], None]
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_event = on_event
        self._on_close = on_close
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._backlog: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)
        self.closed = False

    async def call(self, op: str, args: dict[str, Any], fds: Sequence[int] = (), key: str = "") -> Reply:
        """Perform `op`; `fds` are duplicated for the way and stay the caller's."""
        if self.closed:
            raise _lost(op)
        if len(self._calls) >= LINK_CALLS_IN_FLIGHT_MAX:
            raise AetherError("BUSY", f"cannot call {op}: too many calls to the spawner are under way")
        call_id = next(self._ids)
        request = {"id": call_id, "op": op, "key": key, "args": args}
        data = _encode(request)
        if len(data) > SPAWNER_MESSAGE_BYTES_MAX:
            raise AetherError("TOO_LARGE", f"cannot call {op}: the message has {len(data)} bytes")
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._calls[call_id] = future
        try:
            self._send(data, tuple(os.dup(fd) for fd in fds))
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await future
        except TimeoutError as error:
            raise AetherError("UNAVAILABLE", f"cannot call {op}: the spawner does not answer") from error
        finally:
            self._calls.pop(call_id, None)

    def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        self._backlog.append((data, fds))
        if len(self._backlog) == 1:
            self._flush()
            if self._backlog:
                self._loop.add_writer(self._sock.fileno(), self._flush)

    def _flush(self) -> None:
        while self._backlog:
            data, fds = self._backlog[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.close()
                return
            self._backlog.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(64):  # then other handlers have their turn
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    SPAWNER_MESSAGE_BYTES_MAX, _SPACE, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data, ancillary, flags = b"", [], 0
            fds = array.array("i")
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
            if not data or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                Reply({}, tuple(fds)).close()
                self.close()
                return
            self._receive(data, tuple(fds))

    def _receive(self, data: bytes, fds: tuple[int, ...]) -> None:
        message = msgspec.json.decode(data)
        if "ev" in message:
            name = message.pop("ev")
            self._on_event(name, message)
            return
        future = self._calls.get(message["id"])
        if future is None or future.done():
            Reply({}, fds).close()
        elif "ok" in message:
            future.set_result(Reply(message["ok"], fds))
        else:
            error = message["error"]
            code = error["code"] if error["code"] in KINDS else "INTERNAL"
            future.set_exception(AetherError(code, error["message"], error["remedy"]))

    def close(self) -> None:
        """Calls under way fail with UNAVAILABLE."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _, fds in self._backlog:
            for fd in fds:
                os.close(fd)
        self._backlog.clear()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_lost("the spawner"))
        self._on_close()


def _lost(what: str) -> AetherError:
    return AetherError("UNAVAILABLE", f"cannot call {what}: there is no connection to the spawner", retry_after_s=1)


class Connector:
    """Keeps a connection to `path`: connects, says hello, hands facts to `on_connect`, and again when it is lost."""

    def __init__(
        self,
        path: Path,
        on_connect: Callable[[SpawnerLink, dict[str, Any]], Awaitable[None]],
        on_event: Callable[[str, dict[str, Any]], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._path = path
        self._on_connect = on_connect
        self._on_event = on_event
        self._on_lost = on_lost
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.link: SpawnerLink | None = None
        self.reason = "not connected yet"

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        tries = 0
        while True:
            try:
                await self._connect()
                tries = 0
                await self._lost.wait()
            except (OSError, AetherError) as error:
                self.reason = str(error)
            await asyncio.sleep(RECONNECT_S[min(tries, len(RECONNECT_S) - 1)])
            tries += 1

    async def _connect(self) -> None:
        self._lost.clear()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.connect(str(self._path))  # a Unix socket connects at once or not at all
        except OSError:
            sock.close()
            raise
        link = SpawnerLink(sock, self._on_event, self._closed)
        try:
            facts = await link.call("hello", {"protocol_version": PROTOCOL_VERSION, "events": True})
            await self._on_connect(link, facts.value)
        except BaseException:
            link.close()
            raise
        self.link = link
        self.reason = ""
        if link.closed:
            self._closed()

    def _closed(self) -> None:
        was, self.link = self.link, None
        self.reason = "the connection to the spawner was lost"
        self._lost.set()
        if was is not None:
            self._on_lost()

    def require(self) -> SpawnerLink:
        """The connection; raises AetherError UNAVAILABLE."""
        if self.link is None:
            raise AetherError("UNAVAILABLE", f"cannot reach the spawner: {self.reason}", retry_after_s=1)
        return self.link

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.link is not None:
            link, self.link = self.link, None
            link.close()
