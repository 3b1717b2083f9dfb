"""The writer: one thread that owns the log's files and commits what the event loop queued.

The loop hands over batches (`put`); the thread takes all that are waiting, up to one frame, makes them durable with
one fdatasync and reports once (`on_commit`). Between commits it publishes tiles and the checkpoint. The first
failure calls `on_fatal` on this thread and ends it; nothing after it is ever reported as durable.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aether.substrate.audit.segments import ENTRY_HEADER_BYTES, FRAME_HEADER_BYTES
from aether.substrate.audit.store import Committed, LogStore


@dataclass(slots=True)
class Batch:
    """What one turn of the loop appended, in order; empty means: look at the room again."""

    entries: list[bytes]
    documents: list[Path]
    then: Callable[[], None] | None = None
    """Done on the writer's thread once all that was put before it is durable."""


class Writer(threading.Thread):
    """Runs until `stop`. `want_bytes` is set by the loop and read here (an int: no lock needed)."""

    def __init__(
        self,
        store: LogStore,
        frame_bytes: int,
        on_commit: Callable[[Committed, int], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        super().__init__(name="audit-writer", daemon=True)
        self._store = store
        self._frame_bytes = frame_bytes
        self._on_commit = on_commit
        self._on_fatal = on_fatal
        self._queue: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._carried: Batch | None = None
        self._stopping = False
        self.want_bytes = 0

    def put(self, batch: Batch) -> None:
        self._queue.put(batch)

    def stop(self) -> None:
        """Commits and publishes what is queued and ends the thread."""
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        try:
            while not (self._stopping and self._carried is None):
                batch = self._take()
                if batch is not None:
                    committed = self._store.commit(batch.entries, batch.documents, self.want_bytes)
                    if batch.then is not None:
                        batch.then()
                        committed = self._store.state(self.want_bytes)
                    self._on_commit(committed, len(batch.entries))
                self._store.publish()
            self._store.publish(force=True)
        except BaseException as error:
            self._on_fatal(error)

    def _take(self) -> Batch | None:
        """All that waits, up to one frame; None when nothing came before a publication is due."""
        first = self._carried or self._wait()
        self._carried = None
        if first is None:
            return None
        taken, room = Batch([], []), self._frame_bytes - FRAME_HEADER_BYTES
        item: Batch | None = first
        while item is not None:
            cost = sum(map(len, item.entries)) + ENTRY_HEADER_BYTES * len(item.entries)
            if cost > room:
                self._split(taken, item, room)
                return taken
            room -= cost
            taken.entries += item.entries
            taken.documents += item.documents
            if item.then is not None:
                taken.then = item.then
                return taken
            item = self._next()
        return taken

    def _split(self, taken: Batch, item: Batch, room: int) -> None:
        """Moves what fits in `room` from `item` to `taken`; the rest is carried over."""
        count = 0
        for entry in item.entries:
            room -= len(entry) + ENTRY_HEADER_BYTES
            if room < 0:
                break
            count += 1
        taken.entries += item.entries[:count]
        taken.documents += item.documents
        self._carried = Batch(item.entries[count:], [], item.then)

    def _wait(self) -> Batch | None:
        due_ns = self._store.due_in_ns()
        try:
            item = self._queue.get(timeout=None if due_ns is None else due_ns / 1e9)
        except queue.Empty:
            return None
        if item is None:
            self._stopping = True
        return item

    def _next(self) -> Batch | None:
        try:
            item = self._queue.get_nowait()
        except queue.Empty:
            return None
        if item is None:
            self._stopping = True
        return item
