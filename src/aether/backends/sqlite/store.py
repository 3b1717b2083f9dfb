"""The Store port on SQLite: WAL, synchronous=FULL, one writer thread, one reader thread.

WAL lets the reader see the last commit while the writer waits for the disk (https://sqlite.org/wal.html).
synchronous=FULL syncs the WAL at every commit, so that what was acknowledged survives a power loss; NORMAL
would not. File: `<dir>/jobs.db` with `-wal` and `-shm` beside it, mode 0600.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from aether.backends.sqlite import rows
from aether.backends.sqlite.migrations import MIGRATIONS
from aether.backends.sqlite.writer import Writer
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.store import Blob, Entry, JobRow
from aether.contract.wire import ArtifactInfo, ArtifactQuery, JobQuery

T = TypeVar("T")
_PRAGMAS: Final = (
    "journal_mode = WAL",
    "synchronous = FULL",
    "wal_autocheckpoint = 4000",
    "journal_size_limit = 67108864",
    "cache_size = -16000",
)


class SqliteStore:
    """Implements `aether.contract.store.Store`. `on_fatal` is called on the loop and must end the process."""

    def __init__(self, path: Path, on_fatal: Callable[[BaseException], None], pages_max: int | None = None) -> None:
        self._path = path
        self._on_fatal = on_fatal
        self._pages_max = pages_max
        self._writer: Writer | None = None
        self._reader: apsw.Connection | None = None
        self._threads = ThreadPoolExecutor(1, "store-reader")

    def __repr__(self) -> str:
        return f"<SqliteStore {self._path} {self._writer!r}>"

    async def open(self) -> None:
        self._writer = Writer(self._connect_writer, self._on_fatal)
        try:
            await self._writer.start()
            self._reader = await self._run(lambda: _connect(self._path, apsw.SQLITE_OPEN_READWRITE))
        except (apsw.Error, OSError) as error:
            raise AetherError("STATE_UNUSABLE", f"cannot open the job store {self._path}: {error}") from error

    async def close(self) -> None:
        if self._writer is not None:
            await self._writer.stop()
        if self._reader is not None:
            await self._run(self._reader.close)
            self._reader = None
        self._threads.shutdown(wait=False)

    # ---- jobs

    def submit(self, row: JobRow, entry: Entry, blob: Blob | None = None) -> Awaitable[bool]:
        return self._write(partial(rows.insert_job, row, entry, blob), refusable=True)

    def advance(self, row: JobRow, entry: Entry, lazy: bool = False) -> Awaitable[bool]:
        return self._write(partial(rows.update_job, row, entry), lazy=lazy)

    def drop(self, job_ids: Sequence[str]) -> Awaitable[None]:
        return self._write(partial(rows.delete_jobs, tuple(job_ids)))

    async def get(self, job_id: str) -> JobRow | None:
        return await self._read(lambda c: rows.select_job(c, job_id))

    async def list_jobs(self, query: JobQuery) -> list[JobView]:
        return await self._read(lambda c: rows.select_views(c, query))

    async def open_jobs(self) -> list[JobRow]:
        return await self._read(rows.select_open)

    async def history(self, job_id: str) -> list[Entry]:
        return await self._read(lambda c: rows.select_history(c, job_id))

    # ---- the audit log

    async def applied_index(self) -> int:
        return await self._read(rows.select_applied)

    def set_applied_index(self, index: int) -> Awaitable[None]:
        return self._write(partial(rows.raise_applied, index))

    # ---- blobs and artifacts

    def put_blob(self, blob: Blob) -> Awaitable[None]:
        return self._write(partial(rows.insert_blob, blob), refusable=True)

    async def get_blob(self, digest: str) -> bytes | None:
        return await self._read(lambda c: rows.select_blob(c, digest))

    def add_artifact(self, info: ArtifactInfo) -> Awaitable[None]:
        return self._write(partial(rows.insert_artifact, info), refusable=True)

    async def find_artifact(self, digest: str, tenant_id: str | None = None) -> ArtifactInfo | None:
        return await self._read(lambda c: rows.select_artifact(c, digest, tenant_id))

    async def list_artifacts(self, query: ArtifactQuery) -> list[tuple[str, ArtifactInfo]]:
        return await self._read(lambda c: rows.select_artifacts(c, query))

    # ---- inside

    def _write(
        self, run: Callable[[apsw.Connection], T], refusable: bool = False, lazy: bool = False
    ) -> asyncio.Future[T]:
        assert self._writer is not None
        return self._writer.write(run, refusable, lazy)

    async def _read(self, read: Callable[[apsw.Connection], T]) -> T:
        if self._reader is None:
            raise AetherError("UNAVAILABLE", "cannot read the job store: it is closed")
        return await self._run(partial(read, self._reader))

    async def _run(self, what: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, what)

    def _connect_writer(self) -> apsw.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = _connect(self._path, apsw.SQLITE_OPEN_READWRITE)
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        _migrate(connection)
        if self._pages_max is not None:
            connection.execute(f"PRAGMA max_page_count = {self._pages_max}")
        return connection


def _connect(path: Path, flags: int) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=flags, statementcachesize=64)
    connection.set_busy_timeout(5_000)
    return connection


def _migrate(connection: apsw.Connection) -> None:
    done: Any = connection.pragma("user_version")
    if done > len(MIGRATIONS):
        raise AetherError(
            "STATE_UNUSABLE", f"cannot open the job store: its schema {done} is newer than ours {len(MIGRATIONS)}"
        )
    for number, script in enumerate(MIGRATIONS[done:], start=done + 1):
        with connection:
            connection.execute(script)
            connection.execute(f"PRAGMA user_version = {number}")
