"""The executor suite once more, with an init built under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import nativebuild

ROOT = Path(__file__).parents[2]


def test_the_executor_suite_under_sanitizers(tmp_path: Path) -> None:
    """A finding ends the init, so an event is missing and a test of the suite fails."""
    binary = nativebuild.make("build/aether-init", tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        "native",
        "tests/kernel/test_executor.py",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "AETHER_TEST_INIT": str(binary)},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout
