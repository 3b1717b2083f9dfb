"""Events as text, their files and bounds, the ring buffer, and the reader in the authority."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.activity import ActivityEvent, Trace
from aether.contract.errors import AetherError
from aether.contract.limits import EVENTS_HEAD_BYTES_MAX, EVENTS_READ_BYTES_MAX, EVENTS_TAIL_BYTES_MAX
from aether.spawner import eventlog
from aether.spawner.linux import seccomp
from aether.spawner.linux.bpf import layout
from aether.spawner.linux.bpf.ring import Ring
from aether.spawner.linux.bpf.syscalls import names
from aether.substrate.cells.activity import ActivityLogs

NAME = "cell_1"


def raw(kind: int, comm: bytes = b"sh", path: bytes | None = None, **fields: int) -> bytes:
    """An event as the kernel writes it."""
    order = ("host_pid", "pid", "parent", "value", "si_code", "sender_host", "sender")
    numbers = [fields.get(name, 0) for name in order]
    head = layout.EVENT.pack(5_000, NAME.encode(), fields.get("dropped", 0), kind, *numbers, comm, b"kill\0garbage")
    return head if path is None else head + path.ljust(layout.PATH_BYTES, b"\0")


def shown(data: bytes) -> ActivityEvent:
    text = eventlog.event_line(layout.read_event(data), epoch_us=1_000)
    assert text.endswith(b"\n") and text.count(b"\n") == 1
    return msgspec.json.decode(text, type=ActivityEvent)


def test_events_as_text() -> None:
    event = shown(raw(layout.EXEC, path=b"/bin/ls\0old bytes", host_pid=77, pid=3, parent=2))
    assert (event.time_us, event.kind, event.pid, event.ppid, event.host_pid) == (1_005, "exec", 3, 2, 77)
    assert (event.path, event.comm, event.code, event.signal, event.sender) == ("/bin/ls", "sh", None, None, None)
    assert (shown(raw(layout.EXIT, value=3 << 8)).code, shown(raw(layout.EXIT, value=3 << 8)).signal) == (3, None)
    assert (shown(raw(layout.EXIT, value=0x80 | 11)).code, shown(raw(layout.EXIT, value=0x80 | 11)).signal) == (
        None,
        11,
    )
    sent = shown(raw(layout.SIGNAL, value=10, sender=4))
    assert (sent.signal, sent.sender, sent.sender_pid, sent.sender_comm) == (10, "process", 4, "kill")
    assert shown(raw(layout.SIGNAL, value=10, sender_host=99)).sender == "outside"
    assert shown(raw(layout.SIGNAL, value=9, si_code=0x80)).sender == "kernel"
    assert shown(raw(layout.OOM, pid=5)).kind == "oom"


@given(st.binary(max_size=16))
def test_no_name_of_a_process_leaves_its_field(comm: bytes) -> None:
    event = shown(raw(layout.EXEC, comm=comm, path=comm))
    for text in (event.comm, event.path):
        assert text is not None and text.isprintable()
    assert event.kind == "exec" and "\x1b" not in (event.comm or "")


def test_control_characters_are_escaped() -> None:
    assert eventlog.shown(b"\x1b]0;owned\x07") == "\\x1b]0;owned\\x07"
    assert eventlog.shown("\u202egnp.exe".encode()) == "\\u202egnp.exe"
    assert eventlog.shown(b"\xff\xfe") == "\\xff\\xfe" and eventlog.shown("größe".encode()) == "größe"


@given(st.binary(max_size=300))
def test_only_events_of_the_right_size_are_read(data: bytes) -> None:
    if len(data) in (layout.EVENT_BYTES, layout.EXEC_BYTES):
        layout.read_event(data)
        return
    with pytest.raises(ValueError, match="cannot read an event"):
        layout.read_event(data)


def test_a_trace_is_counted_and_in_order() -> None:
    area = bytearray(layout.TRACE_BYTES)
    struct.pack_into("<Q", area, 257 * 8, 300)
    struct.pack_into("<Q", area, (layout.CALLS_MAX - 1) * 8, 2)
    for order in (258, 257, 3):  # a ring that has wrapped: the highest numbers are the latest
        at = layout.LAST_AT + (order - 1) % layout.LAST_CALLS * layout.CALL_BYTES
        layout.CALL.pack_into(area, at, order, order * 1000, 5, 6, 257, 1, 2, 1 << 63, b"a\x1bb")
    document = eventlog.trace_document(layout.read_trace(bytes(area)), "x86_64", 5000, 0)
    trace = msgspec.json.decode(document, type=Trace)
    assert trace.total == 302 and [(c.name, c.count) for c in trace.calls] == [("openat", 300), ("(others)", 2)]
    assert [call.time_us for call in trace.last] == [3, 257, 258]
    assert trace.last[0].arguments == ("0x1", "0x2", "0x8000000000000000") and trace.last[0].comm == "a\\x1bb"


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_names_agree_with_the_reviewed_profile(arch: str) -> None:
    table = names(arch)
    for name, row in {**seccomp.REFUSED, **seccomp.CHECKED}.items():
        number = getattr(row, arch)
        assert number is None or table.get(number) == name
    assert max(table) == seccomp.REVIEWED_MAX and names("riscv64") == {}


# ---- files


class Files:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.writer, self.reader = eventlog.EventLogs(self.directory), ActivityLogs(path)

    def read(self, cursor: int = 0, alive: Any = None) -> list[bytes]:
        async def collect() -> bytes:
            return b"".join([chunk async for chunk in self.reader.read(NAME, cursor, alive)])

        return asyncio.run(collect()).splitlines(keepends=True)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    made = Files(tmp_path)
    yield made
    os.close(made.directory)


def numbered(count: int) -> bytes:
    return eventlog.line(time_us=count, kind="exec", pid=count, comm="x" * 15, path="/" + "p" * 100)


def test_written_and_read(files: Files) -> None:
    lines = [numbered(number) for number in range(2_000)]
    assert sum(map(len, lines)) > 2 * EVENTS_READ_BYTES_MAX  # several pages
    for start in range(0, len(lines), 100):
        assert files.writer.append(NAME, b"".join(lines[start : start + 100]))
    assert files.read() == lines
    assert files.read(len(lines[0])) == lines[1:]
    assert files.read(1 << 40) == [] and ActivityLogs(files.path).page("cell_2", 0).data == b""
    assert (files.path / NAME / "events.jsonl").stat().st_mode & 0o777 == 0o640


def test_follow_ends_with_the_cell(files: Files) -> None:
    files.writer.append(NAME, numbered(1) + eventlog.line(kind="ended", count=0))
    files.writer.append(NAME, numbered(2))
    assert len(files.read(alive=lambda: True)) == 2


def test_follow_waits_for_what_comes_and_gives_up_on_the_dead(files: Files) -> None:
    files.writer.append(NAME, numbered(1))
    asked = iter([True, True, False])

    def alive() -> bool:
        living = next(asked, False)
        if living:
            files.writer.append(NAME, numbered(2))
        return living

    assert len(files.read(alive=alive)) == 3


def test_a_long_log_is_bounded_and_says_where_it_goes_on(files: Files) -> None:
    size, written = len(numbered(10_000_000)), 0
    while written < 3 * (EVENTS_HEAD_BYTES_MAX + EVENTS_TAIL_BYTES_MAX):
        batch = b"".join(numbered(10_000_000 + written // size + number) for number in range(100))
        assert files.writer.append(NAME, batch)
        written += len(batch)
    found = (files.path / NAME / "events.jsonl").stat()
    assert found.st_size == written
    bound = EVENTS_HEAD_BYTES_MAX + EVENTS_TAIL_BYTES_MAX + eventlog.PUNCH_STEP_BYTES
    assert found.st_blocks * 512 <= bound + 64 * 1024
    lines = files.read()
    assert all(b"\0" not in line for line in lines)
    events = [msgspec.json.decode(line, type=ActivityEvent) for line in lines]
    [gap] = [event for event in events if event.kind == "gap"]
    assert events[0].pid == 10_000_000 and events[-1].pid == 10_000_000 + written // size - 1
    place = events.index(gap)
    assert [e.pid for e in events[:place]] == list(range(10_000_000, 10_000_000 + place))
    assert gap.count is not None and files.read(gap.count) == lines[place + 1 :]
    assert files.read(EVENTS_HEAD_BYTES_MAX + 10 * 4096)[0] == lines[place]


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a\0b", "x" * 65])
def test_only_names_of_cells(files: Files, name: str) -> None:
    assert files.writer.append(name, b"{}\n") is False
    with pytest.raises(AetherError):
        files.reader.page(name, 0)


def test_a_link_in_place_of_the_file_is_not_followed(files: Files) -> None:
    (files.path / NAME).mkdir()
    (files.path / NAME / "events.jsonl").symlink_to(files.path / "elsewhere")
    assert files.writer.append(NAME, b"{}\n") is False and not (files.path / "elsewhere").exists()


def test_a_trace_is_replaced_whole(files: Files) -> None:
    with pytest.raises(AetherError, match="not kept"):
        files.reader.trace(NAME)
    empty = layout.read_trace(bytes(layout.TRACE_BYTES))
    for duration_ms in (1, 2):
        files.writer.replace(NAME, eventlog.TRACE, eventlog.trace_document(empty, "x86_64", duration_ms, 0))
        assert files.reader.trace(NAME).duration_ms == duration_ms
    assert [path.name for path in (files.path / NAME).iterdir()] == ["trace.json"]
    (files.path / NAME / "trace.json").write_text(json.dumps({"surprise": 1}))
    with pytest.raises(AetherError, match="not kept"):
        files.reader.trace(NAME)


# ---- the ring buffer


def ring_file(size: int, records: list[tuple[int, bytes]]) -> tuple[int, Any]:
    """A file with the ring's layout; `records` are (flags, data)."""
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 2 * mmap.PAGESIZE + 2 * size)
    position = 0
    for flags, data in records:
        record = struct.pack("<II", len(data) | flags, 0) + data
        os.pwrite(fd, record.ljust(-(-len(record) // 8) * 8, b"\0"), 2 * mmap.PAGESIZE + position)
        position += -(-len(record) // 8) * 8
    os.pwrite(fd, struct.pack("<Q", position), mmap.PAGESIZE)
    return fd, position


def test_ring_skips_the_discarded_and_stops_at_the_unfinished() -> None:
    busy, discarded = 1 << 31, 1 << 30
    fd, _ = ring_file(4096, [(0, b"one"), (discarded, b"no"), (0, b"two"), (busy, b"three"), (0, b"four")])
    ring = Ring(fd, 4096)
    assert list(ring.take(1)) == [b"one"]
    assert list(ring.take(10)) == [b"two"]
    os.pwrite(fd, struct.pack("<I", 5), 2 * mmap.PAGESIZE + 48)  # the unfinished one is written now
    assert list(ring.take(10)) == [b"three", b"four"] and list(ring.take(10)) == []
    ring.close()
    os.close(fd)
