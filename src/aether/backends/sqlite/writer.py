"""The one writer of a SQLite file: a thread that commits whatever has gathered while the last commit ran.

Invariants
- Writes take effect in the order of `write` calls; each future resolves after the commit that holds it.
- A lazy write begins no commit of its own until it has waited LINGER_S for one that is not.
- One `call_soon_threadsafe` per batch wakes the loop (waking it once per write costs more than the write).
- SQLITE_FULL rolls the batch back: the writes marked `refusable` fail with DISK_FULL, the others are done
  again without them. Any other failure, a second SQLITE_FULL too, calls `on_fatal`: whether a failed fsync
  left the data on the disk is unknown, so nothing may be tried again (https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import apsw

from aether.contract.errors import AetherError

T = TypeVar("T")
_BATCH_MAX: Final = 1024
LINGER_S: Final = 0.02


@dataclass(slots=True)
class _Write:
    run: Callable[[apsw.Connection], Any]
    future: asyncio.Future[Any]
    refusable: bool
    lazy: bool
    value: Any = None
    error: AetherError | None = None


class Writer:
    """Owns the writing connection and its thread, from `start` until `stop`."""

    def __init__(self, connect: Callable[[], apsw.Connection], on_fatal: Callable[[BaseException], None]) -> None:
        self._connect = connect
        self._on_fatal = on_fatal
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._failed = False
        self.commits = 0
        self.writes = 0

    def __repr__(self) -> str:
        return f"<Writer commits={self.commits} writes={self.writes} waiting={self._queue.qsize()}>"

    async def start(self) -> None:
        """Opens the connection in the thread; raises what `connect` raises."""
        self._thread.start()
        await self._opened

    async def stop(self) -> None:
        """Commits what was written before, then ends the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)

    def write(
        self, run: Callable[[apsw.Connection], T], refusable: bool = False, lazy: bool = False
    ) -> asyncio.Future[T]:
        """Runs `run` inside the next transaction; the future has its value once that is committed."""
        future: asyncio.Future[T] = self._loop.create_future()
        if self._failed or not self._thread.is_alive():
            future.set_exception(AetherError("UNAVAILABLE", "cannot write to the job store: it is closed"))
            return future
        self._queue.put(_Write(run, future, refusable, lazy))
        return future

    # ---- in the thread

    def _work(self) -> None:
        try:
            connection = self._connect()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._opened.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._opened.set_result, None)
        batch: list[_Write] | None = None
        try:
            while (batch := self._gather()) is not None:
                self._commit_batch(connection, batch)
                self._loop.call_soon_threadsafe(_resolve, batch)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error, batch)
        finally:
            connection.close()

    def _fail(self, error: BaseException, batch: list[_Write] | None) -> None:
        """On the loop: nothing that was promised may look kept, and the process ends."""
        self._failed = True
        lost = list(batch or ())
        while not self._queue.empty():
            if (write := self._queue.get_nowait()) is not None:
                lost.append(write)
        for write in lost:
            write.error = AetherError("INTERNAL", f"cannot write to the job store: {error}")
        _resolve(lost)
        self._on_fatal(error)

    def _gather(self) -> list[_Write] | None:
        first = self._queue.get()
        if first is None:
            return None
        batch, lazy = [first], first.lazy
        until_s = time.monotonic() + LINGER_S
        while len(batch) < _BATCH_MAX:
            try:
                following = self._queue.get(lazy, max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                break
            if following is None:
                self._queue.put(None)
                break
            batch.append(following)
            lazy = lazy and following.lazy
        return batch

    def _commit_batch(self, connection: apsw.Connection, batch: list[_Write]) -> None:
        try:
            _transact(connection, batch)
        except apsw.FullError as error:
            _rollback(connection)
            kept = [write for write in batch if not write.refusable]
            for write in batch:
                if write.refusable:
                    write.error = AetherError("DISK_FULL", f"cannot keep it in the job store: {error}")
            if kept:
                _transact(connection, kept)
        self.commits += 1
        self.writes += len(batch)


def _transact(connection: apsw.Connection, batch: list[_Write]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for write in batch:
        write.value = write.run(connection)
    connection.execute("COMMIT")


def _rollback(connection: apsw.Connection) -> None:
    # sqlite3_get_autocommit: SQLITE_FULL may have rolled the transaction back already (lang_transaction.html).
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _resolve(batch: list[_Write]) -> None:
    for write in batch:
        if write.future.done():
            continue
        if write.error is not None:
            write.future.set_exception(write.error)
        else:
            write.future.set_result(write.value)
