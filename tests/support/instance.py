"""A real instance for tests: its own state directory, the real roles, nothing left at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from aether.client import Client
from aether.contract.paths import Layout
from aether.daemons import control
from tests.support import machine


@contextlib.contextmanager
def running() -> Iterator[Layout]:
    """Starts an instance and stops it; asserts that no process, cgroup or mount of it is left."""
    state = Path(tempfile.mkdtemp(prefix="aether-test-"))
    layout = Layout(state)
    marks: list[str] = []
    try:
        control.ensure_running(state, lambda text: None)
        marks = instance_marks(layout)
        yield layout
        marks = [*marks, *instance_marks(layout)]
    finally:
        with contextlib.suppress(Exception):
            control.down(state)
        left = leftovers(layout, marks)
        if os.environ.get("AETHER_KEEP_STATE") is None:
            shutil.rmtree(state, ignore_errors=True)
    assert not left, left


def instance_marks(layout: Layout) -> list[str]:
    """The spawner's instance ids, which its cgroups and work directories carry."""
    with contextlib.suppress(OSError):
        return (layout.cells / ".instances").read_text().split()
    return []


def leftovers(layout: Layout, marks: list[str]) -> list[str]:
    """What an instance that ended should not have left behind."""
    found = [f"process {pid} {machine.argv_of(pid)}" for pid in machine.mentioning(str(layout.root))]
    for mark in marks:
        found += [f"cgroup {path}" for path in machine.cgroups(mark)]
    found += [f"mount {line}" for line in machine.mounts(str(layout.root))]
    cells = layout.cells
    if cells.is_dir():
        found += [f"work directory {path}" for path in cells.iterdir() if not path.name.startswith(".")]
    return found


def role_pid(layout: Layout, role: str) -> int | None:
    """The pid of a role as the supervisor noted it."""
    with contextlib.suppress(OSError, ValueError):
        pid = json.loads(layout.instance_file.read_text())["roles"].get(role)
        return int(pid) if pid is not None else None
    return None


def client(layout: Layout) -> Client:
    return Client(state=layout.root)
