"""Reading what the observer writes of a cell: events as whole lines from a byte offset, and the last trace.

The files are described in `aether.spawner.eventlog`; this side only reads, never blocks and never holds more than one
page. A cursor is an offset in the file. Where a long log's middle was punched out the reader goes on behind it, with
an event of kind `gap` that names the offset: whoever counts bytes to resume continues from there.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from aether.contract.activity import ActivityEvent, Trace
from aether.contract.codec import UNREADABLE
from aether.contract.errors import AetherError
from aether.contract.limits import EVENTS_READ_BYTES_MAX

EVENTS: Final = "events.jsonl"
TRACE: Final = "trace.json"
TRACE_BYTES_MAX: Final = 256 * 1024
POLL_S_MIN: Final = 0.02
POLL_S_MAX: Final = 0.25
GRACE_S: Final = 1.0
"""How long events may still come once the job is over: the observer gathers them for some milliseconds."""
_CELL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ENDED: Final = b'"kind":"ended"'


@dataclass(frozen=True, slots=True)
class Page:
    """Whole lines. `cursor` is where the next page begins; `ended`: nothing will follow."""

    data: bytes
    cursor: int
    ended: bool


class ActivityLogs:
    """The events of all cells: `logs/jobs/<cell>/events.jsonl` below `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def page(self, cell_id: str, cursor: int) -> Page:
        """At most EVENTS_READ_BYTES_MAX from `cursor` on; empty when nothing is there (yet)."""
        try:
            fd = self._open(cell_id, EVENTS)
        except FileNotFoundError:
            return Page(b"", cursor, False)
        try:
            return _page(fd, cursor)
        finally:
            os.close(fd)

    def _open(self, cell_id: str, name: str) -> int:
        if _CELL.fullmatch(cell_id) is None:
            raise AetherError("NOT_FOUND", f"cannot read the activity of {cell_id[:80]!r}: no such cell")
        return os.open(self._directory / cell_id / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    async def read(self, cell_id: str, cursor: int, alive: Callable[[], bool] | None) -> AsyncIterator[bytes]:
        """What is there from `cursor`; given `alive`, then what comes, until the cell has ended or it is not."""
        wait_s, left_s = POLL_S_MIN, GRACE_S
        while True:
            page = self.page(cell_id, cursor)
            if page.data:
                yield page.data
                wait_s = POLL_S_MIN
            moved = page.cursor != cursor
            cursor = page.cursor
            if page.ended or (not moved and alive is None) or left_s <= 0:
                return
            if not moved and alive is not None:
                await asyncio.sleep(wait_s)
                left_s = GRACE_S if alive() else left_s - wait_s
                wait_s = min(wait_s * 2, POLL_S_MAX)

    def trace(self, cell_id: str) -> Trace:
        """The last trace of the cell; raises AetherError GONE when it was not kept."""
        try:
            fd = self._open(cell_id, TRACE)
            try:
                return msgspec.json.decode(os.read(fd, TRACE_BYTES_MAX), type=Trace)
            finally:
                os.close(fd)
        except (OSError, *UNREADABLE) as error:
            raise AetherError("GONE", f"cannot read the trace of {cell_id}: it was not kept", "trace again") from error


def _page(fd: int, cursor: int) -> Page:
    data = os.pread(fd, EVENTS_READ_BYTES_MAX, cursor)
    if data.startswith(b"\0"):
        return _behind_hole(fd, cursor)
    hole = data.find(b"\0")
    whole = data[: hole if hole >= 0 else len(data)]
    end = whole.rfind(b"\n") + 1
    if end == 0 and hole >= 0:  # the head's last line was cut by the hole
        return _behind_hole(fd, cursor + hole)
    # Within a string the quotes would be escaped, so this is the line that it looks like.
    ended = whole.find(_ENDED, 0, end)
    if ended >= 0:
        end = whole.find(b"\n", ended) + 1
    return Page(whole[:end], cursor + end, ended >= 0)


def _behind_hole(fd: int, cursor: int) -> Page:
    """The gap, and where the first whole line behind it begins (lseek(2), SEEK_DATA)."""
    try:
        at = os.lseek(fd, cursor, os.SEEK_DATA)
    except OSError:  # nothing but the hole
        return Page(b"", cursor, False)
    data = os.pread(fd, EVENTS_READ_BYTES_MAX, at)
    # The hole ends on a block's border, so a line that it cut begins within the last block of it.
    start = data.find(b"\n", len(data) - len(data.lstrip(b"\0"))) + 1
    if start == 0:
        return Page(b"", cursor, False)
    return Page(gap(at + start), at + start, False)


def gap(cursor: int) -> bytes:
    """The line that stands for what is left out before `cursor`."""
    empty = dict.fromkeys(ActivityEvent.__struct_fields__)
    return msgspec.json.encode(empty | {"kind": "gap", "count": cursor}) + b"\n"
