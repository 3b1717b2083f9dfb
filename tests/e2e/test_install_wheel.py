"""`pip install` from a checkout as somebody gets it: the wheels, and `aether` from a virtual environment elsewhere.

Needs git, and a package registry for what AetherOS depends on; skipped with the reason where there is none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.contract.paths import Layout
from bench import sample
from tests.support import instance

ROOT = Path(__file__).parents[2]
INIT = "aether/spawner/native/aether-init"
OFFLINE = ("No matching distribution found", "Could not find a version", "ConnectionError", "Max retries exceeded")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def away() -> Iterator[Path]:
    """A directory outside the checkout that other uids can enter."""
    path = Path(tempfile.mkdtemp(prefix="aether-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def checkout(away: Path) -> Path:
    """What git would give: tracked files and new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip(f"needs a git checkout: {listed.stderr.decode().strip()}")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (away / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, away / "src" / name)
    return away / "src"


@pytest.fixture(scope="module")
def python(away: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", away / "venv"], check=True, timeout=60)
    return away / "venv/bin/python"


def pip(python: Path, *words: str | Path, **env: str) -> None:
    argv = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *words]
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "AETHER"))}
    done = subprocess.run(
        argv, cwd=python.parent, env={**surroundings, **env}, capture_output=True, text=True, timeout=300, check=False
    )
    if any(word in done.stderr for word in OFFLINE):
        pytest.skip(f"needs a package registry: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def build(python: Path, checkout: Path, into: str, **env: str) -> tuple[Path, set[str]]:
    """The wheel of `checkout` and the names in it."""
    directory = checkout.parent / into
    pip(python, "wheel", "--no-deps", "--wheel-dir", directory, checkout, **env)
    (wheel,) = directory.glob("*.whl")
    names = {name.partition(".data/purelib/")[2] or name for name in zipfile.ZipFile(wheel).namelist()}
    return wheel, names


@pytest.fixture(scope="module")
def pure(python: Path, checkout: Path) -> Path:
    """Built where there is no compiler, beside a module that is gone at the next build."""
    stale = checkout / "src/aether/stale.py"
    stale.write_text('"""Not there any more."""\n')
    wheel, names = build(python, checkout, "pure", PATH=str(python.parent))
    stale.unlink()
    assert "aether/stale.py" in names and INIT not in names
    assert wheel.name.endswith("-py3-none-any.whl") and "aether/runtime/node/proxy.cjs" in names
    return wheel


@pytest.fixture(scope="module")
def native(python: Path, checkout: Path, pure: Path) -> Path:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    wheel, names = build(python, checkout, "native")
    assert "aether/stale.py" not in names, "what an earlier build left went into the wheel"
    assert INIT in names and "-py3-none-linux_" in wheel.name
    assert {
        "aether/py.typed",
        "aether/samples/pendulum/1.0.0/manifest.json",
        "aether/samples/keys/aether-samples.pub",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/", "examples/"))]
    return wheel


class Installed:
    """The `aether` of a virtual environment, used from a directory of its own."""

    def __init__(self, python: Path, state: Path) -> None:
        self.layout = Layout(state)
        self._aether = python.with_name("aether")
        self._cwd = python.parent
        self._env = {"PATH": "/usr/bin:/bin", "HOME": str(state.parent), "AETHER_STATE": str(state)}

    def __call__(self, *words: str, code: int = 0) -> str:
        argv = [self._aether, *words]
        done = subprocess.run(
            argv, cwd=self._cwd, env=self._env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))


def use(aether: Installed) -> dict[str, dict[str, Any]]:
    """Up, a command, a forecast of the sample model, a receipt, down; what `aether doctor` said by name."""
    aether("up")
    marks = instance.instance_marks(aether.layout)
    try:
        assert aether("run", "--", "/bin/echo", "hello") == "hello\n"
        request = aether.layout.root.parent / "inputs.json"
        request.write_text(json.dumps(json.loads(sample.predict_request()[1])["inputs"]))
        forecast = aether.json("predict", "pendulum", "--input", str(request), "--horizon", "0.1")
        assert len(forecast["predictions"]) == 1
        with instance.client(aether.layout) as client:
            checks = {str(check["name"]): dict(check) for check in client.doctor().checks}
        job_id = aether.json("job", "list")["jobs"][0]["job_id"]
        receipt = aether.layout.root.parent / "receipt.json"
        receipt.write_text(aether("receipt", "show", job_id, "--json"))
        aether("verify", str(receipt), "--key", str(aether.layout.audit_public_key))
    finally:
        aether("down")
    assert not instance.leftovers(aether.layout, marks)
    return checks


def test_installed_with_the_native_init(away: Path, python: Path, native: Path) -> None:
    pip(python, "install", native)
    assert use(Installed(python, away / "native-state"))["native-init"]["ok"]


def test_installed_without_a_compiler(away: Path, python: Path, pure: Path) -> None:
    pip(python, "install", pure)
    pip(python, "install", "--no-deps", "--force-reinstall", pure)
    found = use(Installed(python, away / "pure-state"))["native-init"]
    assert not found["ok"] and found["remedy"]
