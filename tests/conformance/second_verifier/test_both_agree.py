"""Both verifiers take and refuse the same logs and receipts, each refusal by the same name."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aether.contract.errors import EXIT_VERIFY
from aether.contract.limits import SEGMENT_FRAME_BYTES_MAX
from aether.substrate.audit.room import Bounds
from aether.substrate.audit.verify import verify_log, verify_receipt
from tests.conformance.second_verifier import independent_writer as writer
from tests.conformance.second_verifier.independent_writer import World
from tools import aether_verify as second

SEGMENT = "segments/" + "0" * 20
Change = Callable[[dict[str, Any]], object]


def codes_of_log(directory: Path, by: writer.Signer, held: list[Path] | None = None) -> list[set[str]]:
    """What the first and the second verifier name."""
    notes = {str(path): path.read_bytes() for path in held or []}
    first = verify_log(directory, by.verifier_key.decode(), notes)
    other = second.LogCheck(directory, second.read_key(by.verifier_key), held or []).run()
    return [{problem.code for problem in first.problems}, {failure["name"] for failure in other.failures}]


def codes_of_receipt(data: bytes, by: writer.Signer) -> list[set[str]]:
    first = verify_receipt(data, by.verifier_key.decode())
    other = second.verify_receipt(data, second.read_key(by.verifier_key), "receipt")
    return [{problem.code for problem in first.problems}, {failure["name"] for failure in other.failures}]


def loosen(encoded: str) -> str:
    """Another spelling of the same bytes: a pad bit set."""
    body = encoded.rstrip("=")
    other = body[:-1] + chr(ord(body[-1]) + 1) + encoded[len(body) :]
    assert base64.b64decode(other) == base64.b64decode(encoded) and other != encoded
    return other


def test_what_both_take(small: World, large: World, tmp_path: Path) -> None:
    assert codes_of_log(small.write(tmp_path / "small"), small.by) == [set(), set()]
    assert codes_of_log(large.write(tmp_path / "large"), large.by) == [set(), set()]
    receipt = writer.canonical(writer.receipt(small, [3, 4, 5]))
    for data in (receipt, receipt + b"\n"):
        assert codes_of_receipt(data, small.by) == [set(), set()]


# Keys and notes.


KEYS: dict[str, Callable[[str], str]] = {
    "upper case": lambda k: re.sub(r"\+[0-9a-f]{8}\+", lambda match: match[0].upper(), k),
    "two newlines": lambda k: k + "\n",
    "a space before it": lambda k: " " + k,
    "cut": lambda k: k[:-2],
}


@pytest.mark.parametrize("how", KEYS)
def test_spellings_of_a_key(how: str, small: World, tmp_path: Path) -> None:
    good = next(
        key for n in range(9) if re.search("[a-f]", (key := writer.signer(n).verifier_key.decode()).split("+")[1])
    )
    second.read_key(good.encode())
    found = verify_log(small.write(tmp_path), KEYS[how](good))
    assert {problem.code for problem in found.problems} == {"KEY_FORMAT"}
    with pytest.raises(second.VerifyError, match="KEY_FORMAT"):
        second.read_key(KEYS[how](good).encode())


def test_a_signature_has_one_spelling(small: World, tmp_path: Path) -> None:
    good = small.files["checkpoint"].decode()
    signature = good.rstrip("\n").rpartition(" ")[2]
    assert signature.endswith("="), "68 bytes leave pad bits"
    loose = good.replace(signature, loosen(signature)).encode()
    assert codes_of_log(small.write(tmp_path, checkpoint=loose), small.by) == [{"NOTE_FORMAT"}] * 2


@pytest.mark.parametrize("size", ["9007199254740992", "99999999999999999", "023", "+23", "\u0662\u0663"])
def test_spellings_of_a_size(size: str, small: World, tmp_path: Path) -> None:
    root = small.files["checkpoint"].decode().split("\n")[2]
    note = small.by.note(f"{writer.ORIGIN}\n{size}\n{root}\n").encode()
    assert all("NOTE_FORMAT" in codes for codes in codes_of_log(small.write(tmp_path, checkpoint=note), small.by))


@pytest.mark.parametrize(
    "tail", ["", "\u2014 a+b AAAAAAAA\n", "\u2014 a\u00a0b AAAAAAAA\n", "\u2014 a\tb AAAAAAAA\n", "x\n"]
)
def test_signature_lines(tail: str, small: World, tmp_path: Path) -> None:
    good = small.files["checkpoint"].decode()
    note = good + tail if tail else good.partition("\n\n")[0] + "\n\n"
    assert codes_of_log(small.write(tmp_path, checkpoint=note.encode()), small.by) == [{"NOTE_FORMAT"}] * 2


# Segments.


def raw_frame(first: int, count: int, payload: bytes) -> bytes:
    head = b"AEF1" + struct.pack(">QII", first, count, len(payload))
    return head + struct.pack(">I", zlib.crc32(head + payload)) + payload


def one(entry: bytes) -> bytes:
    return struct.pack(">I", len(entry)) + entry


TAILS: dict[str, tuple[bytes, bool]] = {
    "zeros": (bytes(5_000), True),
    "half a frame": (writer.frame(23, [b"{}" * 40])[:50], True),
    "a wrong check": (writer.frame(23, [b"{}" * 40])[:-1] + b"x", True),
    "as much as one frame": (bytes(SEGMENT_FRAME_BYTES_MAX), True),
    "more than one frame": (bytes(SEGMENT_FRAME_BYTES_MAX + 1), False),
    "whole, of another index": (writer.frame(24, [b"{}"]), False),
    "whole, no entry": (raw_frame(23, 0, b""), False),
    "whole, more announced": (raw_frame(23, 2, one(b"{}")), False),
    "whole, less announced": (raw_frame(23, 1, one(b"{}") * 2), False),
    "whole, an entry of 0 bytes": (raw_frame(23, 1, one(b"")), False),
    "whole, an entry too long": (raw_frame(23, 1, one(b"x" * 65_536)), False),
    "whole, an entry cut off": (raw_frame(23, 1, one(b"{}")[:-1]), False),
    "whole, behind a torn one": (b"AEF1" + bytes(60) + writer.frame(7, [b"{}"]), False),
}


@pytest.mark.parametrize("how", TAILS)
def test_torn_or_bad(how: str, tmp_path: Path) -> None:
    tail, is_torn = TAILS[how]
    log = writer.world(23, per_segment=99, covered=23)
    log.write(tmp_path, **{SEGMENT: log.files[SEGMENT] + tail})
    assert codes_of_log(tmp_path, log.by) == [set() if is_torn else {"FRAME_BAD"}] * 2
    first = verify_log(tmp_path, log.by.verifier_key.decode())
    other = second.LogCheck(tmp_path, second.read_key(log.by.verifier_key), []).run()
    assert first.facts["torn_bytes"] == other.facts["torn_bytes"] == (len(tail) if is_torn else 0)


def test_a_frame_above_its_bound_is_none(tmp_path: Path) -> None:
    entry = writer.canonical(writer.record(0, "access.denied", detail={"text": "x" * 60_000}))
    entries = [entry.replace(b'"log_index":0', b'"log_index":%d' % at) for at in range(18)]
    good = World(writer.segments([], 1) | writer.tiles(entries), entries, 18, writer.signer())
    good.files["checkpoint"] = writer.checkpoint(entries, good.by).encode()
    good.files[SEGMENT] = writer.segment_header(0) + writer.frame(0, entries)
    assert len(writer.frame(0, entries)) > SEGMENT_FRAME_BYTES_MAX
    assert all("FRAME_BAD" in codes for codes in codes_of_log(good.write(tmp_path), good.by))
    good.files[SEGMENT] = writer.segment_header(0) + writer.frame(0, entries[:9]) + writer.frame(9, entries[9:])
    assert codes_of_log(good.write(tmp_path), good.by) == [set(), set()]
    with pytest.raises(ValueError, match="no larger ones"):
        Bounds(frame_bytes=SEGMENT_FRAME_BYTES_MAX + 1)


def test_a_hostile_end_of_a_log_costs_little(tmp_path: Path) -> None:
    """As many beginnings of frames as fit, each as long as it may be."""
    log = writer.world(23, per_segment=99, covered=23)
    count = 4_000
    heads = (struct.pack(">QIIxxxx", 23, 1, 24 * (count - at - 1)) for at in range(count))
    log.write(tmp_path, **{SEGMENT: log.files[SEGMENT] + b"".join(b"AEF1" + head for head in heads)})
    begin = time.process_time()
    assert codes_of_log(tmp_path, log.by) == [set(), set()]
    assert time.process_time() - begin < 10


def test_a_segment_has_a_bound(small: World, tmp_path: Path) -> None:
    small.write(tmp_path)
    last = sorted((tmp_path / "segments").iterdir())[-1]
    with last.open("r+b") as file:
        file.truncate(67_108_865)
    assert all("SEGMENT_HEADER" in codes for codes in codes_of_log(tmp_path, small.by))


# Records and documents.


def stored(digest: str) -> Change:
    return lambda r: r.update(type="document.stored", detail={"digest": digest})


RECORDS: dict[str, tuple[Change, set[str]]] = {
    "another node": (lambda r: r.update(node_id="node_other"), {"ENTRY_NODE"}),
    "a time": (lambda r: r.update(time="2026-13-21T13:33:20.123456Z"), {"ENTRY_SCHEMA"}),
    "a time of a job": (lambda r: r.update(started_at="yesterday"), {"ENTRY_SCHEMA"}),
    "a digest": (lambda r: r.update(result_digest="sha256:" + "A" * 64), {"ENTRY_SCHEMA"}),
    "a document's digest": (stored("sha256:../../../etc/passwd"), {"ENTRY_SCHEMA"}),
    "a document that is not there": (stored("sha256:" + "a" * 64), {"DOCUMENT_MISSING"}),
    "an effect": (lambda r: r.update(effect="magic"), {"ENTRY_SCHEMA"}),
    "an unknown field": (lambda r: r.update(surprise=1), {"ENTRY_SCHEMA"}),
    "an unknown figure": (
        lambda r: r.update(usage=dict.fromkeys(writer.FIGURES.split()) | {"usd": 1, "basis": {}}),
        {"ENTRY_SCHEMA"},
    ),
    "a basis": (
        lambda r: r.update(usage=dict.fromkeys(writer.FIGURES.split()) | {"basis": {"wall_us": "guessed"}}),
        {"ENTRY_SCHEMA"},
    ),
    "an amount as text": (lambda r: r.update(result_bytes="9007199254740993"), {"ENTRY_SCHEMA"}),
    "a null that is none": (lambda r: r.update(labels=None), {"ENTRY_SCHEMA"}),
    "an index": (lambda r: r.update(log_index=8), {"ENTRY_INDEX"}),
}


@pytest.mark.parametrize("how", RECORDS)
def test_records_that_do_not_hold(how: str, tmp_path: Path) -> None:
    change, expected = RECORDS[how]
    made = writer.records(12)
    change(made[9])
    log = writer.world(12, per_segment=99, covered=12, made=made)
    assert codes_of_log(log.write(tmp_path), log.by) == [expected] * 2


def test_a_document_has_a_bound(small: World, tmp_path: Path) -> None:
    for size, expected in ((1_048_576, set()), (1_048_577, {"DOCUMENT_MISMATCH"})):
        name = writer.digest("x" * size).removeprefix("sha256:")
        log = small.write(tmp_path / str(size), **{f"documents/sha256/{name[:2]}/{name}": b"x" * size})
        assert codes_of_log(log, small.by) == [expected] * 2


# Checkpoints kept elsewhere.


def test_an_older_checkpoint_put_back_with_entries_that_nobody_signed(tmp_path: Path) -> None:
    """Without the key: by itself it is good but for what it counts; a kept checkpoint shows it."""
    kept = tmp_path / "kept"
    kept.write_bytes(writer.world(30, per_segment=99, covered=30).files["checkpoint"])
    made = writer.records(34)
    made[27]["principal"] = "uid:0"
    forged = writer.world(34, per_segment=99, covered=20, made=made)
    log = forged.write(tmp_path / "log")
    assert codes_of_log(log, forged.by) == [set(), set()]
    assert verify_log(log, forged.by.verifier_key.decode()).facts["entries_unproven"] == 14
    assert second.LogCheck(log, second.read_key(forged.by.verifier_key), []).run().facts["entries_unproven"] == 14
    assert codes_of_log(log, forged.by, [kept]) == [{"ROOT_MISMATCH"}] * 2
    cut = writer.world(20, per_segment=99, covered=20)
    assert codes_of_log(cut.write(tmp_path / "cut"), cut.by, [kept]) == [{"LOG_SHORT"}] * 2


@pytest.mark.parametrize("size", [0, 1, 12, 20, 23])
def test_kept_checkpoints_of_the_log(size: int, tmp_path: Path) -> None:
    """Older, equal and newer than the published one."""
    log = writer.world(23, per_segment=13, covered=20)
    kept, foreign = tmp_path / "kept", tmp_path / "foreign"
    kept.write_text(writer.checkpoint(log.entries[:size], log.by))
    foreign.write_text(writer.checkpoint(log.entries[:size], writer.signer(2)))
    log.write(tmp_path / "log")
    assert codes_of_log(tmp_path / "log", log.by, [kept]) == [set(), set()]
    assert codes_of_log(tmp_path / "log", log.by, [kept, foreign]) == [{"NOTE_SIGNATURE"}] * 2


def test_the_command_takes_kept_checkpoints(tmp_path: Path) -> None:
    from aether.cli.main import build

    log = writer.world(20, per_segment=99, covered=20)
    log.write(tmp_path / "log")
    (tmp_path / "key").write_bytes(log.by.verifier_key)
    line = ["audit", "verify", str(tmp_path / "log"), "--key", str(tmp_path / "key"), "--json"]
    for size, code in ((12, 0), (20, 0), (23, EXIT_VERIFY)):
        kept = tmp_path / f"kept{size}"
        kept.write_text(writer.checkpoint(writer.world(23, 99, 23).entries[:size], log.by))
        line += ["--checkpoint", str(kept)]
        done = CliRunner().invoke(build(), line)
        assert done.exit_code == code, done.output
    (problem,) = json.loads(done.stdout)["problems"]
    assert (problem["code"], problem["place"]) == ("LOG_SHORT", str(tmp_path / "kept23"))


def test_what_is_no_regular_file_is_not_there(small: World, tmp_path: Path) -> None:
    """A fifo would block for ever."""
    small.write(tmp_path)
    os.mkfifo(tmp_path / "documents/sha256/fifo")
    assert codes_of_log(tmp_path, small.by) == [{"DOCUMENT_MISMATCH"}] * 2
    (tmp_path / "documents/sha256/fifo").unlink()
    for name, expected in (("checkpoint", "CHECKPOINT_MISSING"), (SEGMENT, "SEGMENT_HEADER")):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        assert all(expected in codes for codes in codes_of_log(tmp_path, small.by))
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(small.files[name])


# Receipts.


def respelled(data: bytes) -> dict[str, bytes]:
    receipt = json.loads(data)
    return {
        "white space": data.replace(b'"entries":', b'"entries": '),
        "indented": json.dumps(receipt, indent=1, ensure_ascii=False, sort_keys=True).encode(),
        "two newlines": data + b"\n\n",
        "a space after it": data + b" ",
        "another order": json.dumps(
            dict(reversed(receipt.items())), separators=(",", ":"), ensure_ascii=False
        ).encode(),
        "escapes": data.replace(b'"job_id"', b'"\\u006aob_id"', 1),
        "a key twice": b'{"checkpoint":"",' + data[1:],
        "a byte order mark": b"\xef\xbb\xbf" + data,
    }


@pytest.mark.parametrize("how", respelled(b'{"entries":[]}'))
def test_a_receipt_has_one_spelling(how: str, small: World) -> None:
    data = writer.canonical(writer.receipt(small, [3, 4, 5]))
    other = respelled(data)[how]
    assert other != data
    assert codes_of_receipt(other, small.by) == [{"RECEIPT_FORMAT"}] * 2


@pytest.mark.parametrize("change", [loosen, lambda h: h[:-4], lambda h: "", lambda h: "!" + h[1:]])
def test_hashes_of_a_proof(change: Callable[[str], str], small: World) -> None:
    receipt = writer.receipt(small, [3, 4, 5])
    hashes = receipt["entries"][1]["proof"]["hashes"]
    hashes[0] = change(hashes[0])
    assert codes_of_receipt(writer.canonical(receipt), small.by) == [{"RECEIPT_FORMAT"}] * 2


STORIES: dict[str, tuple[int, Change, set[str]]] = {
    "the start of another tenant": (4, lambda r: r.update(tenant_id="t2"), {"ENTRY_CONTRADICTION"}),
    "the outcome of another tenant": (5, lambda r: r.update(tenant_id="t2"), {"ENTRY_CONTRADICTION"}),
    "the start of another node": (4, lambda r: r.update(node_id="node_other"), {"ENTRY_NODE"}),
    "the outcome of another node": (5, lambda r: r.update(node_id="node_other"), {"ENTRY_NODE"}),
    "another input": (5, lambda r: r.update(input_hash=None), {"ENTRY_CONTRADICTION"}),
    "a budget and no ticket": (3, lambda r: r.update(ticket=None), {"ENTRY_CONTRADICTION"}),
    "accounts in another order": (3, lambda r: r["ticket"].update(link_ids=["l1", "l0"]), {"ENTRY_CONTRADICTION"}),
    "a budget on one side": (5, lambda r: r.update(budget=None), {"ENTRY_CONTRADICTION"}),
    "a stop by another": (4, lambda r: r.update(type="job.stop", principal="uid:0"), set()),
    "a time": (4, lambda r: r.update(time="then"), {"ENTRY_SCHEMA"}),
    "an approval nobody gave": (3, lambda r: r["detail"].update(approval="approval_1"), {"APPROVAL_MISSING"}),
    "an approval nobody asked for": (
        4,
        lambda r: r.update(type="approval.granted", detail={"approval": "approval_1"}),
        {"APPROVAL_MISSING"},
    ),
}


@pytest.mark.parametrize("how", STORIES)
def test_stories(how: str) -> None:
    index, change, expected = STORIES[how]
    made = writer.records(23)
    change(made[index])
    log = writer.world(23, 99, 23, made)
    for codes in codes_of_receipt(writer.canonical(writer.receipt(log, [3, 4, 5])), log.by):
        assert codes == expected or (expected == {"ENTRY_SCHEMA"} and expected <= codes)


APPROVED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "granted": ({}, set()),
    "denied": ({"type": "approval.denied"}, {"APPROVAL_MISSING"}),
    "only asked for": ({"type": "approval.requested"}, {"APPROVAL_MISSING"}),
    "another approval": ({"detail": {"approval": "approval_2"}}, {"APPROVAL_MISSING"}),
    "another input": ({"input_hash": None}, {"APPROVAL_MISSING"}),
    "another tenant": ({"tenant_id": "t2"}, {"ENTRY_CONTRADICTION"}),
}


@pytest.mark.parametrize("how", APPROVED)
def test_approvals(how: str) -> None:
    """The record between intent and outcome is a decision on what the intent waits for."""
    change, expected = APPROVED[how]
    made = writer.records(23)
    made[3]["detail"] = {"approval": "approval_1"}
    made[4].update({"type": "approval.granted", "detail": {"approval": "approval_1"}, "code": None} | change)
    log = writer.world(23, 99, 23, made)
    assert codes_of_receipt(writer.canonical(writer.receipt(log, [3, 4, 5])), log.by) == [expected, expected]


def test_a_receipt_without_the_start_of_its_job_verifies(small: World) -> None:
    """It proves what it holds, not that it holds all."""
    assert codes_of_receipt(writer.canonical(writer.receipt(small, [3, 5])), small.by) == [set(), set()]
