"""The command line of the stand-alone verifier: exit status, JSON, no import beyond the standard library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.second_verifier import independent_writer as writer
from tests.conformance.second_verifier.independent_writer import World
from tools import aether_verify as verifier

SCRIPT = Path(verifier.__file__)


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Isolated (-I -S): no site-packages, so nothing but the standard library can be imported."""
    line = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def place(small: World, tmp_path: Path) -> Path:
    small.write(tmp_path / "audit")
    (tmp_path / "audit.pub").write_bytes(small.by.verifier_key)
    (tmp_path / "receipt.json").write_bytes(writer.canonical(writer.receipt(small, [3, 4, 5])))
    (tmp_path / "record.json").write_bytes(small.entries[3])
    return tmp_path


def test_imports_the_standard_library_alone() -> None:
    tree = ast.parse(SCRIPT.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_good(place: Path, small: World) -> None:
    held = place / "held"
    held.write_bytes(small.files["checkpoint"])
    log = command("log", place / "audit", "--key", place / "audit.pub", "--checkpoint", held, "--json")
    assert (log.returncode, log.stderr) == (0, "")
    told = json.loads(log.stdout)
    assert told["verified"] is True
    assert (told["size"], told["origin"], told["failures"]) == (23, writer.ORIGIN, [])
    receipt = command("receipt", place / "receipt.json", "--key", place / "audit.pub")
    assert receipt.returncode == 0
    assert receipt.stdout.startswith("verified\n")
    record = command("record", place / "record.json", "--json")
    assert json.loads(record.stdout)["leaf"] == verifier.leaf_hash(small.entries[3]).hex()


def test_bad(place: Path, small: World) -> None:
    (place / "audit.pub").write_bytes(writer.signer(2).verifier_key)
    log = command("log", place / "audit", "--key", place / "audit.pub", "--json")
    failure = json.loads(log.stdout)["failures"][0]
    assert (log.returncode, failure["name"], failure["file"]) == (1, "NOTE_SIGNATURE", "checkpoint")
    receipt = command("receipt", place / "receipt.json", "--key", place / "audit.pub")
    assert receipt.returncode == 1
    assert receipt.stdout.startswith("NOT VERIFIED: 2 failures\n  NOTE_SIGNATURE: file ")
    (place / "record.json").write_bytes(small.entries[3] + b"\n")
    record = command("record", place / "record.json", "--json")
    assert record.returncode == 1
    assert json.loads(record.stdout)["failures"][0]["offset"] == len(small.entries[3])


def test_usage(place: Path) -> None:
    for arguments in ([], ["log", place / "audit"], ["other", place]):
        assert command(*arguments).returncode == 2
    for what, path in (("log", place / "none"), ("log", place / "audit.pub"), ("receipt", place / "audit")):
        done = command(what, path, "--key", place / "audit.pub")
        assert (done.returncode, "cannot read" in done.stderr) == (2, True)
    assert command("receipt", place / "receipt.json", "--key", place / "none").returncode == 2


def test_any_flipped_byte_of_the_key_is_seen(place: Path, small: World) -> None:
    good = small.by.verifier_key
    for position in range(len(good)):
        (place / "audit.pub").write_bytes(good[:position] + bytes([good[position] ^ 0x20]) + good[position + 1 :])
        assert verifier.main(["log", str(place / "audit"), "--key", str(place / "audit.pub")]) == 1, position


def test_hostile_text_is_escaped(place: Path) -> None:
    made = writer.records(9)
    made[8]["job_id"] = "\x1b[2J\u202e"
    made[8]["surprise\x1b[2J"] = 1
    log = writer.world(9, 99, 9, made)
    log.write(place / "hostile")
    done = command("log", place / "hostile", "--key", place / "audit.pub")
    assert done.returncode == 1
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
