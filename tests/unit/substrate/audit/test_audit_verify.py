"""Verification names every kind of damage; a receipt with any changed byte does not hold."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.canonical import canonical
from aether.contract.errors import AetherError
from aether.substrate.audit import segments
from aether.substrate.audit.note import Signer
from aether.substrate.audit.receipts import Receipts
from aether.substrate.audit.verify import verify_log, verify_receipt
from tests.conformance.formats.golden_maker import POLICY_TEXT
from tests.unit.substrate.audit.audit_kit import GOLDEN, PUBLIC_KEY, SIGNER, fill, open_log

KEY = (GOLDEN / "audit.pub").read_text()
RECEIPT = (GOLDEN / "receipt.json").read_bytes()
POLICY = hashlib.sha256(POLICY_TEXT).hexdigest().encode()
OTHER_KEY = str(Signer("other", b"o" * 32).verifier)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "log", tmp_path / "log")
    return tmp_path / "log"


def codes(directory: Path, key: str = KEY) -> set[str]:
    return {problem.code for problem in verify_log(directory, key).problems}


def first_segment(log: Path) -> Path:
    return log / "segments/00000000000000000000"


def rewrite_entry(log: Path, index: int, change: Callable[[bytes], bytes]) -> None:
    """Changes an entry and mends its frame's check, as one who can write the disk but not sign."""
    path = first_segment(log)
    data = path.read_bytes()
    start = int.from_bytes(data[16:18], "big") + 22
    parts = [data[:start]]
    for frame in segments.scan(data, start, 0):
        entries = [change(entry) if frame.first_index + i == index else entry for i, entry in enumerate(frame.entries)]
        parts.append(segments.encode_frame(frame.first_index, entries))
    path.write_bytes(b"".join(parts))


def test_a_changed_entry_is_named_by_its_index(log: Path) -> None:
    rewrite_entry(log, 7, lambda entry: entry.replace(b"uid:1000", b"uid:1001"))
    found = verify_log(log, KEY)
    by_code = {problem.code: problem for problem in found.problems}
    assert set(by_code) == {"ROOT_MISMATCH", "TILE_MISMATCH"}
    assert by_code["TILE_MISMATCH"].index in (0, 7)
    assert 7 in [problem.index for problem in found.problems]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda entry: entry.replace(b'"attempt":1', b'"attempt": 1'), "ENTRY_NOT_CANONICAL"),
        (lambda entry: entry.replace(b'"attempt":1,', b'"attempt":1,"b":2,'), "ENTRY_SCHEMA"),
        (lambda entry: entry.replace(b'"log_index":7', b'"log_index":8'), "ENTRY_INDEX"),
        (lambda entry: entry.replace(POLICY, b"0" * 64), "DOCUMENT_MISSING"),
        (lambda entry: entry.replace(POLICY, b"0" * 63), "ENTRY_SCHEMA"),
        (lambda entry: entry.replace(POLICY, b"F" * 64), "ENTRY_SCHEMA"),
        (lambda entry: entry.replace(b'"created_at":"', b'"created_at":"x'), "ENTRY_SCHEMA"),
        (lambda entry: entry.replace(b'"effect":"cell"', b'"effect":"magic"'), "ENTRY_SCHEMA"),
        (lambda entry: entry.replace(b'"node_id":"node_', b'"node_id":"mode_'), "ENTRY_NODE"),
    ],
)
def test_entries_that_do_not_hold(log: Path, change: Callable[[bytes], bytes], code: str) -> None:
    rewrite_entry(log, 7, change)
    assert {code, "ROOT_MISMATCH"} <= codes(log)


def damage_frame(log: Path) -> None:
    data = bytearray(first_segment(log).read_bytes())
    data[5_000] ^= 1
    first_segment(log).write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "checkpoint gone": (lambda log: (log / "checkpoint").unlink(), {"CHECKPOINT_MISSING"}),
    "checkpoint changed": (
        lambda log: (log / "checkpoint").write_text((log / "checkpoint").read_text().replace("\n301\n", "\n300\n")),
        {"NOTE_SIGNATURE"},
    ),
    "checkpoint garbage": (lambda log: (log / "checkpoint").write_text("hello\n"), {"NOTE_FORMAT"}),
    "frame": (damage_frame, {"FRAME_BAD", "SEGMENT_MISSING", "LOG_SHORT"}),
    "header": (lambda log: first_segment(log).write_bytes(b"X" * 9_000), {"SEGMENT_HEADER", "LOG_SHORT"}),
    "first segment gone": (lambda log: first_segment(log).unlink(), {"SEGMENT_MISSING", "LOG_SHORT"}),
    "last segment gone": (lambda log: sorted((log / "segments").iterdir())[-1].unlink(), {"LOG_SHORT"}),
    "tile gone": (lambda log: (log / "tile/0/000").unlink(), {"TILE_MISSING"}),
    "partial tile gone": (lambda log: (log / "tile/0/001.p/45").unlink(), {"TILE_MISSING"}),
    "tile changed": (lambda log: (log / "tile/0/000").write_bytes(bytes(8192)), {"TILE_MISMATCH"}),
    "upper tile changed": (lambda log: (log / "tile/1/000.p/1").write_bytes(bytes(32)), {"TILE_MISMATCH"}),
    "bundle short": (lambda log: (log / "tile/entries/000").write_bytes(b""), {"TILE_MISMATCH"}),
    "document changed": (
        lambda log: next((log / "documents/sha256").glob("*/*")).write_bytes(b"x"),
        {"DOCUMENT_MISMATCH"},
    ),
    "document gone": (lambda log: next((log / "documents/sha256").glob("*/*")).unlink(), {"DOCUMENT_MISSING"}),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_damage_has_its_name(log: Path, name: str) -> None:
    assert codes(log) == set()
    damage, expected = DAMAGE[name]
    damage(log)
    found = codes(log)
    assert found and found <= expected and (len(expected) > 1 or found == expected)


