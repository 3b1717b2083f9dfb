"""A good log verifies; whatever is done to it without the key is seen, by name and place."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.second_verifier import independent_writer as writer
from tests.conformance.second_verifier.independent_writer import World
from tools import aether_verify as verifier

SEED = 20260921


def verify(directory: Path, by: writer.Signer, held: list[Path] | None = None) -> verifier.Report:
    return verifier.LogCheck(directory, verifier.read_key(by.verifier_key), held or []).run()


def failures_of(log: World, tmp_path: Path, **changed: bytes | None) -> list[dict[str, Any]]:
    return verify(log.write(tmp_path, **changed), log.by).failures


def names(failures: list[dict[str, Any]]) -> set[str]:
    return {failure["name"] for failure in failures}


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 300, 513])
def test_good_logs(count: int, tmp_path: Path) -> None:
    log = writer.world(count, per_segment=200, covered=count)
    report = verify(log.write(tmp_path), log.by)
    assert report.failures == []
    assert (report.facts["size"], report.facts["entries"], report.facts["unchecked"]) == (count, count, [])


def test_empty_log(tmp_path: Path) -> None:
    log = writer.world(0, per_segment=1, covered=0)
    assert failures_of(log, tmp_path) == []


def test_more_entries_than_the_checkpoint_covers(tmp_path: Path) -> None:
    log = writer.world(300, per_segment=100, covered=256)
    report = verify(log.write(tmp_path), log.by)
    assert report.failures == []
    assert (report.facts["size"], report.facts["entries"], report.facts["entries_unproven"]) == (256, 300, 44)


@pytest.mark.parametrize("which", ["small", "large"])
def test_any_flipped_byte_is_seen(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    log: World = request.getfixturevalue(which)
    log.write(tmp_path)
    dice = random.Random(SEED)
    for name, data in log.files.items():
        whole = len(data) < 250 and which == "small"
        positions = range(len(data)) if whole else dice.sample(range(len(data)), min(len(data), 40))
        for position in positions:
            bad = bytearray(data)
            bad[position] ^= dice.randrange(1, 256)
            (tmp_path / name).write_bytes(bad)
            failures = verify(tmp_path, log.by).failures
            assert any(failure["file"] == name for failure in failures), (name, position, bad[position], failures)
        (tmp_path / name).write_bytes(data)
    assert verify(tmp_path, log.by).failures == []


def test_flips_are_placed(small: World, tmp_path: Path) -> None:
    name = "segments/" + "0" * 20
    data = small.files[name]
    at = data.index(small.entries[2])
    bad = data[: at + 5] + b"!" + data[at + 6 :]
    found = failures_of(small, tmp_path, **{name: bad})
    frame = data.rindex(b"AEF1", 0, at)
    assert {"name": "FRAME_BAD", "file": name, "index": 1, "offset": frame}.items() <= found[0].items()
    assert names(found) == {"FRAME_BAD", "LOG_SHORT"}


def test_any_missing_file_is_seen(large: World, tmp_path: Path) -> None:
    expected = {"segments": {"SEGMENT_MISSING", "LOG_SHORT"}, "tile": {"TILE_MISSING"}}
    expected |= {"documents": {"DOCUMENT_MISSING"}, "checkpoint": {"CHECKPOINT_MISSING"}}
    log = large.write(tmp_path)
    for name, data in large.files.items():
        (log / name).unlink()
        found = names(verify(log, large.by).failures)
        assert found and found <= expected[name.split("/")[0]], name
        (log / name).write_bytes(data)


def test_truncation(small: World, tmp_path: Path) -> None:
    small.write(tmp_path)
    for name in (name for name in small.files if name.startswith("segments/")):
        data = small.files[name]
        for length in random.Random(SEED).sample(range(len(data)), 60):
            (tmp_path / name).write_bytes(data[:length])
            found = names(verify(tmp_path, small.by).failures)
            assert found & {"LOG_SHORT", "FRAME_BAD", "SEGMENT_HEADER", "SEGMENT_MISSING"}, (name, length)
        (tmp_path / name).write_bytes(data)


def test_torn_tail_is_mentioned(tmp_path: Path) -> None:
    log = writer.world(23, per_segment=99, covered=20)
    name = "segments/" + "0" * 20
    data = log.files[name]
    last = data.rindex(b"AEF1")
    first = struct.unpack_from(">Q", data, last + 4)[0]
    assert first >= log.covered, "the last frame is not covered"
    for torn in (data[:-1], data[: last + 10], data[:last] + bytes(100), data[:-1] + b"\0"):
        report = verify(log.write(tmp_path, **{name: torn}), log.by)
        assert report.failures == []
        assert (report.facts["torn_bytes"], report.facts["entries"]) == (len(torn) - last, first)


def test_torn_is_not_damaged(tmp_path: Path) -> None:
    log = writer.world(23, per_segment=99, covered=10)
    name = "segments/" + "0" * 20
    data = log.files[name]
    last = data.rindex(b"AEF1")
    before = data.rindex(b"AEF1", 0, last)
    followed = data[: before + 30] + b"\xff" + data[before + 31 :]
    found = failures_of(log, tmp_path / "a", **{name: followed})
    assert [(each["name"], each["offset"]) for each in found] == [("FRAME_BAD", before)]
    covered = writer.world(23, per_segment=99, covered=23)
    found = failures_of(covered, tmp_path / "b", **{name: data[:-1]})
    assert ("FRAME_BAD", last) in [(each["name"], each["offset"]) for each in found]
    again = data + data[last:]
    found = failures_of(log, tmp_path / "c", **{name: again})
    assert [(each["name"], each["offset"]) for each in found] == [("FRAME_BAD", len(data))]


def rebuilt(log: World, entries: list[bytes]) -> World:
    """What somebody without the key can write: everything but the signature."""
    files = writer.segments(entries, 13) | writer.tiles(entries)
    kept = {name: data for name, data in log.files.items() if name.split("/")[0] in ("documents", "checkpoint")}
    return World(files | kept, entries, len(entries), log.by)


def renumbered(entries: list[bytes]) -> list[bytes]:
    return [writer.canonical(json.loads(entry) | {"log_index": at}) for at, entry in enumerate(entries)]


REWRITES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], set[str]]] = {
    "swapped": (lambda e: [*e[:9], e[10], e[9], *e[11:]], {"ENTRY_INDEX", "ROOT_MISMATCH"}),
    "swapped, renumbered": (lambda e: renumbered([*e[:3], e[6], e[4], e[5], e[3], *e[7:]]), {"ROOT_MISMATCH"}),
    "dropped": (lambda e: e[:9] + e[10:], {"ENTRY_INDEX", "LOG_SHORT"}),
    "dropped, renumbered": (lambda e: renumbered(e[:9] + e[10:]), {"LOG_SHORT"}),
    "cut": (lambda e: e[:-1], {"LOG_SHORT"}),
    "doubled": (lambda e: [*e[:9], e[8], *e[9:]], {"ENTRY_INDEX", "ROOT_MISMATCH", "TILE_MISSING"}),
    "changed": (lambda e: [*e[:9], e[9].replace(b"access.denied", b"node.stopped"), *e[10:]], {"ROOT_MISMATCH"}),
}


@pytest.mark.parametrize("how", REWRITES)
def test_rewriting_without_the_key(how: str, small: World, tmp_path: Path) -> None:
    change, expected = REWRITES[how]
    assert names(failures_of(rebuilt(small, change(small.entries)), tmp_path)) >= expected - {"TILE_MISSING"}


def test_swapped_files(large: World, tmp_path: Path) -> None:
    one, two = sorted(name for name in large.files if name.startswith("segments/"))
    found = failures_of(large, tmp_path, **{one: large.files[two], two: large.files[one]})
    assert [each["file"] for each in found if each["name"] == "SEGMENT_HEADER"] == [one, two]


def test_foreign_keys(small: World, tmp_path: Path) -> None:
    other, renamed = writer.signer(2), writer.signer(1, "aether/other/1")
    log = small.write(tmp_path)
    assert names(verify(log, other).failures) == {"NOTE_SIGNATURE"}
    assert names(verify(log, renamed).failures) >= {"NOTE_SIGNATURE", "CHECKPOINT_ORIGIN", "SEGMENT_HEADER"}
    foreign = writer.checkpoint(small.entries, other)
    assert names(failures_of(small, tmp_path, checkpoint=foreign.encode())) == {"NOTE_SIGNATURE"}
    lookalike = foreign.replace(other.line(foreign.split("\n\n")[0] + "\n"), "") + small.by.line("another text\n")
    assert names(failures_of(small, tmp_path, checkpoint=lookalike.encode())) == {"NOTE_SIGNATURE"}


def test_other_signatures_are_ignored_and_a_bad_own_one_is_not(small: World, tmp_path: Path) -> None:
    note = small.files["checkpoint"].decode()
    witness = writer.signer(3, "witness.example").line("whatever\n")
    assert failures_of(small, tmp_path, checkpoint=(note + witness).encode()) == []
    bad = note + small.by.line("another text\n")
    assert names(failures_of(small, tmp_path, checkpoint=bad.encode())) == {"NOTE_SIGNATURE"}


@pytest.mark.parametrize(
    "text",
    [
        "{o}\n023\n{r}\n",
        "{o}\n23\n{r}\nmore\n",
        "{o}\n23\n",
        "{o}\n23\n{r}=\n",
        "{o}\n+23\n{r}\n",
        "{o}\n23\n{z}\n",
        "{o}\r\n23\n{r}\n",
    ],
)
def test_checkpoint_spelling(text: str, small: World, tmp_path: Path) -> None:
    root = small.files["checkpoint"].decode().split("\n")[2]
    loose = root[:-2] + chr(ord(root[-2]) + 1) + "="
    note = small.by.note(text.format(o=writer.ORIGIN, r=root, z=loose))
    assert "NOTE_FORMAT" in names(failures_of(small, tmp_path, checkpoint=note.encode()))


def test_truncation_by_the_key_holder_shows_against_a_held_checkpoint(small: World, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.write_bytes(small.files["checkpoint"])
    cut = writer.world(20, per_segment=13, covered=20)
    assert failures_of(cut, tmp_path / "cut") == [], "by itself it looks good"
    report = verify(tmp_path / "cut", cut.by, [held])
    assert [(each["name"], each["file"], each["index"]) for each in report.failures] == [("LOG_SHORT", str(held), 20)]
    changed = writer.records(30)
    changed[8]["state"] = "failed"
    other = writer.world(30, per_segment=13, covered=30, made=changed)
    assert names(verify(other.write(tmp_path / "other"), other.by, [held]).failures) == {"ROOT_MISMATCH"}
    grown = writer.world(30, per_segment=13, covered=30)
    assert verify(grown.write(tmp_path / "grown"), grown.by, [held]).failures == []


def test_a_held_checkpoint_never_stands_in_for_the_published_one(
    small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not when it goes by the same name."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoint").write_bytes(small.files["checkpoint"])
    longer = writer.world(30, per_segment=13, covered=30).files["checkpoint"]
    report = verify(small.write(tmp_path / "log", checkpoint=longer), small.by, [Path("checkpoint")])
    assert "LOG_SHORT" in names(report.failures)


def test_a_record_in_the_wrong_place_or_form(tmp_path: Path) -> None:
    made = writer.records(12)
    made[4]["log_index"] = 5
    made[9]["surprise"] = 1
    made[10]["time"] = "2026-13-21T13:33:20.123456Z"
    log = writer.world(12, per_segment=99, covered=12, made=made)
    found = [(each["name"], each["index"]) for each in failures_of(log, tmp_path)]
    assert found == [("ENTRY_INDEX", 4), ("ENTRY_SCHEMA", 9), ("ENTRY_SCHEMA", 10)]


def test_tiles(large: World, tmp_path: Path) -> None:
    name = "tile/0/000"
    bad = bytearray(large.files[name])
    bad[32 * 77 + 3] ^= 1
    found = failures_of(large, tmp_path, **{name: bytes(bad)})
    assert [(each["name"], each["file"], each["index"], each["offset"]) for each in found] == [
        ("TILE_MISMATCH", name, 77, 32 * 77 + 3)
    ]
    for change in (large.files[name][:-1], large.files[name] + b"\0", b""):
        assert names(failures_of(large, tmp_path, **{name: change})) == {"TILE_MISMATCH"}
    partial, wider = "tile/entries/001.p/44", "tile/entries/001.p/45"
    log = large.write(tmp_path, **{name: large.files[name], wider: large.files[partial] + b"\0\1x"})
    (log / partial).unlink()
    assert verify(log, large.by).failures == [], "a wider partial tile stands in"
    (log / wider).rename(log / "tile/entries/001")
    assert verify(log, large.by).failures == [], "so does the full one"
    bundle = bytearray((log / "tile/entries/001").read_bytes())
    bundle[1] ^= 1
    (log / "tile/entries/001").write_bytes(bundle)
    assert [each["index"] for each in verify(log, large.by).failures] == [256]


def test_documents(small: World, tmp_path: Path) -> None:
    stranger = {"documents/sha256/ab/" + "ab" * 32: b"x", "documents/readme": b"y", "documents/sha256/ab/z.tmp": b"z"}
    found = failures_of(small, tmp_path, **stranger)
    assert sorted(each["file"] for each in found) == sorted(list(stranger)[:2])
    assert names(found) == {"DOCUMENT_MISMATCH"}


def test_what_no_check_looked_at_is_listed(small: World, tmp_path: Path) -> None:
    more = {"segments/spare-1": bytes(9), "checkpoint.tmp": b"", "tile/0/000.p/5": b"", "lock": b""}
    report = verify(small.write(tmp_path, **more), small.by)
    assert report.failures == []
    assert report.facts["unchecked"] == ["checkpoint.tmp", "segments/spare-1", "tile/0/000.p/5"]


@pytest.mark.parametrize(
    ("number", "width", "expected"), [(5, 0, "005"), (1234067, 0, "x001/x234/067"), (999, 7, "999.p/7")]
)
def test_tile_paths(number: int, width: int, expected: str) -> None:
    assert verifier.tile_path("0", number, width) == f"tile/0/{expected}"
