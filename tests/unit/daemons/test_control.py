"""Starting and stopping a real instance where something is in the way, and seeing what is left behind."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import control
from tests.support import instance


@pytest.fixture
def closed() -> Iterator[Layout]:
    """A state directory below one that nobody else may enter, as in a home."""
    with tempfile.TemporaryDirectory(prefix="aether-test-") as parent:
        Path(parent).chmod(0o700)
        yield Layout(Path(parent) / "state")


def quiet(_: str) -> None:
    pass


def test_below_a_closed_directory_everything_works(closed: Layout) -> None:
    control.ensure_running(closed.root, quiet)
    try:
        with Client(state=closed.root) as client:
            job = client.run(["/bin/sh", "-c", "echo hi; echo out > out.txt"], outputs=["*.txt"])
            assert (job.state, b"".join(client.logs(job.job_id))) == ("succeeded", b"hi\n")
            assert client.artifact_bytes(job.artifacts[0].digest) == b"out\n"
            assert client.models()
    finally:
        control.down(closed.root)
    assert not instance.leftovers(closed, [])


def test_what_is_left_behind_is_seen() -> None:
    with instance.running() as layout:
        marks = instance.instance_marks(layout)
        assert len(marks) == 1 and len(marks[0]) == 8
        with Client(state=layout.root) as client:
            job = client.run(["/bin/sleep", "60"], wait=False)
            while client.get(job.job_id).state != "running":
                time.sleep(0.02)
            found = [line.split()[0] for line in instance.leftovers(layout, marks)]
            assert {"process", "work"} <= set(found)
            if any(check["name"].startswith("cgroup ") and check["ok"] for check in client.doctor().checks):
                assert "cgroup" in found


def test_a_key_that_others_can_read_is_named_with_the_remedy(closed: Layout) -> None:
    control.ensure_running(closed.root, quiet)
    control.down(closed.root)
    key = closed.keys / "audit.key"
    key.chmod(0o644)
    began = time.monotonic()
    with pytest.raises(AetherError) as refused:
        control.ensure_running(closed.root, quiet)
    assert time.monotonic() - began < control.START_TIMEOUT_S / 2
    assert refused.value.code == "STATE_UNUSABLE"
    assert "aetherd" in refused.value.message and refused.value.remedy == f"chmod 600 {key}"
    assert not control.is_up(closed), "what was started here is stopped again"
    key.chmod(0o600)
    control.ensure_running(closed.root, quiet)
    control.down(closed.root)


def test_the_spawners_own_words_are_shown(closed: Layout) -> None:
    closed.cells.mkdir(parents=True)
    (closed.cells / ".lock").mkdir()
    with pytest.raises(AetherError) as refused:
        control.ensure_running(closed.root, quiet)
    assert "spawner: aether-spawner: " in refused.value.message and ".lock" in refused.value.message
    assert not control.is_up(closed)


def test_a_path_that_is_too_long_for_sockets_says_so(closed: Layout) -> None:
    with pytest.raises(AetherError, match="bytes, and the kernel takes 107") as refused:
        control.ensure_running(closed.root / ("x" * 90), quiet)
    assert refused.value.code == "STATE_UNUSABLE" and "shorter" in refused.value.remedy
    assert not (closed.root / ("x" * 90) / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use any directory")
def test_a_directory_of_somebody_else_is_refused() -> None:
    with pytest.raises(AetherError) as refused:
        control.ensure_running(Path("/proc/1/aether"), quiet)
    assert refused.value.code == "STATE_UNUSABLE"
