"""What SQLite adds to the port: group commit, a full disk, a failed write, a killed process, a newer schema."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import apsw
import msgspec
import pytest

from aether.backends.sqlite.migrations import MIGRATIONS
from aether.backends.sqlite.store import SqliteStore
from aether.contract import ids
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.store import Blob, Entry, JobRow

ENTRY = Entry(time="t", event=b"{}")


def _row(size: int = 10) -> JobRow:
    job_id = ids.new(ids.JOB)
    view = JobView(
        job_id=job_id, request_id="x" * size, kind="command", op="run", state=JobState.QUEUED, tenant_id="t",
        node_id="n", principal="p", attempt=1, labels=(), schema_version="1.0", input_hash="h", created_at="t",
    )  # fmt: skip
    return JobRow(
        job_id=job_id, tenant_id="t", node_id="n", attempt=1, revision=1, kind="command", effect="cell", labels=(),
        phase="queued", state=JobState.QUEUED, batch_key="", grant=None, view=view,
    )  # fmt: skip


def _never(error: BaseException) -> None:
    raise AssertionError(repr(error))


def test_writes_that_gather_share_a_commit(tmp_path: Path) -> None:
    async def body() -> None:
        store = SqliteStore(tmp_path / "jobs.db", _never)
        await store.open()
        await asyncio.gather(*(store.submit(_row(), ENTRY) for _ in range(500)))
        writer = store._writer
        assert writer is not None and writer.writes == 500
        assert writer.commits < 50
        await store.close()

    asyncio.run(body())


def test_a_full_disk_refuses_what_was_not_promised_and_keeps_what_was(tmp_path: Path) -> None:
    async def body() -> None:
        fatal: list[BaseException] = []
        store = SqliteStore(tmp_path / "jobs.db", fatal.append, pages_max=40)
        await store.open()
        kept = _row()
        assert await store.submit(kept, ENTRY)
        big = _row(200_000)
        moved = msgspec.structs.replace(kept, revision=2, phase="launching")
        refused, advanced = await asyncio.gather(
            store.submit(big, ENTRY, Blob(digest="sha256:b", data=b"b")), store.advance(moved, ENTRY),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(refused, AetherError) and refused.code == "DISK_FULL"
        assert advanced is True
        assert await store.get(big.job_id) is None
        assert await store.get_blob("sha256:b") is None
        assert await store.history(big.job_id) == []
        with pytest.raises(AetherError, match="DISK_FULL"):
            await store.put_blob(Blob(digest="sha256:c", data=b"c" * 200_000))
        assert await store.submit(_row(), ENTRY), "small things still fit"
        assert not fatal
        await store.close()

    asyncio.run(body())


def test_a_promised_write_that_fails_is_fatal_and_never_tried_again(tmp_path: Path) -> None:
    async def body() -> None:
        fatal: list[BaseException] = []
        store = SqliteStore(tmp_path / "jobs.db", fatal.append, pages_max=40)
        await store.open()
        kept = _row()
        await store.submit(kept, ENTRY)
        view = msgspec.structs.replace(kept.view, request_id="y" * 200_000)
        with pytest.raises(AetherError, match="INTERNAL"):
            await store.advance(msgspec.structs.replace(kept, revision=2, view=view), ENTRY)
        assert len(fatal) == 1 and isinstance(fatal[0], apsw.FullError)
        with pytest.raises(AetherError, match="UNAVAILABLE"):
            await store.submit(_row(), ENTRY)
        await store.close()

    asyncio.run(body())


def test_an_error_of_the_file_is_fatal(tmp_path: Path) -> None:
    """The writer meets an error that is not SQLITE_FULL: here a table that is gone."""

    async def body() -> None:
        fatal: list[BaseException] = []
        store = SqliteStore(tmp_path / "jobs.db", fatal.append)
        await store.open()
        with apsw.Connection(str(tmp_path / "jobs.db")) as other:
            other.execute("DROP TABLE history")
        with pytest.raises(AetherError, match="INTERNAL"):
            await store.submit(_row(), ENTRY)
        assert len(fatal) == 1
        await store.close()

    asyncio.run(body())


def test_files_are_private_and_the_wal_is_synced(tmp_path: Path) -> None:
    async def body() -> None:
        store = SqliteStore(tmp_path / "jobs.db", _never)
        await store.open()
        await store.submit(_row(), ENTRY)
        for file in tmp_path.iterdir():
            assert file.stat().st_mode & 0o077 == 0, file
        await store.close()

    asyncio.run(body())


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    with apsw.Connection(str(tmp_path / "jobs.db")) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")

    async def body() -> None:
        store = SqliteStore(tmp_path / "jobs.db", _never)
        with pytest.raises(AetherError, match="STATE_UNUSABLE"):
            await store.open()
        await store.close()

    asyncio.run(body())


def test_a_store_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    async def body() -> None:
        store = SqliteStore(tmp_path / "missing" / "jobs.db", _never)
        with pytest.raises(AetherError, match="STATE_UNUSABLE"):
            await store.open()
        await store.close()

    asyncio.run(body())


WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_sqlite_store import ENTRY, _row, _never
from aether.backends.sqlite.store import SqliteStore

async def main():
    store = SqliteStore(Path({path!r}), _never)
    await store.open()
    async def one():
        while True:
            row = _row()
            await store.submit(row, ENTRY)
            sys.stdout.write(row.job_id + "\\n")
            sys.stdout.flush()
    await asyncio.gather(*(one() for _ in range(8)))
asyncio.run(main())
"""


def test_what_was_acknowledged_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    script = WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(200)]
    os.kill(process.pid, signal.SIGKILL)
    acknowledged += process.stdout.read().split("\n")[:-1]
    process.wait()
    process.stdout.close()

    async def body() -> None:
        store = SqliteStore(path, _never)
        await store.open()
        kept = {row.job_id for row in await store.open_jobs()}
        assert set(acknowledged) <= kept
        await store.close()

    asyncio.run(body())
