"""Files of the keeper and the observer, read by the authority: whatever is in them, a reader gets a bounded page."""

from __future__ import annotations

import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.contract.limits import EVENTS_READ_BYTES_MAX
from aether.substrate.cells import logs
from aether.substrate.cells.activity import EVENTS, TRACE, ActivityLogs
from aether.substrate.cells.logs import ExecLog, Stream

CELL, EXEC = "cell-1", "exec-1"
U64 = st.integers(0, 20) | st.sampled_from([1 << 20, (1 << 53) - 1, 1 << 62, (1 << 63) + 1, (1 << 64) - 1])
U32 = st.integers(0, 20) | st.sampled_from([1 << 20, (1 << 32) - 1])
HEADERS = st.tuples(st.integers(0, 3), st.just(0), U64, U64, U64, U64, U64, U64, U64, U64)
RECORDS = st.tuples(st.just(0), st.just(0), U64, U64, U32, st.integers(0, 2))
PAGE = 64


def index(header: tuple[int, ...], records: list[tuple[int, ...]]) -> bytes:
    """An index with a header whose checksum holds, as a keeper that was taken over can write one."""
    body = logs.HEADER.pack(*header)
    head = logs.MAGIC + struct.pack("<I", zlib.crc32(body)) + body
    return head.ljust(logs.HEADER_BYTES, b"\0") + b"".join(logs.RECORD.pack(*record) for record in records)


@settings(max_examples=250, deadline=None)
@given(
    st.builds(index, HEADERS, st.lists(RECORDS, max_size=6)) | st.binary(max_size=300),
    st.sampled_from(["stdout", "stderr", "all"]),
    st.integers(0, 40) | st.just((1 << 53) - 1),
)
def test_any_index_gives_bounded_pages(raw: bytes, stream: Stream, cursor: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{EXEC}.index").write_bytes(raw)
        for name in logs.STREAMS:
            (Path(folder) / f"{EXEC}.{name}").write_bytes(name.encode() * 10)
        page = ExecLog(Path(folder), EXEC).read(stream, cursor, PAGE)
    assert len(page.data) <= PAGE
    assert page.cursor >= cursor and page.dropped_bytes >= 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.binary(max_size=30) | st.sampled_from([b"\n", b"\0" * 5, b'{"kind":"ended"}\n', b'{"kind":"exec"}\n']),
        max_size=8,
    ).map(b"".join),
    st.integers(0, 60) | st.just((1 << 53) - 1),
)
def test_any_events_are_whole_lines_from_where_was_asked(raw: bytes, cursor: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CELL).mkdir()
        (Path(folder) / CELL / EVENTS).write_bytes(raw)
        page = ActivityLogs(Path(folder)).page(CELL, cursor)
    assert len(page.data) <= EVENTS_READ_BYTES_MAX + 4_096
    assert page.cursor >= cursor and b"\0" not in page.data
    assert not page.data or page.data.endswith(b"\n")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.sampled_from([b'{"cell_id":"\xff"}', b'{"x":' * 5_000, b"[" * 200_000]))
def test_any_trace_is_one_or_was_not_kept(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CELL).mkdir()
        (Path(folder) / CELL / TRACE).write_bytes(raw)
        with suppress(AetherError):
            ActivityLogs(Path(folder)).trace(CELL)
