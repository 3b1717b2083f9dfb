"""The book: log, ledger and accounts in step; a snapshot and the tail give what the whole log gives."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.records import Record
from aether.substrate.access.budget import Accounts
from aether.substrate.audit.room import Bounds
from aether.substrate.book import Book, outcome_of
from tests.unit.substrate.audit.audit_kit import intent, open_log

NOW_NS = 1_790_000_000_000_000_000


class Shelf:
    """Books over one directory, opened one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.snapshot = directory / "ledger.snapshot"

    def open(self) -> tuple[Book, int]:
        log = open_log(self.directory / "audit", bounds=Bounds())
        book = Book(log, Accounts(), self.snapshot, lambda: NOW_NS)
        return book, book.load()

    def fold(self) -> tuple[Book, int]:
        """The same without the snapshot."""
        log = open_log(self.directory / "audit", bounds=Bounds())
        book = Book(log, Accounts(), self.directory / "none", lambda: NOW_NS)
        return book, book.load()


def job(number: int, key: str | None = None) -> Record:
    first = intent(0)
    assert first.budget is not None
    budget = msgspec.structs.replace(first.budget, reservation_id=f"rsv_{number}")
    return msgspec.structs.replace(first, job_id=f"job_{number}", budget=budget, idempotency_hash=key)


def write(book: Book, record: Record, **changes: object) -> Record:
    return book.write(lambda index, now: msgspec.structs.replace(record, log_index=index, time=now, **changes))


def start(book: Book, of: Record) -> Record:
    return write(book, of, type="job.started", cell_id="cell_1", detail={"exec_id": "exec_1"}, budget=None)


def end(book: Book, of: Record) -> Record:
    assert of.budget is not None
    settled = msgspec.structs.replace(of.budget, cpu_ms=7, settled=True)
    return write(book, of, type="job.outcome", state="succeeded", budget=settled)


def memory(book: Book) -> tuple[object, ...]:
    return book.ledger.applied, book.ledger.open, book.ledger.keys(), book.accounts.snapshot()


def busy(book: Book, first: int, count: int) -> None:
    """Jobs that are queued, run, were asked to stop, or ended."""
    for number in range(first, first + count):
        admitted = write(book, job(number, f"key{number}" if number % 2 else None))
        if number % 4 > 0:
            start(book, admitted)
        if number % 4 == 2:
            write(book, admitted, type="job.stop", budget=None)
        if number % 4 == 3:
            end(book, admitted)


async def settled(book: Book) -> None:
    await book.log.durable(book.log.size - 1)


def test_snapshot_and_tail_give_the_fold(tmp_path: Path) -> None:
    async def main() -> None:
        shelf = Shelf(tmp_path)
        book, _ = shelf.open()
        busy(book, 0, 12)
        await settled(book)
        book.snapshot()
        busy(book, 12, 9)
        await settled(book)
        size, live = book.log.size, memory(book)
        book.log.close()
        resumed, replayed = shelf.open()
        resumed.log.close()
        whole, everything = shelf.fold()
        whole.log.close()
        assert 0 < replayed < everything == size
        assert memory(resumed) == memory(whole) == live

    asyncio.run(main())


def test_a_snapshot_that_does_not_fit_is_ignored(tmp_path: Path) -> None:
    """Torn, changed, or ahead of a log that lost its tail: the log decides."""

    async def main() -> None:
        shelf = Shelf(tmp_path)
        book, _ = shelf.open()
        busy(book, 0, 8)
        await settled(book)
        book.snapshot()
        size = book.log.size
        book.log.close()
        good = shelf.snapshot.read_bytes()
        for bad in (good[:-3], good.replace(b"job_1", b"job_9", 1), b"", b"\n"):
            shelf.snapshot.write_bytes(bad)
            again, replayed = shelf.open()
            again.log.close()
            assert replayed == size
        elsewhere = Shelf(tmp_path / "shorter")
        elsewhere.directory.mkdir()
        elsewhere.snapshot.write_bytes(good)
        shorter, replayed = elsewhere.open()
        assert (replayed, shorter.ledger.applied, len(shorter.ledger.open)) == (0, 0, 0)
        shorter.log.close()

    asyncio.run(main())


def test_only_what_is_durable_is_kept_in_a_snapshot(tmp_path: Path) -> None:
    async def main() -> None:
        shelf = Shelf(tmp_path)
        book, _ = shelf.open()
        busy(book, 0, 3)
        book.snapshot()
        assert not shelf.snapshot.exists()
        await settled(book)
        book.snapshot()
        assert shelf.snapshot.exists()
        book.log.close()

    asyncio.run(main())


def test_a_record_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        book, _ = Shelf(tmp_path).open()
        before = memory(book)
        with pytest.raises(AetherError) as caught:
            write(book, job(1), labels=("x" * 60,) * 2_000)
        assert caught.value.code == "TOO_LARGE"
        assert memory(book) == before
        write(book, job(1))
        assert list(book.ledger.open) == ["job_1"]
        book.log.close()

    asyncio.run(main())


def test_waiters_hear_of_an_outcome_that_is_durable(tmp_path: Path) -> None:
    async def main() -> None:
        book, _ = Shelf(tmp_path).open()
        admitted = write(book, job(1))
        waiting = [asyncio.ensure_future(book.wait("job_1", 5)) for _ in range(3)]
        assert await book.wait("job_1", 0) is None
        assert await book.wait("job_2", 5) is None, "an unknown job is not waited for"
        started = time.monotonic()
        assert await book.wait("job_1", 0.02) is None and time.monotonic() - started < 1
        outcome = end(book, admitted)
        await book.durable(outcome)
        assert not any(waiter.done() for waiter in waiting)
        book.publish(outcome_of(admitted, outcome))
        views = await asyncio.gather(*waiting, book.wait("job_1", 5))
        assert {view.state for view in views if view is not None} == {JobState.SUCCEEDED} and None not in views
        known = book.known("job_1")
        assert known is not None and known.outcome_index == outcome.log_index
        book.log.close()

    asyncio.run(main())


def test_who_waits_between_an_outcome_and_its_durability_is_told(tmp_path: Path) -> None:
    """An outcome closes the job when it is written; who asks before it is durable must not be told `queued`."""

    async def main() -> None:
        book, _ = Shelf(tmp_path).open()
        admitted = write(book, job(1))
        outcome = end(book, admitted)
        waiting = asyncio.create_task(book.wait("job_1", 5.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        await book.durable(outcome)
        book.publish(outcome_of(admitted, outcome))
        view = await waiting
        assert view is not None and view.state is JobState.SUCCEEDED
        assert await book.wait("job_1", 0) == view
        book.log.close()

    asyncio.run(main())
