"""Starting cells in tests: as root with a block of ids, and as an ordinary user; with each executor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from aether.spawner.linux import landlock, native, probe

SOURCE = Path(native.__file__).parents[3]
PYTHON = "/usr/bin/python3"
ORDINARY = 65533
INIT: str | None = os.environ.get("AETHER_TEST_INIT")
"""Another build of aether-init to test, such as one under sanitizers."""
BLOCK = 0x7A00_0000
"""Where the ids of cells begin that `cellhost` starts as root."""


@dataclass(frozen=True)
class Result:
    """`out` is what the executables wrote; `events` what PID 1 reported; `pid` that of PID 1 on the host."""

    out: str
    events: list[dict[str, Any]]
    pid: int
    host_ns: dict[str, int]

    def of(self, kind: str, exec_id: str | None = None) -> dict[str, Any]:
        found = [e for e in self.events if e["kind"] == kind and exec_id in (None, e.get("exec_id"))]
        assert len(found) == 1, (kind, exec_id, self.events)
        return found[0]

    def json(self) -> Any:
        assert self.of("Exited", "first")["code"] == 0, self
        return json.loads(self.out)


@dataclass(frozen=True)
class Host:
    """A way to start cells: `executor`, and as `user` or root."""

    executor: str
    user: bool
    directory: str

    def request(self, argv: list[str], **request: Any) -> dict[str, Any]:
        body = {"executor": self.executor, "argv": argv, **request}
        if self.user and os.geteuid() == 0:
            body |= {"uid": ORDINARY, "gid": ORDINARY}
        command = [PYTHON, "-IS", "-c", _START.format(self.directory), f"{self.directory}/cellhost.py"]
        done = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def run(self, argv: list[str], **request: Any) -> Result:
        answer = self.request(argv, **request)
        assert "events" in answer, answer
        return Result(answer["output"], answer["events"], answer["pid"], answer["host_ns"])

    def python(self, code: str, **request: Any) -> Result:
        return self.run([PYTHON, "-IS", "-c", code], **request)


_START = "import sys, runpy; sys.path.insert(0, {!r}); runpy.run_path(sys.argv[1], run_name='__main__')"


def readable_copy() -> Iterator[str]:
    """The spawner's part of the package where an ordinary user may read it."""
    directory = Path(tempfile.mkdtemp(prefix="aether-cells-"))
    try:
        for part in (
            "__init__.py",
            "contract/__init__.py",
            "contract/cellplan.py",
            "contract/cellids.py",
            "contract/limits.py",
            "contract/planfields.py",
            "spawner/__init__.py",
        ):
            target = directory / "aether" / part
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCE / "aether" / part, target)
        for part in ("spawner/linux", "spawner/native"):
            shutil.copytree(SOURCE / "aether" / part, directory / "aether" / part)
        shutil.copyfile(Path(__file__).with_name("cellhost.py"), directory / "cellhost.py")
        if INIT is not None:
            shutil.copyfile(INIT, directory / "aether/spawner/native/aether-init")
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755)
        yield str(directory)
    finally:
        shutil.rmtree(directory)


@cache
def missing() -> dict[str, dict[str, str]]:
    """What this host cannot enforce; probed once."""
    found: dict[str, dict[str, str]] = probe.probe()["missing"]
    return found


def abi() -> int:
    """Landlock ABI of this kernel, 0 without."""
    return landlock.probe_abi()


def variants() -> list[Any]:
    """Executor and identity, to parametrise a fixture with."""
    kinds = [(executor, user) for executor in ("native", "portable") for user in (False, True)]
    return [pytest.param(kind, id=f"{kind[0]}-{'user' if kind[1] else 'root'}") for kind in kinds]


def open_host(executor: str, user: bool, directory: str) -> Host:
    """Skips, with the reason, what this machine cannot do."""
    if not user and os.geteuid() != 0:
        pytest.skip("a block of ids needs root")
    if executor == "native" and not os.access(native.BINARY, os.X_OK):
        pytest.skip("aether-init is not built: make -C src/aether/spawner/native")
    lack = missing().get("cell") or (missing().get("userns") if user else None)
    if lack:
        pytest.skip(f"{lack['reason']}: {lack['remedy']}")
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is missing")
    return Host(executor, user, directory)
