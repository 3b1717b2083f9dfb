"""What a daemon that gives up root can still reach; the real mounts, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aether.daemons.view import closed_ancestors

CHILD = """
import os, sys
from pathlib import Path
from aether.daemons import view
state = Path(sys.argv[1])
view.open_up(state)
os.setgroups([]); os.setresgid(64999, 64999, 64999); os.setresuid(64999, 64999, 64999)
import encodings.utf_16_be, this  # read late, after the uid changed
print((state / "inside").read_text(), (state.parent / "private").exists())
"""


def test_closed_ancestors_are_the_outermost(tmp_path: Path) -> None:
    home = tmp_path / "home"
    inner = home / "inner"
    inner.mkdir(parents=True)
    tmp_path.chmod(0o755)
    home.chmod(0o700)
    inner.chmod(0o700)
    found = closed_ancestors([inner / "venv", inner / "state"])
    outermost = next(iter(found))
    assert outermost == home or not outermost.stat().st_mode & 0o001
    assert sorted(found[outermost]) == [inner / "state", inner / "venv"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts and another uid")
def test_another_uid_reads_the_interpreter_and_the_state_and_no_more(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "private").write_text("x")
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    (state / "inside").write_text("here")
    (state / "inside").chmod(0o644)
    run = subprocess.run([sys.executable, "-c", CHILD, str(state)], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["here", "False"]
    assert (tmp_path / "private").exists()
