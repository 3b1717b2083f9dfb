"""The procedures of docs/operations.md, done as the page says them on a real instance."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import control
from aether.substrate.audit.verify import verify_log
from tests.docs import docpages
from tests.support import machine
from tests.support.instance import running

SECOND_VERIFIER = docpages.ROOT / "tools/aether_verify.py"


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A directory outside the instance, which other uids may enter."""
    path = Path(tempfile.mkdtemp(prefix="aether-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def run_job(layout: Layout, text: str) -> str:
    with Client(state=layout.root) as client:
        return client.run(["/bin/echo", text]).job_id


def stop(layout: Layout) -> None:
    """`aether down`, and until the last process has gone."""
    control.down(layout.root)
    wait_for(lambda: not machine.mentioning(str(layout.root)))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def second_verifier(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(SECOND_VERIFIER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def copy(source: Path, target: Path) -> None:
    """`cp -a`: owners and modes as they are."""
    subprocess.run(["cp", "-a", "--", str(source), str(target)], check=True)


def back_up(layout: Layout, target: Path) -> None:
    """In the order of "Backup and restore", while the instance runs."""
    copy_of = Layout(target)
    target.mkdir()
    copy_of.db.mkdir()
    for file in layout.db.glob("*.sqlite3"):
        with sqlite3.connect(file) as source, sqlite3.connect(copy_of.db / file.name) as kept:
            source.backup(kept)
        os.chown(copy_of.db / file.name, file.stat().st_uid, file.stat().st_gid)
    for name in ("artifacts", "models", "keys", "policy"):
        copy(layout.root / name, target / name)
    (target / "logs").mkdir()
    copy(layout.job_logs, copy_of.job_logs)
    copy_of.audit.mkdir()
    copy(layout.audit / "checkpoint", copy_of.audit / "checkpoint")
    for entry in sorted(layout.audit.iterdir()):
        if entry.name != "checkpoint":
            copy(entry, copy_of.audit / entry.name)


def test_backup_while_it_runs_and_restore(elsewhere: Path) -> None:
    """What was finished when the copy was made is there after the restore, and the copy verifies."""
    restored = Layout(elsewhere / "restored")
    with running() as layout:
        before = run_job(layout, "before")
        back_up(layout, restored.root)
        run_job(layout, "after")
    control.ensure_running(restored.root, lambda text: None)
    try:
        assert control.is_up(restored)
        with Client(state=restored.root) as client:
            assert client.get(before).state == "succeeded"
            assert client.receipt(before).job_id == before
        run_job(restored, "again")
    finally:
        stop(restored)
    report = verify_log(restored.audit, restored.audit_public_key.read_text())
    assert report.ok, report.problems


def test_a_kept_checkpoint_shows_that_a_log_was_cut(elsewhere: Path) -> None:
    """`aether audit checkpoint` kept elsewhere, an older copy of the log put in its place."""
    kept, older, key = elsewhere / "checkpoint", elsewhere / "audit", elsewhere / "audit.pub"
    with running() as layout:
        key.write_bytes(layout.audit_public_key.read_bytes())
        run_job(layout, "one")
        stop(layout)
        copy(layout.audit, older)
        control.ensure_running(layout.root, lambda text: None)
        run_job(layout, "two")
        with Client(state=layout.root) as client:
            kept.write_text(client.checkpoint())
        stop(layout)
        whole = second_verifier("log", layout.audit, "--key", key, "--checkpoint", kept)
        assert whole.returncode == 0, whole.stdout + whole.stderr
    assert second_verifier("log", older, "--key", key).returncode == 0
    assert second_verifier("log", older, "--key", key, "--checkpoint", kept).returncode == 1


def test_a_log_that_is_not_its_checkpoints_is_not_gone_on_from() -> None:
    """`LOG_CORRUPT`: aetherd does not start on it, and `aether up` says so."""
    with running() as layout:
        run_job(layout, "one")
        stop(layout)
        (segment,) = layout.audit.glob("segments/0*")
        data = bytearray(segment.read_bytes())
        data[data.index(b"job.intent")] ^= 1
        segment.write_bytes(data)
        with pytest.raises(AetherError) as refused:
            control.ensure_running(layout.root, lambda text: None)
        assert refused.value.code == "LOG_CORRUPT" and "aetherd" in refused.value.message
        assert not control.is_up(layout)


def test_another_ticket_key_voids_what_was_given_out_and_nothing_else() -> None:
    with running() as layout:
        before = run_job(layout, "one")
        stop(layout)
        (layout.keys / "tickets.key").unlink()
        control.ensure_running(layout.root, lambda text: None)
        with Client(state=layout.root) as client:
            assert client.get(before).state == "succeeded"
        run_job(layout, "two")


def test_a_policy_of_ones_own_counts_from_the_next_start() -> None:
    """`policy/policy.cedar`: one that permits reading alone, and one that does not parse."""
    with running() as layout:
        run_job(layout, "one")
        stop(layout)
        layout.policy.write_text(
            '@id("look") permit (principal, action in [Action::"open", Action::"read"], resource);'
        )
        layout.policy.chmod(0o644)
        control.ensure_running(layout.root, lambda text: None)
        with Client(state=layout.root) as client:
            assert client.list().jobs
            with pytest.raises(AetherError) as refused:
                client.run(["/bin/true"])
        assert refused.value.code == "POLICY_DENIED"
