"""Python jobs by the real command: a started interpreter in a prepared cell, in place of a cold one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from aether.contract.cells import Interpreter
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.paths import Layout
from tests.support import instance

AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def aether(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env)


def test_jobs_one_after_the_other_share_nothing(layout: Layout) -> None:
    code = "import builtins, os, sys; print(hasattr(builtins, 'mark'), os.listdir('/work'), sys.argv[1:]); "
    code += "builtins.mark = 1; open('/work/mark', 'w').close(); sys.exit(int(sys.argv[1]))"
    for number in (3, 4, 5):
        done = aether(layout, "run", "--python", "--", "-c", code, str(number))
        assert (done.returncode, done.stdout) == (number, f"False [] ['{number}']\n"), done.stderr


def test_files_outputs_and_the_receipt(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("import helper, pathlib\npathlib.Path('out.txt').write_text(helper.text)\n")
    (tmp_path / "helper.py").write_text("text = 'made'\n")
    words = ["run", "--python", "--import", "json", "--dir", str(tmp_path), "--output", "out.txt"]
    done = aether(layout, *words, "--output-dir", str(tmp_path), "--json", "--", "main.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_text() == "made"
    job = json.loads(done.stdout)
    verified = aether(layout, "verify", job["job_id"])
    assert verified.returncode == 0, verified.stdout


def test_a_script_that_runs_too_long_is_ended(layout: Layout) -> None:
    done = aether(layout, "run", "--timeout", "300ms", "--python", "--", "-c", "import time; time.sleep(60)")
    assert done.returncode == 124


def test_a_limit_holds_for_a_started_interpreter(client: Client) -> None:
    from aether.contract.cells import Limits

    job = client.run(["-c", "x = bytearray(400 << 20)"], python=Interpreter(), limits=Limits(memory_bytes=64 << 20))
    assert job.state is JobState.FAILED


@pytest.mark.parametrize(
    ("argv", "imports"),
    [(["-x"], ()), (["-c"], ()), (["main.py"], ("a-b",)), (["main.py"], ("os; evil",)), (["main.py"], ("x",) * 17)],
)
def test_bad_requests_are_refused(client: Client, argv: list[str], imports: tuple[str, ...]) -> None:
    with pytest.raises(AetherError) as refused:
        client.run(argv, python=Interpreter(imports=imports))
    assert refused.value.code == "BAD_FIELD"
