"""A full disk under a real instance: new work is refused, nothing accepted is lost, and it goes on when there is room.

The state directory is a small tmpfs in a mount namespace of a child process (mount_namespaces(7)), so that nothing
outside is touched; the child does all of it and prints what it saw.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TMPFS_MIB = 192
SCRIPT = textwrap.dedent(
    """
    import contextlib, json, os, sys, time
    from pathlib import Path
    from aether.client import Client
    from aether.contract.errors import AetherError
    from aether.contract.jobs import TERMINAL
    from aether.contract.paths import Layout
    from aether.daemons import control
    from aether.substrate.audit.verify import verify_log, verify_receipt
    from tests.simulation.evidence import duplicates, unfinished
    from tests.support import machine
    from tests.support.instance import instance_marks, leftovers, role_pid

    state = Path(sys.argv[1])
    layout, filler, seen = Layout(state), state / "filler", {}
    LOW_BYTES, FORBIDDEN = 24 << 20, ["/bin/sleep", "987.5"]

    def fill(keep_bytes):
        # another program takes all the room but that much
        with open(filler, "ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                try:
                    while keep_bytes == 0 or free() > keep_bytes + size:
                        file.write(bytes(size))
                except OSError:
                    pass

    def free():
        found = os.statvfs(state)
        return found.f_bavail * found.f_frsize

    def refusal(work):
        try:
            work()
        except AetherError as error:
            return [error.code, error.kind.http]
        return None

    def submit_slow(client):
        slow = ["/bin/sh", "-c", "sleep 1.5; echo out > out.txt"]
        accepted.extend(client.run(slow, outputs=["*.txt"], wait=False).job_id for _ in range(20))

    def until_refused(client):
        # what was measured just before may still be believed for a moment
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            refused = refusal(lambda: accepted.append(client.run(["/bin/true"], wait=False).job_id))
            if refused is not None:
                return [refused, refusal(lambda: client.run(FORBIDDEN, wait=False))]
            time.sleep(0.05)

    def until_accepted(client):
        # roles that could not go on start again with pauses
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if refusal(lambda: accepted.append(client.run(["/bin/true"], wait=False).job_id)) is None:
                return True
            time.sleep(0.1)

    def left_open(client, within_s):
        deadline, left = time.monotonic() + within_s, set(accepted)
        while left and time.monotonic() < deadline:
            for job_id in list(left):
                with contextlib.suppress(AetherError):
                    if client.get(job_id).state in TERMINAL:
                        left.discard(job_id)
            time.sleep(0.1)
        return len(left)

    accepted = []
    control.ensure_running(state, lambda text: None)
    try:
        with Client(state=state) as client:
            first, ticket = client.run(["/bin/echo", "before"]), client.tickets.mint()
            accepted.append(first.job_id)

            submit_slow(client)
            fill(LOW_BYTES)
            seen["low"] = until_refused(client)
            seen["upload"] = refusal(lambda: client.artifact_put(b"x" * 100))
            seen["reads"] = [
                client.get(first.job_id).state, b"".join(client.logs(first.job_id)).decode(), client.health().status,
                verify_receipt(client.receipt_bytes(first.job_id), layout.audit_public_key.read_text()).ok,
                len(client.list(limit=10).jobs),
            ]
            seen["open_while_low"] = left_open(client, 30)
            filler.unlink()
            seen["after_low"] = until_accepted(client)

            submit_slow(client)
            fill(0)
            seen["free_bytes"] = free()
            pids = {role: role_pid(layout, role) for role in ("spawner", "aetherd")}
            seen["full"] = [refusal(lambda: client.run(FORBIDDEN, wait=False)) for _ in range(3)]
            seen["revoked"] = refusal(lambda: client.tickets.revoke(ticket.link_id))
            time.sleep(3)
            seen["started"] = [pid for pid in machine.mentioning("987.5") if machine.argv_of(pid)[0] == "/bin/sleep"]
            seen["alive"] = all(Path(f"/proc/{pid}").exists() for pid in pids.values())
            filler.unlink()
            seen["after_full"] = until_accepted(client)
            seen["open_at_last"] = left_open(client, 30)
            states = [client.get(job_id) for job_id in accepted]
            seen["states"] = sorted({f"{view.state} {view.error.code if view.error else ''}" for view in states})
            key = layout.audit_public_key.read_text()
            seen["bad_receipts"] = sum(not verify_receipt(client.receipt_bytes(i), key).ok for i in accepted)
            seen["pids"] = all(role_pid(layout, role) for role in ("spawner", "aetherd", "aurorad"))
    except BaseException:
        for log in sorted(layout.daemon_logs.iterdir()):
            print(log.name, log.read_text()[-1500:], file=sys.stderr)
        raise
    finally:
        filler.unlink(missing_ok=True)
        marks = instance_marks(layout)
        if control.is_up(layout):
            control.down(state)
    seen["problems"] = [str(problem) for problem in verify_log(layout.audit, key).problems]
    seen["unfinished"], seen["doubled"] = unfinished(layout), duplicates(layout)
    seen["left"] = [line for line in leftovers(layout, marks) if not line.startswith("mount")]
    print(json.dumps(seen))
    """
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1) to mount a small tmpfs")
    base = tmp_path_factory.mktemp("full")
    base.chmod(0o755)
    script, state = base / "child.py", base / "state"
    script.write_text(SCRIPT)
    state.mkdir()
    shell = 'mount -t tmpfs -o size="$3"m,mode=0755 aether-full "$2" && exec "$0" "$1" "$2"'
    # its own pid namespace: whatever happens to the child, nothing of the instance outlives it
    words = ["unshare", "-mpf", "--kill-child", "--mount-proc", "--propagation", "private", "sh", "-c", shell]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [*words, sys.executable, str(script), str(state), str(TMPFS_MIB)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env, cwd="/")
    if "mount:" in done.stderr and "Traceback" not in done.stderr:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_below_the_watermark_work_is_refused_and_accepted_work_ends(seen: dict[str, Any]) -> None:
    refused = ["DISK_FULL", 507]
    assert seen["low"] == [refused, refused] and seen["upload"] == refused
    assert seen["open_while_low"] == 0, "there is room for what was accepted"
    assert seen["after_low"] is True


def test_reads_go_on(seen: dict[str, Any]) -> None:
    assert seen["reads"] == ["succeeded", "before\n", "ok", True, 10]


def test_on_a_full_disk_nothing_starts_and_the_authority_lives(seen: dict[str, Any]) -> None:
    """The job store cannot grow, so aurorad may be away (503) until there is room."""
    assert seen["free_bytes"] == 0
    assert {tuple(refused) for refused in seen["full"]} <= {("DISK_FULL", 507), ("UNAVAILABLE", 503)}
    assert seen["started"] == [] and seen["alive"]


def test_on_a_full_disk_a_ticket_can_be_revoked(seen: dict[str, Any]) -> None:
    assert seen["revoked"] is None


def test_nothing_accepted_is_lost_and_work_goes_on_when_there_is_room(seen: dict[str, Any]) -> None:
    assert seen["after_full"] is True
    assert (seen["open_at_last"], seen["bad_receipts"]) == (0, 0)
    assert seen["unfinished"] == [] and seen["doubled"] == []
    assert seen["problems"] == [] and seen["left"] == [] and seen["pids"]
