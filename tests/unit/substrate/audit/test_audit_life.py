"""A log over its life: pruned, killed, under new keys. Every checkpoint that was ever published stays a part of it."""

from __future__ import annotations

import asyncio
import base64
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.canonical import canonical_record
from aether.contract.errors import AetherError
from aether.contract.ids import Digest
from aether.contract.records import Record
from aether.substrate.audit import pruning, tree
from aether.substrate.audit.export import Export
from aether.substrate.audit.export_rules import check_export
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import Signer, open_checkpoint
from aether.substrate.audit.quorum import Quorum
from aether.substrate.audit.recover import Recovered
from aether.substrate.audit.tiles import BUNDLES, tile_path
from aether.substrate.audit.verify import verify_log
from tests.unit.substrate.audit.audit_kit import NODE, SMALL, fatal, plain
from tools import aether_verify


def signer_of(epoch: int) -> Signer:
    return Signer(f"aether/{NODE}/{epoch}", bytes([epoch]) * 32)


def opening(former: Signer) -> Callable[[int, Recovered, Digest], bytes]:
    def make(index: int, before: Recovered, digest: Digest) -> bytes:
        detail = {
            "digest": digest,
            "previous_key": str(former.verifier),
            "previous_size": str(before.checkpoint.size),
            "previous_root": base64.b64encode(before.checkpoint.root).decode(),
        }
        return canonical_record(
            Record(type="audit.epoch", log_index=index, time="2026-11-21T02:10:00.123456Z", node_id=NODE, detail=detail)
        )

    return make


