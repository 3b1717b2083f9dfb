"""Levels and drivers by the real command: chosen, shown before they run, told in the receipt, refused when absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from aether.contract.cells import SandboxReport
from aether.contract.paths import Layout
from aether.contract.records import Receipt
from aether.spawner.linux.oci import KINDS, find_runtimes
from tests.support import cells, instance

AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture(params=KINDS)
def runtime(request: pytest.FixtureRequest) -> str:
    found = find_runtimes(os.environ)[request.param]
    if found.reason:
        pytest.skip(f"{found.reason}: {found.remedy}")
    return str(request.param)


def aether(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env)


def sandbox_of(layout: Layout, job_id: str) -> SandboxReport:
    """The report that the receipt carries."""
    text = aether(layout, "receipt", "show", job_id, "--json").stdout
    documents = msgspec.json.decode(text, type=Receipt).documents.values()
    found = next(document for document in documents if '"enforced"' in document)
    return msgspec.json.decode(found, type=SandboxReport)


def test_a_runtime_runs_the_job_and_the_receipt_names_it(layout: Layout, runtime: str) -> None:
    done = aether(layout, "run", "--json", "--driver", runtime, "--", "sh", "-c", "echo made > out; exit 4")
    job = json.loads(done.stdout)
    assert done.returncode == 4, done.stderr
    sandbox = sandbox_of(layout, job["job_id"])
    assert sandbox.executor.startswith(f"{runtime} ") and sandbox.enforced[runtime] == sandbox.executor
    assert sandbox.level == ("gvisor" if runtime == "runsc" else "cell")
    assert sandbox.enforced["seccomp"] == "cell" and sandbox.enforced["no_capabilities"]
    assert ("landlock" in sandbox.missing) == (runtime == "runsc" or "landlock" in cells.missing())


def test_memory_is_bounded_and_the_kill_is_told(layout: Layout, runtime: str) -> None:
    script = "import sys; b = bytearray(400 << 20); print(len(b))"
    words = ("run", "--json", "--driver", runtime, "--memory", "256M", "--", "/usr/bin/python3", "-c", script)
    job = json.loads(aether(layout, *words).stdout)
    assert job["state"] == "failed", job


def test_the_bundle_is_shown_before_it_runs(layout: Layout, runtime: str) -> None:
    shown = aether(layout, "cell", "explain", "--driver", runtime, "--", "true").stdout
    config = json.loads(shown.partition("config.json:\n")[2])
    assert config["process"]["noNewPrivileges"] and config["root"]["path"] == "rootfs"
    assert "config.json" not in aether(layout, "cell", "explain", "--", "true").stdout


def test_gvisor_is_another_kernel(layout: Layout) -> None:
    found = find_runtimes(os.environ)["runsc"]
    done = aether(layout, "run", "--require", "gvisor", "--", "uname", "-r")
    if found.reason:
        assert done.returncode != 0 and found.reason in done.stderr and "remedy" in done.stderr
    else:
        assert done.stdout.strip() and done.stdout.strip() != os.uname().release


@pytest.mark.parametrize("level", ["microvm", "pod"])
def test_levels_without_a_driver_are_refused(layout: Layout, level: str) -> None:
    done = aether(layout, "run", "--require", level, "--", "true")
    assert done.returncode != 0 and f"required level {level}" in done.stderr and "remedy" in done.stderr


def test_doctor_has_a_row_for_each_runtime(layout: Layout) -> None:
    checks = json.loads(aether(layout, "doctor", "--json").stdout)["checks"]
    assert {f"driver {kind}" for kind in KINDS} <= {check["name"] for check in checks}
