"""Limits where all controllers are on cgroup v2: in a guest, since a host has each of them on one hierarchy only.

`make test-v2` runs the whole cell suite there; this is its short form, where there is QEMU and a kernel for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_limits_on_cgroup_v2_alone() -> None:
    if "AETHER_GUEST" in os.environ:
        pytest.skip("this is the guest")
    if os.geteuid() != 0:
        pytest.skip("the guest reads the host's files as root")
    command = [sys.executable, "-m", "tests.guest.boot", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    last = done.stdout.strip().splitlines()[-1]
    if last.startswith("test-v2 SKIPPED"):
        pytest.skip(last)
    assert done.returncode == 0, done.stdout[-4000:]
    assert int((re.search(r"(\d+) passed", last) or ["", "0"])[1]) >= 15, last
