"""An instance of an ordinary user: one uid, no limits from cgroups, the same cells; and it says what it lacks."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import aether
from aether.contract.paths import Layout
from aether.substrate.audit.verify import verify_log, verify_receipt
from tests.simulation.evidence import records
from tests.support import subids
from tests.support.cells import PYTHON, missing
from tests.support.instance import leftovers

UID = 65_533
SCRIPT = """
import base64, json, sys
from pathlib import Path
import msgspec
from aether.client import Client
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.network import Network
from aether.daemons import control

def lent(client):
    # An allocated cell with a network, whose files the spawner reads and removes.
    client.cells.allocate("session", network=Network(allow=("a.test:80",)))
    client.cells.put("session", "deep", b"put")
    words = "exec 2>&1; cat deep; echo; touch own; curl -sS http://b.test/ || echo no curl"
    job = client.wait(client.cells.start("session", ["/bin/sh", "-c", words]).job_id)
    files = {entry.name: entry.size_bytes for entry in client.cells.files("session").entries}
    client.cells.free("session", grace_ms=0)
    return [b"".join(client.logs(job.job_id)).decode(), files]


state, found = Path(sys.argv[1]), {}
control.ensure_running(state, lambda text: None)
try:
    with Client(state=state) as client:
        words = "id -u; head -c 1000 /dev/zero > out.bin; test -r /etc/shadow && echo shadow; exit 3"
        job = client.run(["/bin/sh", "-c", words], outputs=["*.bin"])
        found["job"] = msgspec.to_builtins(client.get(job.job_id))
        found["output"] = b"".join(client.logs(job.job_id)).decode()
        found["artifact_bytes"] = [len(client.artifact_bytes(ref.digest)) for ref in job.artifacts]
        found["receipt"] = base64.b64encode(client.receipt_bytes(job.job_id)).decode()
        late = client.run(["/bin/sleep", "30"], limits=Limits(timeout_ms=200))
        found["late"] = [str(late.state), late.usage.wall_us]
        try:
            client.run(["/bin/true"], require=["cgroup-memory"])
        except AetherError as error:
            found["required"] = [error.code, error.message]
        words = "exec 2>&1; curl -sS http://b.test/ || echo no curl"
        asked = client.run(["/bin/sh", "-c", words], network=Network(allow=("a.test:80",)))
        rows = client.egress(asked.job_id).connections
        found["egress"] = [b"".join(client.logs(asked.job_id)).decode(), [[row.host, row.reason] for row in rows]]
        if len(sys.argv) > 2:
            found["lent"] = lent(client)
        found["checks"] = list(msgspec.to_builtins(client.doctor().checks))
finally:
    found["marks"] = (state / "cells/.instances").read_text().split()
    control.down(state)
print(json.dumps(found))
"""


def readable(path: Path) -> bool:
    """Whether anybody may read what is below `path`."""
    return all(part.stat().st_mode & 0o005 == 0o005 for part in (path, *path.parents))


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """An empty directory of the ordinary user, removed at the end."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become an ordinary user; the other tests are rootless then")
    base = Path(tempfile.mkdtemp(prefix="aether-rootless-"))
    try:
        os.chown(base, UID, UID)
        yield base
    finally:
        shutil.rmtree(base)


def code_paths(place: Path) -> list[Path]:
    """Where an ordinary user finds the package and its libraries; skips when there is no interpreter for them."""
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is missing")
    asked = subprocess.run([PYTHON, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    if asked.stdout.split() != [str(part) for part in sys.version_info[:2]]:
        pytest.skip(f"{PYTHON} is another version than the libraries are for")
    source = Path(aether.__file__).parent
    copied = place / "lib"
    shutil.copytree(source, copied / "aether", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for path in (copied, *copied.rglob("*")):
        path.chmod(0o755)
    libraries = [Path(path) for path in site.getsitepackages() if Path(path).is_dir()]
    if not all(map(readable, libraries)):
        pytest.skip(f"the libraries in {', '.join(map(str, libraries))} cannot be read by an ordinary user")
    return [copied, *libraries]


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, Any]:
    """What an instance of the ordinary user did; it has ended and left nothing."""
    return use(place, code_paths(place), [], {"user": UID, "group": UID, "extra_groups": []})


@pytest.fixture(scope="module")
def lent(place: Path) -> dict[str, Any]:
    """The same by a user to whom ids are lent, and what they give besides."""
    subids.needed()
    for name in ("files", "lent"):
        (place / name).mkdir()
    os.chown(place / "lent", UID, UID)
    return use(place / "lent", code_paths(place), [*subids.lending(UID, place / "files")], {})


def use(place: Path, paths: list[Path], prefix: list[str], whose: dict[str, Any]) -> dict[str, Any]:
    env = {"PATH": "/usr/sbin:/usr/bin:/bin", "HOME": str(place), "PYTHONPATH": ":".join(map(str, paths))}
    more = ["lent"] if prefix else []
    done = subprocess.run(
        [*prefix, PYTHON, "-c", SCRIPT, str(place / "state"), *more],
        capture_output=True, text=True, timeout=90, env=env, cwd="/", **whose,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert not leftovers(Layout(place / "state"), answer["marks"])
    return answer


def sandbox(found: dict[str, Any]) -> dict[str, Any]:
    """The report that the receipt commits to."""
    receipt = msgspec.json.decode(msgspec.json.decode(json.dumps(found["receipt"]), type=bytes))
    outcome = json.loads(receipt["entries"][-1]["entry"])
    report: dict[str, Any] = json.loads(receipt["documents"][outcome["code"]["sandbox_digest"]])
    return report


def test_a_job_runs_and_is_measured(found: dict[str, Any]) -> None:
    job = found["job"]
    assert (job["state"], job["exit_code"], job["error"]["code"]) == ("failed", 3, "JOB_FAILED")
    assert "shadow" not in found["output"] and found["artifact_bytes"] == [1000]
    usage = job["usage"]
    assert usage["wall_us"] > 0 and usage["cpu_user_us"] is not None and usage["stdout_bytes"] == len(found["output"])
    for name, basis in usage["basis"].items():
        assert basis == "measured" and usage[name] is not None
    assert usage["memory_peak_bytes"] is None, "nobody measured it, so nobody says it"
    state, wall_us = found["late"]
    assert state == "timed_out" and wall_us < 10_000_000


def test_the_cell_is_a_cell_where_the_kernel_lets_users_make_one(found: dict[str, Any]) -> None:
    report = sandbox(found)
    assert report["enforced"]["no_new_privs"] is True
    if not missing().get("userns"):
        assert report["level"] == "cell" and report["enforced"]["netns"] is True
        assert found["output"].split()[0] not in ("0", str(UID)), "not the user's own uid inside"
    else:
        assert "cell" in report["missing"]


def test_the_receipt_says_that_there_is_one_uid(found: dict[str, Any]) -> None:
    assert "share one uid" in sandbox(found)["missing"]["own-uids"]


def test_limits_without_cgroups_are_said_to_be_missing(found: dict[str, Any]) -> None:
    report = sandbox(found)
    checks = {check["name"]: check for check in found["checks"]}
    for limit, mechanism in (("memory_bytes", "memory"), ("cpu_millis", "cpu"), ("pids", "pids")):
        check = checks[f"cgroup limit {limit}"]
        if check["ok"]:  # the user got a delegated cgroup
            continue
        assert check["reason"] and check["remedy"]
        assert report["missing"][f"cgroup-{mechanism}"]
        assert f"cgroup-{mechanism}" not in report["enforced"]
    if not checks["cgroup limit memory_bytes"]["ok"]:
        code, message = found["required"]
        assert code == "LEVEL_UNMET" and "cgroup-memory" in message


def test_the_receipt_verifies_and_says_one_uid(found: dict[str, Any], place: Path) -> None:
    layout = Layout(place / "state")
    key = layout.audit_public_key.read_text()
    receipt = msgspec.json.decode(json.dumps(found["receipt"]), type=bytes)
    assert verify_receipt(receipt, key).ok
    assert verify_log(layout.audit, key).ok
    started = [record for record in records(layout) if record.type == "job.started"]
    commands = [record for record in started if record.kind == "command"]
    assert {record.detail["host_uid"] for record in commands} == {str(UID)}
    owners = {path.stat().st_uid for path in layout.root.rglob("*") if not path.is_symlink()}
    assert owners == {UID}


def test_a_network_is_served_without_root(found: dict[str, Any]) -> None:
    text, rows = found["egress"]
    if "no curl" in text:
        pytest.skip("curl is not installed")
    assert text == "aether: no rule allows b.test:80\n"
    assert rows == [["b.test", "not-allowed"]]


def test_lent_ids_give_each_cell_its_own(lent: dict[str, Any], place: Path) -> None:
    report = sandbox(lent)
    if report["level"] != "cell":
        pytest.skip("users make no cells here")
    assert "own-uids" not in report["missing"] and "daemon-uids" in report["missing"]
    layout = Layout(place / "lent/state")
    started = [record for record in records(layout) if record.type == "job.started" and record.kind == "command"]
    uids = [int(record.detail["host_uid"] or 0) for record in started]
    assert len(uids) >= 4 and all(subids.FIRST < uid < subids.FIRST + subids.COUNT for uid in uids)
    owners = {path.stat().st_uid for path in layout.root.rglob("*") if not path.is_symlink()}
    assert owners == {UID}, "nothing of a cell is left behind under its ids"
    checks = {check["name"]: check for check in lent["checks"]}
    assert checks["ids"]["value"] == f"ids of their own for {subids.COUNT // 2} cells"


def test_with_lent_ids_an_allocated_cell_has_a_network(lent: dict[str, Any]) -> None:
    if sandbox(lent)["level"] != "cell":
        pytest.skip("users make no cells here")
    text, files = lent["lent"]
    assert text.split("\n")[0] == "put" and files["deep"] == 3 and files["own"] == 0
    assert "no rule allows b.test:80" in text or "no curl" in text


def test_without_lent_ids_doctor_has_the_remedy(found: dict[str, Any]) -> None:
    check = {check["name"]: check for check in found["checks"]}["ids"]
    assert check["value"] == "one uid for all cells" and "usermod --add-subuids" in check["remedy"]