def test_another_key_does_not_verify(log: Path) -> None:
    assert "NOTE_SIGNATURE" in codes(log, OTHER_KEY)
    assert codes(log, "no key") == {"KEY_FORMAT"}
    assert {p.code for p in verify_receipt(RECEIPT, OTHER_KEY).problems} >= {"NOTE_SIGNATURE"}


def test_a_cut_log_shows_only_against_an_older_checkpoint(log: Path) -> None:
    # one frame per entry in the golden log: cut the last one off cleanly
    path = sorted((log / "segments").iterdir())[-1]
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(segments.FRAME_MAGIC)])
    assert codes(log) == {"LOG_SHORT"}


def test_a_log_that_grows_while_it_is_verified_is_good(tmp_path: Path) -> None:
    async def run() -> None:
        writing = open_log(tmp_path)
        await fill(writing, 300)
        await asyncio.sleep(1.2)
        await fill(writing, 300)
        assert verify_log(tmp_path, PUBLIC_KEY).ok
        writing.close()

    asyncio.run(run())
    assert verify_log(tmp_path, PUBLIC_KEY).ok


# ---- receipts


def receipt_codes(receipt: dict[str, Any] | bytes) -> set[str]:
    data = receipt if isinstance(receipt, bytes) else canonical(receipt)
    return {problem.code for problem in verify_receipt(data, KEY).problems}


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    receipt: dict[str, Any] = json.loads(RECEIPT)
    change(receipt)
    return receipt


def swap(receipt: dict[str, Any], old: str, new: str, entry: int = -1) -> None:
    receipt["entries"][entry]["entry"] = receipt["entries"][entry]["entry"].replace(old, new)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], set[str]]] = {
    "version": (lambda r: r.update(receipt_version="2.0"), {"RECEIPT_FORMAT"}),
    "unknown field": (lambda r: r.update(comment="x"), {"RECEIPT_FORMAT"}),
    "job": (lambda r: r.update(job_id="job_x"), {"ENTRY_JOB"}),
    "origin": (lambda r: r.update(origin="x"), {"CHECKPOINT_ORIGIN"}),
    "usage": (lambda r: swap(r, '"cpu_user_us":9000', '"cpu_user_us":1'), {"PROOF_INVALID"}),
    "canonical": (lambda r: swap(r, '"attempt":1', '"attempt": 1'), {"ENTRY_NOT_CANONICAL"}),
    "index": (lambda r: r["entries"][0]["proof"].update(log_index=1), {"ENTRY_INDEX", "PROOF_INVALID"}),
    "hash": (lambda r: r["entries"][0]["proof"]["hashes"].pop(), {"PROOF_INVALID"}),
    "no outcome": (lambda r: r["entries"].pop(), {"ENTRY_SEQUENCE"}),
    "no entries": (lambda r: r.update(entries=[]), {"ENTRY_SEQUENCE", "DOCUMENT_MISMATCH"}),
    "order": (lambda r: r["entries"].reverse(), {"ENTRY_SEQUENCE"}),
    "twice": (lambda r: r["entries"].insert(1, r["entries"][1]), {"ENTRY_SEQUENCE"}),
    "input": (lambda r: swap(r, '"input_hash":"sha256:', '"input_hash":"sha256:00'), {"ENTRY_SCHEMA"}),
    "document gone": (lambda r: r["documents"].popitem(), {"DOCUMENT_MISSING"}),
    "document text": (
        lambda r: r["documents"].update({next(iter(r["documents"])): "{}"}),
        {"DOCUMENT_MISMATCH"},
    ),
    "other document": (lambda r: r["documents"].update({"sha256:x": "{}"}), {"DOCUMENT_MISMATCH"}),
    "verdict": (lambda r: r.update(verdict=r["checkpoint"]), {"VERDICT_MISMATCH"}),
    "verdict note": (lambda r: r.update(verdict="x"), {"NOTE_FORMAT"}),
    "checkpoint": (lambda r: r.update(checkpoint=r["verdict"]), {"NOTE_FORMAT"}),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_changed_receipt_says_what_does_not_hold(name: str) -> None:
    change, expected = CHANGES[name]
    assert expected <= receipt_codes(changed(change))


def test_the_golden_receipt_holds() -> None:
    assert receipt_codes(RECEIPT) == set()


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_any_changed_character_of_a_receipt_is_noticed(data: st.DataObject) -> None:
    text = RECEIPT.decode()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(max_codepoint=0x17F).filter(lambda c: c != text[at]))
    assert receipt_codes((text[:at] + other + text[at + 1 :]).encode())


@given(st.binary(max_size=80))
def test_hostile_bytes_only_make_a_report(data: bytes) -> None:
    assert receipt_codes(data) == {"RECEIPT_FORMAT"}


def test_receipts_are_built_for_durable_outcomes_of_the_job_only(tmp_path: Path) -> None:
    async def run() -> None:
        log = open_log(tmp_path)
        await fill(log, 3)
        record = log.read(2, 1)[0]
        with pytest.raises(AetherError, match="not its outcome"):
            Receipts(log, SIGNER).build("job_x", record)
        log.close()

    asyncio.run(run())
