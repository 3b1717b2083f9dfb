"""The audit log as the authority's service uses it (docs/formats.md "The log directory").

Protocol: `append` assigns the next index, synchronously, so that records appended before the next await are
neighbours in one group commit; `await durable(index)` before anything the record allows happens. One writer thread
commits; the loop is told once per batch. Methods belong to the event loop's thread unless they say otherwise.

Invariants:
- an index is durable only after the fdatasync of its frame; indexes become durable in order;
- a record whose job was accepted (RESERVED) can be written on a full disk: other records are refused before they
  would take its room (`reserve`, `room`); and so can ENDINGS_BYTES_RESERVED of those that end something (ENDINGS);
- after the first failed write nothing more is durable, `on_fatal` was called, and whoever waits gets an error.

Lifetime: `open` takes an exclusive lock on the directory; `close` commits what is queued, publishes the checkpoint,
and releases it.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import heapq
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.ids import Digest
from aether.contract.limits import (
    DISK_FREE_BYTES_MIN,
    ENDINGS_BYTES_RESERVED,
    OUTCOME_BYTES_RESERVED,
    RECORD_BYTES_MAX,
    TILE_WIDTH,
)
from aether.contract.records import Record
from aether.substrate.audit import entry as entries
from aether.substrate.audit import pruning, tree
from aether.substrate.audit.documents import Documents
from aether.substrate.audit.note import Checkpoint, Signer, Verifier
from aether.substrate.audit.pruning import SEGMENTS
from aether.substrate.audit.recover import Recovered, recover
from aether.substrate.audit.room import Bounds
from aether.substrate.audit.segments import ENTRY_HEADER_BYTES, FRAME_HEADER_BYTES
from aether.substrate.audit.store import Committed, LogStore, Opening
from aether.substrate.audit.witnessed import Witnessed
from aether.substrate.audit.writer import Batch, Writer

RESERVED: Final = frozenset({"job.started", "job.stop", "job.outcome", "node.stopped"})
"""Records of jobs already accepted: `reserve` keeps room for them."""
ENDINGS: Final = frozenset(
    {
        "ticket.revoked",
        "cell.freed",
        "cell.lost",
        "egress.closed",
        "audit.pruned",
        "approval.denied",
        "approval.expired",
    }
)
"""What takes leave or room back must be possible when there is none."""
_OVERHEAD_BYTES: Final = ENTRY_HEADER_BYTES + FRAME_HEADER_BYTES
_ROOM_INTERVAL_NS: Final = 100_000_000


class AuditLog:
    """One open log. `size` counts appended records, `durable_size` those that survive a crash."""

    def __init__(
        self,
        directory: Path,
        lock: int,
        signer: Signer,
        recovered: Recovered,
        *,
        now_ns: Callable[[], int],
        on_fatal: Callable[[BaseException], None],
        bounds: Bounds,
        disk_free_bytes_min: int,
        opening: Opening | None,
    ) -> None:
        self._directory = directory
        self._lock = lock
        self._signer = signer
        self._now_ns = now_ns
        self._fatal_handler = on_fatal
        self._disk_free_bytes_min = disk_free_bytes_min
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending = Batch([], [])
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._failed: BaseException | None = None
        self._closed = False
        self._documents = Documents(directory)
        self._store = LogStore(directory, signer, recovered, bounds, now_ns, opening)
        self._pruned_to = pruning.pruned_to(directory)
        self.witnessed = Witnessed(directory, signer.name)
        self._durable = self._store.state(ENDINGS_BYTES_RESERVED)
        self._size = self._durable.size
        self._outstanding_bytes = 0
        self._outstanding: list[int] = []
        self._reserved_bytes = ENDINGS_BYTES_RESERVED
        self._room_checked_ns: int | None = None
        self._disk_has_room = True
        self._store.publish(force=True)
        self._writer = Writer(self._store, bounds.frame_bytes, self._on_commit, self._on_fatal)
        self._writer.want_bytes = self._reserved_bytes
        self._writer.start()

    @classmethod
    def open(
        cls,
        directory: Path,
        signer: Signer,
        origin: str,
        *,
        now_ns: Callable[[], int],
        on_fatal: Callable[[BaseException], None],
        bounds: Bounds | None = None,
        disk_free_bytes_min: int = DISK_FREE_BYTES_MIN,
        former: Verifier | None = None,
        opening: Opening | None = None,
    ) -> AuditLog:
        """Opens or creates the log in `directory`; `now_ns` is a monotonic clock. `former` is the key of the epoch
        before, `opening` makes the record that begins this one when that is still to be done.

        `on_fatal` is called on the writer thread when a write or sync fails and should end the process. Raises
        AetherError ALREADY_RUNNING (locked), LOG_CORRUPT (details: segment, offset) or STATE_UNUSABLE.
        """
        if signer.name != origin:
            raise AetherError("STATE_UNUSABLE", f"cannot open the log {origin}: the key is that of {signer.name}")
        try:
            (directory / SEGMENTS).mkdir(mode=0o750, parents=True, exist_ok=True)
            lock = _take_lock(directory)
        except OSError as error:
            raise AetherError("STATE_UNUSABLE", f"cannot open the log in {directory}: {error.strerror}") from error
        try:
            recovered = recover(directory, signer.verifier, former)
            return cls(
                directory,
                lock,
                signer,
                recovered,
                now_ns=now_ns,
                on_fatal=on_fatal,
                bounds=bounds or Bounds(),
                disk_free_bytes_min=disk_free_bytes_min,
                opening=opening,
            )
        except OSError as error:
            os.close(lock)
            raise AetherError("STATE_UNUSABLE", f"cannot open the log in {directory}: {error.strerror}") from error
        except BaseException:
            os.close(lock)
            raise

    def __repr__(self) -> str:
        return f"<AuditLog {self._signer.name} size={self._size} durable={self._durable.size}>"

    @property
    def size(self) -> int:
        return self._size

    @property
    def durable_size(self) -> int:
        return self._durable.size

    @property
    def first(self) -> int:
        """The first record that can still be read; those before it were pruned."""
        return pruning.first_kept(self._pruned_to)

    def append(self, make: Callable[[int], Record]) -> int:
        """Queues the record `make(index)` and returns its index. Nothing is queued when it raises.

        Raises AetherError DISK_FULL or BUSY (no room for a record that may be refused), TOO_LARGE, BAD_FIELD, or
        UNAVAILABLE after a failed write.
        """
        self._check_usable()
        index = self._size
        record = make(index)
        if record.log_index != index:
            raise ValueError(f"record {record.log_index} made for index {index}")
        entry = entries.encode(record)
        cost = len(entry) + _OVERHEAD_BYTES
        if record.type in ENDINGS:
            self._check_room(cost - ENDINGS_BYTES_RESERVED)
        elif record.type not in RESERVED:
            self._check_room(cost + (OUTCOME_BYTES_RESERVED if record.type == "job.intent" else 0))
        self._schedule()
        self._pending.entries.append(entry)
        self._outstanding.append(cost)
        self._outstanding_bytes += cost
        self._size += 1
        return index

    async def durable(self, index: int) -> None:
        """Returns when the record at `index` survives a crash. Raises AetherError UNAVAILABLE if it never will."""
        if index < self._durable.size:
            return
        self._check_usable()
        if index >= self._size:
            raise ValueError(f"no record {index} was appended")
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (index, next(self._order), future))
        await future

    def entry(self, index: int) -> bytes:
        """The exact text of a durable record. Raises AetherError NOT_FOUND, GONE or LOG_CORRUPT."""
        if not 0 <= index < self._durable.size:
            raise AetherError("NOT_FOUND", f"cannot read record {index}: the log has {self._durable.size}")
        self._check_kept(index)
        return self._store.tiles.entry(index)

    def read(self, start: int, limit: int) -> list[Record]:
        """Up to `limit` durable records from `start` on; empty at the end. Raises AetherError GONE."""
        self._check_kept(start)
        end = min(start + limit, self._durable.size)
        return [entries.decode(self._store.tiles.entry(index)) for index in range(max(0, start), end)]

    def bundle(self, number: int) -> list[bytes]:
        """The durable records of entry bundle `number`, unchecked; callable on any thread. Raises AetherError
        GONE or LOG_CORRUPT."""
        first = number * TILE_WIDTH
        self._check_kept(first)
        return self._store.tiles.bundle(number)[: max(0, self._durable.size - first)]

    def check(self, index: int, entry: bytes) -> None:
        """Holds an entry of `bundle` to the tree; callable on any thread. Raises AetherError LOG_CORRUPT."""
        self._store.tiles.check(index, entry)

    def prove(self, index: int, size: int) -> tuple[str, ...]:
        """The inclusion proof of a durable record in the tree of `size`, base64. Raises AetherError NOT_FOUND."""
        if not 0 <= index < size <= self._durable.size:
            raise AetherError("NOT_FOUND", f"cannot prove record {index} in {size}: the log has {self._durable.size}")
        return _base64(tree.inclusion_proof(index, size, self._store.tiles.node))

    def prove_growth(self, old: int, new: int) -> tuple[str, ...]:
        """The consistency proof between two sizes, base64. Raises AetherError NOT_FOUND."""
        if not 0 < old <= new <= self._durable.size:
            raise AetherError("NOT_FOUND", f"cannot prove {old} in {new}: the log has {self._durable.size}")
        return _base64(tree.consistency_proof(old, new, self._store.tiles.node))

    def checkpoint(self, at_least: int = 0) -> tuple[str, int]:
        """A signed checkpoint (note, size) over `at_least` records: one that witnesses cosigned, the published one, or
        one signed now.

        Raises AetherError NOT_READY when fewer are durable.
        """
        if (cosigned := self.witnessed.best(at_least)) is not None:
            return cosigned
        return self.published(at_least)

    def published(self, at_least: int = 0) -> tuple[str, int]:
        """The newest published checkpoint (note, size) or, where that covers too little, one signed now. Raises
        AetherError NOT_READY."""
        published = self._store.published
        if published[0] and published[1] >= at_least:
            return published
        durable = self._durable
        if durable.size < at_least:
            raise AetherError("NOT_READY", f"cannot sign {at_least} records: {durable.size} are durable")
        return self._signer.sign(Checkpoint(self._signer.name, durable.size, durable.root).text()), durable.size

    def signed(self, size: int) -> str:
        """The note over the first `size` durable records: always the same, as Ed25519 is. Raises AetherError
        NOT_FOUND."""
        if not 0 < size <= self._durable.size:
            raise AetherError("NOT_FOUND", f"cannot sign {size} records: the log has {self._durable.size}")
        root = tree.root(size, self._store.tiles.node)
        return self._signer.sign(Checkpoint(self._signer.name, size, root).text())

    async def seal(self) -> None:
        """Ends the current segment once all that was appended is in it."""
        self._check_usable()
        self._flush()
        sealed = asyncio.get_running_loop().create_future()

        def seal() -> None:
            self._store.seal()
            self._to_loop(lambda: None if sealed.done() else sealed.set_result(None))

        self._loop = asyncio.get_running_loop()
        self._writer.put(Batch([], [], seal))
        await sealed

    @property
    def segment_start(self) -> int:
        """The first record of the segment that is written."""
        return int(pruning.list_segments(self._directory)[-1].name)

    def ends(self) -> list[int]:
        """Where a pruning may end, rising."""
        return [end for end in pruning.ends(self._directory) if end > self._pruned_to]

    def check_prunable(self, end: int) -> None:
        """That the tree holds the hashes of all that a pruning up to `end` takes away; reads it all, so on a thread.
        Raises AetherError LOG_CORRUPT."""
        tiles = self._store.tiles
        for number in range(self.first // TILE_WIDTH, end // TILE_WIDTH):
            pruning.check(number, tiles.bundle(number), tiles.node)

    def prune(self, end: int) -> None:
        """Takes away the records below `end`, one of `ends()`; the record that says so is durable. On a thread."""
        self._pruned_to = end
        pruning.begin(self._directory, end)
        pruning.finish(self._directory)

    def store_document(self, text: bytes) -> Digest:
        """Keeps `text` under its digest, durable before any record appended later. Repeated ones are free.

        Raises AetherError DISK_FULL, TOO_LARGE or UNAVAILABLE.
        """
        self._check_usable()
        digest, path = self._documents.put(text)
        if path is not None:
            self._schedule()
            self._pending.documents.append(path)
        return digest

    def document(self, digest: str) -> bytes:
        """The text of `digest`. Raises AetherError BAD_ID, NOT_FOUND or LOG_CORRUPT."""
        return self._documents.get(digest)

    def reserve(self, open_jobs: int) -> None:
        """States how many accepted jobs still owe records; room for them is kept from now on."""
        self._reserved_bytes = open_jobs * OUTCOME_BYTES_RESERVED + ENDINGS_BYTES_RESERVED
        self._writer.want_bytes = self._reserved_bytes

    def room(self) -> bool:
        """Whether work may be admitted: the disk is above its watermark and the log owns room for one more job."""
        now = self._now_ns()
        if self._room_checked_ns is None or now - self._room_checked_ns >= _ROOM_INTERVAL_NS:
            self._room_checked_ns = now
            disk = os.statvfs(self._directory)
            self._disk_has_room = disk.f_bavail * disk.f_frsize >= self._disk_free_bytes_min
            if self._free_bytes() < OUTCOME_BYTES_RESERVED + RECORD_BYTES_MAX:
                self._writer.put(Batch([], []))
        behind = self._free_bytes() < OUTCOME_BYTES_RESERVED + RECORD_BYTES_MAX
        return self._disk_has_room and not (behind and self._durable.short)

    def close(self) -> None:
        """Commits what is queued, publishes the checkpoint, ends the thread, releases the lock."""
        if self._closed:
            return
        if self._failed is None:
            self._flush()
        self._closed = True
        self._writer.stop()
        self._store.close()
        os.close(self._lock)

    def _check_usable(self) -> None:
        if self._failed is not None or self._closed:
            why = "it is closed" if self._failed is None else f"a write failed: {self._failed}"
            raise AetherError("UNAVAILABLE", f"cannot use the audit log: {why}")

    def _check_kept(self, index: int) -> None:
        if index < self.first:
            why = f"records below {self.first} were pruned; their hashes are kept"
            raise AetherError("GONE", f"cannot read record {index}: {why}", "look for it in a copy of the log")

    def _check_room(self, cost: int) -> None:
        if self._free_bytes() >= cost:
            return
        self._writer.put(Batch([], []))
        if not self._durable.short or self._outstanding_bytes > self._reserved_bytes:
            # more was queued at once than is allocated ahead; the writer will have caught up
            raise AetherError("BUSY", "cannot record more now: the audit log is behind", retry_after_s=1)
        raise AetherError("DISK_FULL", "cannot record: what is left of the disk is kept for accepted jobs")

    def _free_bytes(self) -> int:
        return self._durable.left_bytes - self._outstanding_bytes - self._reserved_bytes

    def _schedule(self) -> None:
        if self._pending.entries or self._pending.documents:
            return
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._pending.entries or self._pending.documents:
            batch, self._pending = self._pending, Batch([], [])
            self._writer.put(batch)

    def _on_commit(self, committed: Committed, count: int) -> None:
        """On the writer thread."""
        self._to_loop(self._committed, committed, count)

    def _on_fatal(self, error: BaseException) -> None:
        """On the writer thread."""
        self._failed = error
        self._fatal_handler(error)
        self._to_loop(self._fail_waiters)

    def _to_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            # the loop closed in between: nobody waits any more
            return

    def _committed(self, committed: Committed, count: int) -> None:
        self._durable = committed
        self._outstanding_bytes -= sum(self._outstanding[:count])
        del self._outstanding[:count]
        waiters = self._waiters
        while waiters and waiters[0][0] < committed.size:
            future = heapq.heappop(waiters)[2]
            if not future.done():
                future.set_result(None)

    def _fail_waiters(self) -> None:
        while self._waiters:
            future = self._waiters.pop()[2]
            if not future.done():
                future.set_exception(AetherError("UNAVAILABLE", f"cannot record: a write failed: {self._failed}"))


def _take_lock(directory: Path) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise AetherError("ALREADY_RUNNING", f"cannot open the log in {directory}: it is in use") from error
    return fd


def _base64(hashes: list[bytes]) -> tuple[str, ...]:
    return tuple(base64.b64encode(digest).decode() for digest in hashes)
