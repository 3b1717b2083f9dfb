"""What a job may keep on disk, end to end: told as its own error, and by which means it is held."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.contract.paths import Layout
from tests.support import instance

AETHER = Path(sys.executable).with_name("aether")
FILL = "head -c 60M /dev/zero > big; sleep 20"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


def aether(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env)


def test_a_job_above_its_bound_fails_by_name(layout: Layout) -> None:
    done = aether(layout, "run", "--disk", "20M", "--", "sh", "-c", FILL)
    assert done.returncode == 128 + signal.SIGKILL, done
    assert "DISK_LIMIT" in done.stderr and "--disk" in done.stderr
    (job,) = json.loads(aether(layout, "job", "list", "--only", "failed", "--json").stdout)["jobs"]
    assert job["state"] == "failed" and job["error"]["code"] == "DISK_LIMIT"


def test_an_allocated_cell_is_bounded_as_a_whole(layout: Layout) -> None:
    assert aether(layout, "cell", "allocate", "box", "--disk", "20M").returncode == 0
    shown = json.loads(aether(layout, "cell", "show", "box", "--json").stdout)
    assert shown["limits"]["disk_bytes"] == 20 * 1024 * 1024
    done = aether(layout, "cell", "exec", "box", "--", "sh", "-c", FILL)
    assert done.returncode == 128 + signal.SIGKILL and "DISK_LIMIT" in done.stderr, done


def test_a_bound_below_the_least_is_refused(layout: Layout) -> None:
    done = aether(layout, "run", "--disk", "1000", "--", "true")
    assert done.returncode == 2 and "disk_bytes" in done.stderr
