"""The log kept by its users: witnessed, proven, pruned, under a new key. One instance, the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.auditcalls import AuditFilter
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.paths import Layout
from tests.support import instance

AETHER = Path(sys.executable).with_name("aether")
VERIFIER = Path(__file__).parents[2] / "tools/aether_verify.py"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def aether(layout: Layout, *words: str, code: int = 0, **more: Any) -> str:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    done = subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, check=False, **more)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout


def second(what: str, path: Path, *words: str, code: int = 0) -> str:
    argv = [sys.executable, str(VERIFIER), what, str(path), *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout


def work(client: Client) -> str:
    job = client.run(["true"])
    assert job.state is JobState.SUCCEEDED, job.error
    return job.job_id


def grown(client: Client) -> None:
    """Until the published checkpoint covers what was written so far."""
    beyond = client.audit.query(AuditFilter()).log_size - 1
    deadline = time.monotonic() + 20
    while int(client.checkpoint().split("\n")[1]) <= beyond and time.monotonic() < deadline:
        time.sleep(0.05)


@contextmanager
def witness(layout: Layout, directory: Path, name: str, listen: str) -> Iterator[str]:
    """A witness process; gives its line for policy/witnesses."""
    argv = [
        str(AETHER), "audit", "witness", "--dir", str(directory), "--name", name, "--listen", listen, "--log",
        str(layout.audit_public_key),
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stdout is not None
        process.stdout.close()


def test_witnesses_cosign_and_are_counted(layout: Layout, client: Client, tmp_path: Path) -> None:
    aether(layout, "audit", "push", code=120)  # nobody is listed
    with (
        witness(layout, tmp_path / "w1", "example.com/w1", f"unix:{tmp_path}/w1.sock") as first,
        witness(layout, tmp_path / "w2", "example.com/w2", "127.0.0.1:0") as other,
    ):
        layout.witnesses.parent.mkdir(exist_ok=True)
        layout.witnesses.write_text(f"# who cosigns\n{first}\n{other}")
        work(client)
        told = json.loads(aether(layout, "audit", "push", "--json"))["cosigned"]
        assert {each["witness"] for each in told} == {"example.com/w1", "example.com/w2"}
        job_id = work(client)
        grown(client)
        aether(layout, "audit", "push")
    w1, w2 = str(tmp_path / "w1/witness.pub"), str(tmp_path / "w2/witness.pub")
    listed = json.loads(aether(layout, "audit", "witnesses", "--json"))
    assert all(each["size"] == listed["witnesses"][0]["size"] for each in listed["witnesses"])
    shown = json.loads(aether(layout, "audit", "verify", "--witness-key", w1, "--witness-key", w2, "--json"))
    assert shown["ok"] and shown["facts"]["witnesses"] == 2
    words = ("--key", str(layout.audit_public_key), "--witness-key", w1, "--witness-key", w2, "--quorum", "2")
    assert "witnesses: 2" in second("log", layout.audit, *words)
    receipt = tmp_path / "receipt.json"
    receipt.write_text(aether(layout, "receipt", "show", job_id, "--json"))
    assert "witnesses" in aether(layout, "verify", str(receipt), "--witness-key", w1, "--witness-key", w2)
    second("receipt", receipt, *words)
    work(client)
    grown(client)
    aether(layout, "audit", "push", code=122)  # they are gone
    # one that is not listed counts for nothing
    stranger = tmp_path / "w3"
    with witness(layout, stranger, "example.com/w3", f"unix:{tmp_path}/w3.sock"):
        pass
    aether(layout, "audit", "witness", "--once", "--dir", str(stranger), code=123)
    aether(layout, "audit", "verify", "--witness-key", str(stranger / "witness.pub"), code=123)
    with layout.witnesses.open("a") as file:
        file.write(f"{(stranger / 'witness.pub').read_text().strip()} unix:/nowhere\n")
    assert "cosigned" in aether(layout, "audit", "witness", "--once", "--dir", str(stranger))
    aether(layout, "audit", "verify", "--witness-key", str(stranger / "witness.pub"))


def test_a_kept_checkpoint_is_proven(layout: Layout, client: Client, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text(aether(layout, "audit", "checkpoint"))
    work(client)
    grown(client)
    assert json.loads(aether(layout, "audit", "prove", str(kept), "--json"))["holds"]
    aether(layout, "audit", "verify", "--against", str(kept))
    export = tmp_path / "all.jsonl"
    aether(layout, "audit", "export", "--out", str(export))
    assert "verified" in second("export", export, "--key", str(layout.audit_public_key))
    export.write_bytes(export.read_bytes().replace(b"succeeded", b"succeedeD"))
    second("export", export, "--key", str(layout.audit_public_key), code=1)
    other = kept.read_text().split("\n")
    other[2] = "A" * 43 + "="
    kept.write_text("\n".join(other))
    aether(layout, "audit", "prove", str(kept), code=123)
    aether(layout, "audit", "verify", "--against", str(kept), code=123)


def test_old_records_go_and_a_new_key_signs(layout: Layout, client: Client, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    old_key = tmp_path / "old.pub"
    old_key.write_bytes(layout.audit_public_key.read_bytes())
    job_id = work(client)
    receipt = tmp_path / "receipt.json"
    receipt.write_text(aether(layout, "receipt", "show", job_id, "--json"))
    fill(client, 300)
    time.sleep(1.1)
    kept.write_text(aether(layout, "audit", "checkpoint"))
    assert json.loads(aether(layout, "audit", "retain", "--keep", "1s", "--json"))["pruned"] == 0  # ends the segment
    fill(client, 300)
    time.sleep(1.1)
    told = json.loads(aether(layout, "audit", "retain", "--keep", "1s", "--json"))
    assert told["pruned"] >= 256 and told["first"] == told["pruned"], told
    report = json.loads(aether(layout, "audit", "verify", "--against", str(kept), "--json"))
    assert report["ok"] and report["facts"]["pruned"] >= told["pruned"]
    assert "pruned" in second("log", layout.audit, "--key", str(old_key), "--against", str(kept))
    aether(layout, "verify", str(receipt))
    with pytest.raises(AetherError) as caught:
        client.receipt(job_id)
    assert caught.value.code == "GONE"
    assert [r.type for r in client.audit.query(AuditFilter(type=("audit.pruned",))).records] == ["audit.pruned"]
    aether(layout, "audit", "query", "--limit", "5000", "--asc")

    aether(layout, "audit", "rotate-key")
    assert layout.audit_public_key.read_bytes() != old_key.read_bytes()
    later = work(client)
    aether(layout, "verify", later)
    aether(layout, "verify", str(receipt), "--key", str(old_key))
    assert json.loads(aether(layout, "audit", "verify", "--json"))["ok"]
    second("log", layout.audit, "--key", str(layout.audit_public_key))


def fill(client: Client, count: int) -> None:
    """Records that cost little: refused calls are recorded no more than a few a second, minted tickets always."""
    for _ in range(count):
        client.tickets.mint(role="user", expires_ms=60_000)
