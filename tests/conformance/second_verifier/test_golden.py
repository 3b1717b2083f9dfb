"""What the product wrote, read by the stand-alone verifier: the golden files verify, and damage to them is seen."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tools import aether_verify as verifier

GOLDEN = Path(__file__).parents[3] / "schema" / "v1" / "golden"
KEY = verifier.read_key((GOLDEN / "audit.pub").read_bytes())
LOG_FILES = sorted(str(path.relative_to(GOLDEN / "log")) for path in (GOLDEN / "log").rglob("*") if path.is_file())
RECORDS = sorted((GOLDEN / "records").glob("*.json"))
SAMPLES = sorted((GOLDEN / "samples" / "record").glob("*.json"))


def flips(data: bytes, count: int) -> list[bytes]:
    """Copies with one byte changed: every position of a short file, a sample of a long one, to a drawn value."""
    dice = random.Random(len(data))
    positions = dice.sample(range(len(data)), min(count, len(data)))
    return [data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :] for at in positions]


def test_log() -> None:
    report = verifier.LogCheck(GOLDEN / "log", KEY, []).run()
    assert report.failures == []
    assert report.facts["size"] == report.facts["entries"] > 256
    assert (report.facts["torn_bytes"], report.facts["unchecked"]) == (0, [])


@pytest.mark.parametrize("name", LOG_FILES)
def test_log_with_a_flipped_byte(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "log", tmp_path / "log")
    for bad in flips((tmp_path / "log" / name).read_bytes(), 30):
        (tmp_path / "log" / name).write_bytes(bad)
        failures = verifier.LogCheck(tmp_path / "log", KEY, []).run().failures
        assert any(failure["file"] == name for failure in failures), (name, failures)


@pytest.mark.parametrize("name", LOG_FILES)
def test_log_without_a_file(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "log", tmp_path / "log")
    (tmp_path / "log" / name).unlink()
    assert verifier.LogCheck(tmp_path / "log", KEY, []).run().failures


def test_key_with_a_flipped_byte() -> None:
    for bad in flips((GOLDEN / "audit.pub").read_bytes(), 500):
        with pytest.raises(verifier.VerifyError, match="KEY_FORMAT"):
            verifier.read_key(bad)


def test_receipt() -> None:
    report = verifier.verify_receipt((GOLDEN / "receipt.json").read_bytes(), KEY, "receipt")
    assert report.failures == []
    assert len(report.facts["log_indexes"]) >= 2


def test_receipt_with_a_flipped_byte() -> None:
    for bad in flips((GOLDEN / "receipt.json").read_bytes(), 900):
        assert verifier.verify_receipt(bad, KEY, "receipt").failures, bad


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record(path: Path) -> None:
    """A record alone carries no proof: a flipped byte breaks its form, or gives another record with another leaf."""
    good = path.read_bytes()
    report = verifier.verify_record(good, path.name)
    assert (report.failures, report.facts["type"]) == ([], path.stem)
    for bad in flips(good, 200):
        after = verifier.verify_record(bad, path.name)
        assert after.failures or after.facts["leaf"] != report.facts["leaf"]


def test_every_type_has_a_record() -> None:
    assert {path.stem for path in RECORDS} == set(filter(None, verifier.TYPES.split("|")))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample(path: Path) -> None:
    """Samples are of shape, not of spelling."""
    canonical = verifier.write_json(json.loads(path.read_text()))
    if path.stem.startswith("ok"):
        verifier.read_record(canonical)
    else:
        with pytest.raises(verifier.VerifyError, match="ENTRY_"):
            verifier.read_record(canonical)


def test_the_shape_has_the_fields_of_the_schema() -> None:
    schema = json.loads((GOLDEN.parent / "record.schema.json").read_text())["$defs"]
    parts = {
        "ticket": "TicketRef",
        "policy": "PolicyRef",
        "budget": "BudgetRef",
        "code": "CodeRef",
        "exit": "ExitStatus",
    }
    parts |= {"error": "ErrorBody", "usage": "Usage"}
    assert set(verifier.RECORD) == set(schema["Record"]["properties"])
    for name, part in parts.items():
        assert {field.removesuffix("/") for field in verifier.RECORD[name][0]} == set(schema[part]["properties"]), name