@dataclass
class Life:
    """One log directory and all that it published."""

    directory: Path
    epoch: int = 1
    published: list[str] = field(default_factory=list)

    def open(self) -> AuditLog:
        former = signer_of(self.epoch - 1) if self.epoch > 1 else None
        log = AuditLog.open(
            self.directory,
            signer_of(self.epoch),
            signer_of(self.epoch).name,
            now_ns=time.monotonic_ns,
            on_fatal=fatal,
            bounds=SMALL,
            former=former.verifier if former else None,
            opening=opening(former) if former else None,
        )
        self.keep()
        return log

    def keep(self) -> None:
        self.published.append((self.directory / "checkpoint").read_text())

    def run(self, work: Callable[[AuditLog], object]) -> None:
        async def turn() -> None:
            log = self.open()
            result = work(log)
            if asyncio.iscoroutine(result):
                await result
            log.close()
            self.keep()

        asyncio.run(turn())

    def append(self, count: int, padding: int = 0) -> None:
        async def work(log: AuditLog) -> None:
            for number in range(count):
                last = log.append(lambda index: plain(index, padding=padding))
                if number % 60 == 59 or number == count - 1:
                    await log.durable(last)

        self.run(work)

    def seal(self) -> None:
        self.run(lambda log: log.seal())

    def prune(self, crash_after: int | None = None) -> int:
        """Prunes as far as it goes; `crash_after` ends it after so many removed files."""
        done: list[int] = []

        async def work(log: AuditLog) -> None:
            ends = log.ends()
            if not ends:
                return
            end = ends[-1]
            log.check_prunable(end)
            await log.durable(log.append(lambda index: pruned(index, end)))
            done.append(end)
            if crash_after is None:
                log.prune(end)
                return
            pruning.begin(self.directory, end)
            for path in [path for path in pruning.list_segments(self.directory) if int(path.name) < end][:crash_after]:
                path.unlink()

        self.run(work)
        return done[0] if done else 0

    def check(self) -> None:
        """Both verifiers, with every checkpoint ever published."""
        key = str(signer_of(self.epoch).verifier)
        mine = {f"held-{at}": note.encode() for at, note in enumerate(self.published) if self.is_current(note)}
        report = verify_log(self.directory, key, mine)
        assert report.ok, report.problems
        for note in dict.fromkeys(self.published):
            self.contains(note, key)
        self.check_second(key, mine)

    def check_second(self, key: str, held: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for name, note in held.items():
                paths.append(Path(folder) / name)
                paths[-1].write_bytes(note)
            second = aether_verify.LogCheck(self.directory, aether_verify.read_key(key.encode()), paths).run()
        assert not second.failures, second.failures

    def is_current(self, note: str) -> bool:
        return note.startswith(signer_of(self.epoch).name + "\n")

    def contains(self, note: str, key: str) -> None:
        """The log's own proof from a published checkpoint of whichever epoch to the newest one."""
        epoch = int(note.partition("\n")[0].rpartition("/")[2])
        old = open_checkpoint(note, signer_of(epoch).verifier)
        log = self.open()
        try:
            new = open_checkpoint(log.published()[0], signer_of(self.epoch).verifier)
            proof = [base64.b64decode(text) for text in log.prove_growth(old.size, new.size)] if old.size else []
            assert not old.size or tree.verify_consistency(old.size, new.size, old.root, new.root, proof)
        finally:
            log.close()


def pruned(index: int, end: int) -> Record:
    detail = {"end": str(end), "before": "2026-11-21T02:10:00.123456Z"}
    return Record(type="audit.pruned", log_index=index, time="2026-11-21T02:10:00.123456Z", node_id=NODE, detail=detail)


@pytest.fixture
def life(tmp_path: Path) -> Life:
    return Life(tmp_path / "log")


def test_a_pruned_log_verifies_and_says_what_is_gone(life: Life) -> None:
    life.append(700)
    life.seal()
    life.append(100)
    life.seal()
    life.append(400)
    end = life.prune()
    assert end == 800
    life.check()
    report = verify_log(life.directory, str(signer_of(1).verifier))
    assert report.facts["pruned"] == 800 and report.facts["size"] == 1201
    assert min(int(path.name) for path in (life.directory / "segments").glob("0*")) == 800
    assert not (life.directory / "tile/entries/002").exists() and (life.directory / "tile/0/002").exists()
    gone = (life.directory / "tile/entries").rglob("*")
    assert all(b'"number":"700"' not in path.read_bytes() for path in gone if path.is_file())

    async def work(log: AuditLog) -> None:
        assert log.first == 768
        for read in (lambda: log.entry(767), lambda: log.read(0, 5), lambda: log.bundle(0)):
            with pytest.raises(AetherError) as caught:
                read()
            assert caught.value.code == "GONE"
        assert log.read(768, 1)[0].log_index == 768
        out = Export(log, *log.checkpoint(1200), (768, 1200), True)
        entries = ((index, log.entry(index)) for index in range(768, 1200))
        lines = [out.head(), *out.entries(entries).splitlines(keepends=True), out.end()]
        assert check_export(lines, str(signer_of(1).verifier)).ok

    life.run(work)
    life.append(10)
    life.check()
    life.seal()
    life.append(300)
    life.seal()
    life.append(1)
    assert life.prune() == 1211
    life.check()


def test_a_pruning_that_nobody_recorded_is_damage(life: Life) -> None:
    life.append(600)
    life.seal()
    life.append(300)
    copy = life.directory.with_name("copy")
    shutil.copytree(life.directory, copy)
    end = pruning.ends(copy)[-1]
    pruning.begin(copy, end)
    pruning.finish(copy)
    report = verify_log(copy, str(signer_of(1).verifier))
    assert [problem.code for problem in report.problems] == ["SEGMENT_MISSING"]
    (copy / "pruned").unlink()
    with pytest.raises(AetherError, match="pruned were those below 0"):
        Life(copy).open()
    (copy / "pruned").write_text("x\n")
    with pytest.raises(AetherError, match="not a number"):
        Life(copy).open()


def test_changed_hashes_of_what_was_pruned_are_seen(life: Life) -> None:
    life.append(600)
    life.seal()
    life.append(300)
    life.prune()
    path = life.directory / "tile/0/000"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    assert "ROOT_MISMATCH" in {problem.code for problem in verify_log(life.directory, key_of(1)).problems}
    data[40] ^= 1
    path.write_bytes(data)
    first = min(int(each.name) for each in (life.directory / "segments").glob("0*"))
    kept = life.directory / tile_path(BUNDLES, first // 256)
    assert first % 256
    kept.write_bytes(kept.read_bytes().replace(b'"number":"%d"' % (first - 1), b'"number":"000"'))
    assert "TILE_MISMATCH" in {problem.code for problem in verify_log(life.directory, key_of(1)).problems}


def key_of(epoch: int) -> str:
    return str(signer_of(epoch).verifier)


def test_nothing_is_pruned_whose_hash_is_not_kept(life: Life) -> None:
    life.append(600)
    life.seal()
    life.append(300)
    path = life.directory / "tile/entries/000"
    path.write_bytes(path.read_bytes().replace(b'"number":"100"', b'"number":"101"'))

    async def work(log: AuditLog) -> None:
        with pytest.raises(AetherError) as caught:
            log.check_prunable(log.ends()[-1])
        assert caught.value.code == "LOG_CORRUPT"

    life.run(work)


def test_a_new_key_goes_on_with_the_same_tree(life: Life) -> None:
    life.append(300)
    old = (life.directory / "checkpoint").read_text()
    life.epoch = 2
    life.append(5)
    life.check()
    life.contains(old, key_of(2))
    first = life.directory / "segments" / f"{300:020d}"
    assert signer_of(2).name.encode() in first.read_bytes()[:100]
    record = None

    async def work(log: AuditLog) -> None:
        nonlocal record
        record = log.read(300, 1)[0]

    life.run(work)
    assert record is not None and record.type == "audit.epoch" and record.detail["previous_size"] == "300"
    # whoever holds the old key alone still reads the old checkpoint; the log is the new key's
    assert verify_log(life.directory, key_of(1)).problems[0].code == "NOTE_SIGNATURE"
    note = life.directory / "documents"
    path = next(path for path in note.rglob("*") if path.is_file())
    assert path.read_text() == old
    path.unlink()
    assert {problem.code for problem in verify_log(life.directory, key_of(2)).problems} == {"DOCUMENT_MISSING"}


def test_an_epoch_that_commits_to_another_history_is_broken(life: Life, tmp_path: Path) -> None:
    other = Life(tmp_path / "other")
    other.append(299)
    life.append(300)
    note = (other.directory / "checkpoint").read_text()
    real = (life.directory / "checkpoint").read_text()
    life.epoch = 2
    (life.directory / "checkpoint").write_text(note.replace("\n299\n", "\n300\n"))
    with pytest.raises(AetherError, match="LOG_CORRUPT"):
        life.open()
    (life.directory / "checkpoint").write_text(real)
    former = signer_of(1)

    def lying(index: int, before: Recovered, digest: Digest) -> bytes:
        made = opening(former)(index, before, digest)
        return made.replace(str(former.verifier).encode(), str(Signer(former.name, b"\x63" * 32).verifier).encode())

    log = AuditLog.open(
        life.directory, signer_of(2), signer_of(2).name, now_ns=time.monotonic_ns, on_fatal=fatal, bounds=SMALL,
        former=former.verifier, opening=lying,
    )  # fmt: skip
    log.close()
    assert {problem.code for problem in verify_log(life.directory, key_of(2)).problems} == {"EPOCH_BROKEN"}


def test_witnesses_are_counted_in_a_log(life: Life) -> None:
    from aether.substrate.audit.cosign import Cosigner

    life.append(300)
    witness = Cosigner("w1", b"\x09" * 32)

    async def work(log: AuditLog) -> None:
        note, size = log.published()
        text = note.partition("\n\n")[0] + "\n"
        assert log.witnessed.put(witness.key.key_id, size, note, witness.line(text, 1_790_000_000))
        assert log.checkpoint(10)[0].count("\n— ") == 2
        assert log.signed(size) == note

    life.run(work)
    quorum = Quorum.of([str(witness.key)], None)
    report = verify_log(life.directory, key_of(1), quorum=quorum)
    assert report.ok and report.facts["witnesses"] == 1 and report.facts["witnessed_size"] == 300
    other = Quorum.of([str(Cosigner("w2", b"\x08" * 32).key)], None)
    assert [p.code for p in verify_log(life.directory, key_of(1), quorum=other).problems] == ["WITNESS_QUORUM"]
    path = next((life.directory / "witnessed").iterdir())
    path.write_text(path.read_text().replace("\n300\n", "\n299\n"))
    codes = {problem.code for problem in verify_log(life.directory, key_of(1), quorum=quorum).problems}
    assert "NOTE_SIGNATURE" in codes


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 400)),
        st.tuples(st.just("seal"), st.just(0)),
        st.tuples(st.just("prune"), st.none() | st.integers(0, 2)),
        st.tuples(st.just("tear"), st.integers(1, 200)),
        st.tuples(st.just("rotate"), st.just(0)),
    ),
    min_size=3,
    max_size=9,
)


@settings(max_examples=12, deadline=None)
@given(STEPS)
def test_whatever_befalls_a_log_it_only_grows(steps: list[tuple[str, int | None]]) -> None:
    """Appends, ends of segments, prunings (also cut off by a crash), torn writes and new keys in any order."""
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder) / "log")
        life.append(300)
        for step, amount in steps:
            if step == "append":
                life.append(amount or 1)
            elif step == "seal":
                life.seal()
            elif step == "prune":
                life.prune(amount)
            elif step == "rotate":
                life.epoch += 1
                life.append(1)
            else:
                tear(life.directory, amount or 1)
        life.append(1)
        life.check()


def tear(directory: Path, count: int) -> None:
    """What a write that was cut off leaves: bytes behind the last frame."""
    with pruning.list_segments(directory)[-1].open("ab") as file:
        file.write(b"AEF1" + b"\x01" * count)
