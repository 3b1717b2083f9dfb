"""The log on a real disk: order, durability, what a crash may leave, what must stop a start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.substrate.audit import segments, tree
from aether.substrate.audit.note import Checkpoint, Signer, open_checkpoint
from aether.substrate.audit.room import Bounds
from aether.substrate.audit.verify import verify_log
from tests.unit.substrate.audit.audit_kit import (
    DIGEST,
    ORIGIN,
    PUBLIC_KEY,
    SIGNER,
    SMALL,
    fill,
    intent,
    open_log,
    plain,
)


def make(directory: Path, count: int, **options: int) -> Path:
    """A closed log of `count` records."""

    async def run() -> None:
        log = open_log(directory)
        await fill(log, count, **options)
        log.close()

    asyncio.run(run())
    return directory


def size_on_open(directory: Path) -> int:
    log = open_log(directory)
    log.close()
    return log.size


def last_segment(directory: Path) -> Path:
    return sorted((directory / "segments").glob("0*"))[-1]


def corrupt(directory: Path) -> AetherError:
    with pytest.raises(AetherError) as caught:
        open_log(directory)
    assert caught.value.code == "LOG_CORRUPT"
    return caught.value


def test_records_of_one_turn_share_a_frame_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path)
        indexes = [log.append(plain) for _ in range(5)]
        assert indexes == [0, 1, 2, 3, 4] and (log.size, log.durable_size) == (5, 0)
        await log.durable(4)
        await log.durable(0)
        assert [record.detail["number"] for record in log.read(1, 3)] == ["1", "2", "3"]
        assert log.read(5, 9) == []
        log.close()

    asyncio.run(run())
    data = last_segment(tmp_path).read_bytes()
    frames = list(segments.scan(data, segments.check_header(data, 0, ORIGIN), 0))
    assert [len(frame.entries) for frame in frames] == [5]


def test_proofs_checkpoints_and_growth(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path)
        await fill(log, 700)
        note, size = log.checkpoint(650)
        checkpoint = open_checkpoint(note, SIGNER.verifier)
        assert checkpoint.size == size >= 650
        for index in (0, 255, 256, 511, 649):
            path = [_unb64(text) for text in log.prove(index, size)]
            assert tree.verify_inclusion(index, size, tree.leaf_hash(log.entry(index)), path, checkpoint.root)
        older = tree.root(300, log._store.tiles.node)
        path = [_unb64(text) for text in log.prove_growth(300, size)]
        assert tree.verify_consistency(300, size, older, checkpoint.root, path)
        for call in (lambda: log.prove(0, 10_000), lambda: log.entry(700), lambda: log.prove(5, 5)):
            with pytest.raises(AetherError) as caught:
                call()
            assert caught.value.code == "NOT_FOUND"
        with pytest.raises(AetherError, match="NOT_READY"):
            log.checkpoint(701)
        log.close()

    asyncio.run(run())
    found = verify_log(tmp_path, PUBLIC_KEY)
    assert found.ok and found.facts["checkpoint_size"] == 700


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 513])
def test_reopening_goes_on_where_it_ended(tmp_path: Path, count: int) -> None:
    make(tmp_path, count)
    make(tmp_path, 3)
    assert size_on_open(tmp_path) == count + 3
    found = verify_log(tmp_path, PUBLIC_KEY)
    assert found.ok, found.problems


def test_segments_rotate_within_their_bound_and_reopen(tmp_path: Path) -> None:
    make(tmp_path, 150, padding=9_000)
    make(tmp_path, 150, padding=9_000)
    sizes = [path.stat().st_size for path in (tmp_path / "segments").glob("0*")]
    assert len(sizes) > 8 and max(sizes) <= SMALL.segment_bytes
    found = verify_log(tmp_path, PUBLIC_KEY)
    assert found.ok and found.facts["size"] == 300
    # the frontier before the last segment comes from tiles: without them everything is read again
    for path in (tmp_path / "tile").rglob("*"):
        if path.is_file():
            path.unlink()
    assert not verify_log(tmp_path, PUBLIC_KEY).ok
    make(tmp_path, 1)
    assert verify_log(tmp_path, PUBLIC_KEY).ok


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(AetherError) as caught:
        open_log(tmp_path)
    assert caught.value.code == "ALREADY_RUNNING"
    log.close()
    log.close()
    assert size_on_open(tmp_path) == 0


def test_a_torn_last_frame_is_cut_at_every_length(tmp_path: Path) -> None:
    make(tmp_path, 20)
    kept = (tmp_path / "checkpoint").read_bytes()
    make(tmp_path, 3, batch=3)
    whole = last_segment(tmp_path).read_bytes()
    frames = list(segments.scan(whole, segments.check_header(whole, 0, ORIGIN), 0))
    start = frames[-1].offset
    # as after a crash: the published checkpoint is older than the tail
    for end in [*range(start, len(whole), 97), len(whole) - 1]:
        last_segment(tmp_path).write_bytes(whole[:end])
        (tmp_path / "checkpoint").write_bytes(kept)
        found = verify_log(tmp_path, PUBLIC_KEY)
        assert found.facts["torn_bytes"] == end - start and found.facts["size"] == 20
        assert size_on_open(tmp_path) == 20
    zeros = whole[:start] + bytes(len(whole) - start)
    last_segment(tmp_path).write_bytes(zeros)
    (tmp_path / "checkpoint").write_bytes(kept)
    assert size_on_open(tmp_path) == 20


def test_a_torn_frame_under_the_checkpoint_stops_the_start(tmp_path: Path) -> None:
    make(tmp_path, 21)
    path = last_segment(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    error = corrupt(tmp_path)
    assert error.details["segment"] == path.name and error.details["offset"] > 0


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_changed_byte_stops_the_start(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = make(tmp_path_factory.mktemp("log"), 40)
    path = last_segment(directory)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(whole))
    assert corrupt(directory).details["segment"] == path.name
    assert not verify_log(directory, PUBLIC_KEY).ok
    assert bytes(whole) == path.read_bytes()


def test_a_changed_frame_before_a_whole_one_is_never_called_torn(tmp_path: Path) -> None:
    make(tmp_path, 14)
    (tmp_path / "checkpoint").unlink()
    path = last_segment(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[200] ^= 1
    path.write_bytes(bytes(whole))
    corrupt(tmp_path)


def test_a_whole_frame_at_the_end_is_never_called_torn(tmp_path: Path) -> None:
    """Its check holds, so that it was written to its end; what it says is wrong."""
    make(tmp_path, 14)
    with last_segment(tmp_path).open("ab") as file:
        file.write(segments.encode_frame(99, [b"{}"]))
    corrupt(tmp_path)


@pytest.mark.parametrize("case", ["shorter", "forked", "other-key", "no-segments", "garbage"])
def test_a_log_that_is_not_its_checkpoints_stops_the_start(tmp_path: Path, case: str) -> None:
    make(tmp_path, 30)
    checkpoint = tmp_path / "checkpoint"
    if case == "shorter":
        checkpoint.write_text(SIGNER.sign(Checkpoint(ORIGIN, 31, bytes(32)).text()))
    elif case == "forked":
        checkpoint.write_text(SIGNER.sign(Checkpoint(ORIGIN, 30, bytes(32)).text()))
    elif case == "other-key":
        checkpoint.write_text(Signer(ORIGIN, bytes(32)).sign(Checkpoint(ORIGIN, 30, bytes(32)).text()))
    elif case == "no-segments":
        last_segment(tmp_path).unlink()
    else:
        checkpoint.write_bytes(b"\xff")
    corrupt(tmp_path)


def test_a_missing_segment_stops_the_start(tmp_path: Path) -> None:
    make(tmp_path, 150, padding=9_000)
    found = sorted((tmp_path / "segments").glob("0*"))
    for tile in (tmp_path / "tile").rglob("*"):
        if tile.is_file():
            tile.unlink()
    found[1].unlink()
    corrupt(tmp_path)


def test_documents(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path)
        digest = log.store_document(b'{"a":1}')
        assert digest == digest_bytes(b'{"a":1}') == log.store_document(b'{"a":1}')
        await log.durable(log.append(plain))
        assert log.document(digest) == b'{"a":1}'
        for bad, code in ((DIGEST, "NOT_FOUND"), ("../../etc/passwd", "BAD_ID")):
            with pytest.raises(AetherError) as caught:
                log.document(bad)
            assert caught.value.code == code
        next((tmp_path / "documents").rglob(digest[7:])).write_bytes(b"changed")
        with pytest.raises(AetherError, match="LOG_CORRUPT"):
            log.document(digest)
        with pytest.raises(AetherError, match="TOO_LARGE"):
            log.store_document(bytes(2 << 20))
        log.close()

    asyncio.run(run())


def test_a_refused_record_takes_no_index(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path)
        with pytest.raises(AetherError):
            log.append(lambda index: replace(plain(index), principal="x" * 70_000))
        with pytest.raises(ValueError, match="made for index"):
            log.append(lambda index: plain(index + 1))
        assert log.append(plain) == 0
        await log.durable(0)
        log.close()
        with pytest.raises(AetherError, match="UNAVAILABLE"):
            log.append(plain)

    asyncio.run(run())


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_failed_write_ends_it_and_nothing_more_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    async def run() -> None:
        fatal: list[BaseException] = []
        log = open_log(tmp_path, on_fatal=fatal.append)
        await fill(log, 3)

        def fail(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, call, fail)
        index = log.append(plain)
        with pytest.raises(AetherError, match="Input/output"):
            await asyncio.wait_for(log.durable(index), 5)
        monkeypatch.undo()
        assert [type(error) for error in fatal] == [OSError]
        assert log.durable_size == 3
        with pytest.raises(AetherError, match="UNAVAILABLE"):
            log.append(plain)
        log.close()

    asyncio.run(run())
    assert size_on_open(tmp_path) in (3, 4)


def test_the_checkpoint_is_published_within_a_second_or_so(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path)
        await fill(log, 3)
        await fill(log, 2)
        for _ in range(40):
            note = (tmp_path / "checkpoint").read_text()
            if open_checkpoint(note, SIGNER.verifier).size == 5:
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("the checkpoint was not published")
        await asyncio.sleep(0.05)  # the file is there a moment before the writer says so
        assert log.checkpoint(0) == (note, 5)
        log.close()

    asyncio.run(run())


def test_many_submitters(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path, bounds=Bounds())

        async def submit() -> list[int]:
            mine = []
            for _ in range(20):
                mine.append(log.append(intent))
                await log.durable(mine[-1])
                assert log.durable_size > mine[-1]
            return mine

        got = await asyncio.gather(*(submit() for _ in range(50)))
        assert sorted(index for mine in got for index in mine) == list(range(1000))
        log.close()

    asyncio.run(run())
    found = verify_log(tmp_path, PUBLIC_KEY)
    # the intents name a policy that is not kept here; nothing else may be wrong
    assert {problem.code for problem in found.problems} == {"DOCUMENT_MISSING"}


ROOT = Path(__file__).parents[4]
KILLED = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from tests.unit.substrate.audit.audit_kit import open_log, plain
    async def run():
        log = open_log(Path(sys.argv[1]))
        print("start", log.size, flush=True)
        while True:
            last = [log.append(plain) for _ in range(3)][-1]
            await log.durable(last)
            print(last, flush=True)
    asyncio.run(run())
    """
)


@pytest.mark.skipif(not os.access(sys.executable, os.X_OK), reason="this user may not execute the interpreter")
def test_killed_at_any_moment_it_keeps_every_acknowledged_record(tmp_path: Path) -> None:
    acknowledged = -1
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        )
        assert process.stdout is not None
        start = process.stdout.readline().split()
        assert int(start[1]) > acknowledged
        for _ in range(5 + 23 * round_):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        acknowledged = max([acknowledged, *(int(line) for line in rest[:-1] if line)])
    assert size_on_open(tmp_path) > acknowledged
    found = verify_log(tmp_path, PUBLIC_KEY)
    assert found.ok, found.problems


def _unb64(text: str) -> bytes:
    import base64

    return base64.b64decode(text)
