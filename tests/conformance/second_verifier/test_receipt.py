"""A receipt proves one job: whatever else is put in its place is seen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.second_verifier import independent_writer as writer
from tests.conformance.second_verifier.independent_writer import World
from tools import aether_verify as verifier

Receipt = dict[str, Any]


def verify(receipt: Receipt | bytes, by: writer.Signer | None = None) -> verifier.Report:
    data = receipt if isinstance(receipt, bytes) else writer.canonical(receipt)
    return verifier.verify_receipt(data, verifier.read_key((by or writer.signer()).verifier_key), "receipt")


def names(report: verifier.Report) -> set[str]:
    return {failure["name"] for failure in report.failures}


def altered(index: int, change: Callable[[dict[str, Any]], object]) -> Receipt:
    """A receipt of a log in which one record of the job reads otherwise: signed and proven, but wrong."""
    made = writer.records(23)
    change(made[index])
    return writer.receipt(writer.world(23, 99, 23, made), [3, 4, 5])


@pytest.mark.parametrize("covered", [9, 16, 23, 300])
def test_good(covered: int) -> None:
    report = verify(writer.receipt(writer.world(covered, 99, covered), [3, 4, 5]))
    assert report.failures == []
    assert report.facts["log_indexes"] == [3, 4, 5]
    assert report.facts["state"] == "succeeded"


def test_any_flipped_byte_is_seen(small: World) -> None:
    data = writer.canonical(writer.receipt(small, [3, 4, 5]))
    dice = random.Random(1)
    for position in dice.sample(range(len(data)), 700):
        bad = bytearray(data)
        bad[position] ^= dice.randrange(1, 256)
        report = verify(bytes(bad))
        assert report.failures, (position, bytes(bad[position - 20 : position + 20]))
        assert all(failure["file"] == "receipt" for failure in report.failures)


def test_truncated(small: World) -> None:
    data = writer.canonical(writer.receipt(small, [3, 4, 5]))
    for length in random.Random(2).sample(range(len(data)), 100):
        assert names(verify(data[:length])) == {"RECEIPT_FORMAT"}
    assert names(verify(b" " * (16 * 1024 * 1024 + 1))) == {"RECEIPT_FORMAT"}
    assert names(verify(b"[" * 100_000)) == {"RECEIPT_FORMAT"}


def test_a_key_twice_is_refused(small: World) -> None:
    """Two readers could take two different values."""
    data = writer.canonical(writer.receipt(small, [3, 4, 5]))
    assert names(verify(b'{"job_id":"other",' + data[1:])) == {"RECEIPT_FORMAT"}


def test_foreign_keys(small: World) -> None:
    receipt = writer.receipt(small, [3, 4, 5])
    assert names(verify(receipt, writer.signer(2))) == {"NOTE_SIGNATURE"}
    assert "CHECKPOINT_ORIGIN" in names(verify(receipt, writer.signer(1, "aether/other/1")))
    mixed = receipt | {"checkpoint": writer.checkpoint(small.entries, writer.signer(2))}
    assert [(each["name"], each["field"]) for each in verify(mixed).failures] == [("NOTE_SIGNATURE", "checkpoint")]


EDITS: dict[str, tuple[Callable[[Receipt], Any], str]] = {
    "unknown field": (lambda r: r.update(extra=1), "RECEIPT_FORMAT"),
    "lacking field": (lambda r: r.pop("verdict"), "RECEIPT_FORMAT"),
    "another version": (lambda r: r.update(receipt_version="2.0"), "RECEIPT_FORMAT"),
    "index is no integer": (lambda r: r["entries"][0]["proof"].update(log_index=True), "RECEIPT_FORMAT"),
    "loose base64": (lambda r: loosen(r["entries"][0]["proof"]["hashes"]), "RECEIPT_FORMAT"),
    "origin": (lambda r: r.update(origin="aether/other/1"), "CHECKPOINT_ORIGIN"),
    "swapped proofs": (lambda r: swap(r["entries"], "proof"), "PROOF_INVALID"),
    "swapped entries": (lambda r: r["entries"].reverse(), "ENTRY_SEQUENCE"),
    "no outcome": (lambda r: r["entries"].pop(), "ENTRY_SEQUENCE"),
    "no intent": (lambda r: r["entries"].pop(0), "ENTRY_SEQUENCE"),
    "no entries": (lambda r: r["entries"].clear(), "ENTRY_SEQUENCE"),
    "twice": (lambda r: r["entries"].insert(1, r["entries"][1]), "ENTRY_SEQUENCE"),
    "short proof": (lambda r: r["entries"][1]["proof"]["hashes"].pop(), "PROOF_INVALID"),
    "another index": (lambda r: r["entries"][1]["proof"].update(log_index=6), "ENTRY_INDEX"),
    "another job": (lambda r: r.update(job_id=writer.OTHER_JOB), "ENTRY_JOB"),
    "missing document": (lambda r: r["documents"].pop(writer.digest(writer.PLAN)), "DOCUMENT_MISSING"),
    "extra document": (lambda r: r["documents"].update({writer.digest("x"): "x"}), "DOCUMENT_MISMATCH"),
    "changed document": (lambda r: r["documents"].update({writer.digest(writer.PLAN): "x"}), "DOCUMENT_MISMATCH"),
    "checkpoint as verdict": (lambda r: r.update(verdict=r["checkpoint"]), "VERDICT_MISMATCH"),
    "verdict as checkpoint": (lambda r: r.update(checkpoint=r["verdict"]), "NOTE_FORMAT"),
    "no note": (lambda r: r.update(verdict="fine"), "NOTE_FORMAT"),
}


def swap(entries: list[dict[str, Any]], name: str) -> None:
    entries[0][name], entries[1][name] = entries[1][name], entries[0][name]


def loosen(hashes: list[str]) -> None:
    hashes[0] = hashes[0][:-2] + chr(ord(hashes[0][-2]) + 1) + "="


@pytest.mark.parametrize("how", EDITS)
def test_edited(how: str, small: World) -> None:
    edit, expected = EDITS[how]
    receipt = writer.receipt(small, [3, 4, 5])
    edit(receipt)
    assert expected in names(verify(receipt))


def test_entry_of_another_job(small: World) -> None:
    mixed = verify(writer.receipt(small, [3, 4, 8]))
    found = [(each["name"], each["field"], each["index"]) for each in mixed.failures]
    assert ("ENTRY_JOB", "entries[2]", 8) in found


def test_verdict_of_another_job(small: World) -> None:
    receipt = writer.receipt(small, [3, 4, 5])
    receipt["verdict"] = writer.receipt(small, [6, 7, 8], writer.OTHER_JOB)["verdict"]
    assert names(verify(receipt)) == {"VERDICT_MISMATCH"}
    intent = json.loads(small.entries[3]) | {"principal": "uid:0"}
    receipt["verdict"] = small.by.note(writer.verdict_text(intent))
    assert names(verify(receipt)) == {"VERDICT_MISMATCH"}


CONTRADICTIONS: list[tuple[int, Callable[[dict[str, Any]], object]]] = [
    (5, lambda r: r.update(tenant_id="t2")),
    (4, lambda r: r.update(tenant_id="t2")),
    (5, lambda r: r.update(op="other")),
    (5, lambda r: r.update(input_hash=None)),
    (5, lambda r: r["budget"].update(settled=False)),
    (5, lambda r: r["budget"].update(reservation_id="res_2")),
    (5, lambda r: r["budget"].update(accounts=["l0"])),
    (5, lambda r: r.update(budget=None)),
    (3, lambda r: r["budget"].update(settled=True)),
    (3, lambda r: r["ticket"].update(link_ids=["l1", "l0"])),
    (3, lambda r: r["policy"].update(decision="deny")),
    (3, lambda r: r.update(ticket=None)),
]


@pytest.mark.parametrize("case", range(len(CONTRADICTIONS)))
def test_outcome_that_contradicts_its_intent(case: int) -> None:
    index, change = CONTRADICTIONS[case]
    assert names(verify(altered(index, change))) == {"ENTRY_CONTRADICTION"}


def test_a_stop_belongs_between_and_an_intent_does_not() -> None:
    assert verify(altered(4, lambda r: r.update(type="job.stop"))).failures == []
    for kind in ("job.intent", "job.outcome", "access.denied"):
        assert names(verify(altered(4, lambda r, kind=kind: r.update(type=kind)))) == {"ENTRY_SEQUENCE"}
