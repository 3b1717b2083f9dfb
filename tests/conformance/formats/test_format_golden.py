"""The golden files hold: the code still writes their bytes, reads them, and their schemas accept them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from aether.contract.records import Receipt
from aether.substrate.access.tickets import Tickets
from aether.substrate.audit import entry
from aether.substrate.audit.verify import verify_log, verify_receipt
from tests.conformance.formats import format_schemas, golden_maker

GOLDEN = golden_maker.SCHEMA / "golden"
PUBLIC_KEY = (GOLDEN / "audit.pub").read_text()
SAMPLES = sorted((GOLDEN / "samples").glob("*/*.json"))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_code_writes_the_golden_bytes(tmp_path: Path) -> None:
    golden_maker.write_golden(tmp_path / "golden")
    written, kept = files_of(tmp_path / "golden"), files_of(GOLDEN)
    assert sorted(written) == sorted(kept)
    assert [name for name, data in written.items() if data != kept[name]] == []


@pytest.mark.parametrize("name", sorted(format_schemas.texts()))
def test_schemas_are_those_of_the_types(name: str) -> None:
    assert (golden_maker.SCHEMA / name).read_text() == format_schemas.texts()[name]


def test_there_is_a_golden_record_of_every_type() -> None:
    types = schema("record")["$defs"]["Record"]["properties"]["type"]["enum"]
    assert sorted(path.stem for path in (GOLDEN / "records").iterdir()) == sorted(types)


@pytest.mark.parametrize("path", sorted((GOLDEN / "records").iterdir()), ids=lambda path: path.stem)
def test_golden_records_are_read_and_valid(path: Path) -> None:
    record = entry.decode(path.read_bytes())
    assert entry.encode(record) == path.read_bytes()
    jsonschema.validate(json.loads(path.read_bytes()), schema("record"))


def test_golden_log_and_receipt_verify() -> None:
    found = verify_log(GOLDEN / "log", PUBLIC_KEY)
    assert found.ok, found.problems
    assert found.facts["size"] == found.facts["checkpoint_size"] >= golden_maker.ENTRIES > 256
    assert len(list((GOLDEN / "log/segments").iterdir())) > 1
    receipt = (GOLDEN / "receipt.json").read_bytes()
    assert verify_receipt(receipt, PUBLIC_KEY).ok
    jsonschema.validate(json.loads(receipt), schema("receipt"))
    read = msgspec.json.decode(receipt, type=Receipt)
    assert read.origin == golden_maker.ORIGIN
    assert msgspec.json.encode(read) == receipt, "as every reply is encoded: canonical without more ado"


def test_golden_ticket_verifies_with_its_key() -> None:
    golden = json.loads((GOLDEN / "ticket.json").read_text())
    authority = Tickets({golden["kid"]: bytes.fromhex(golden["secret_hex"])}, golden["kid"])
    verified = authority.verify(golden["narrowed"])
    assert list(verified.link_ids) == golden["link_ids"]
    assert [[str(caveat) for caveat in link] for link in verified.links] == golden["caveats"]
    assert authority.verify(golden["minted"]).link_ids == verified.link_ids[:1]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_schemas_accept_and_refuse_the_samples(path: Path) -> None:
    value = json.loads(path.read_text())
    validator = jsonschema.Draft202012Validator(schema(path.parent.name))
    assert validator.is_valid(value) is path.stem.startswith("ok")


def schema(name: str) -> Any:
    return json.loads((golden_maker.SCHEMA / f"{name}.schema.json").read_text())
