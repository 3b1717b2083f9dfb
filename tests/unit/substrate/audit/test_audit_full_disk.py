"""A full disk: what was accepted still gets its outcome, what was not is refused, nothing is lost.

On a small tmpfs in a private mount namespace (`unshare -m`), so that nothing outside is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SCRIPT = textwrap.dedent(
    """
    import asyncio, os, shutil, sys
    from pathlib import Path
    from tests.unit.substrate.audit.audit_kit import SIGNER, ORIGIN, open_log, plain, fill, intent
    from msgspec.structs import replace
    from aether.contract.errors import AetherError
    from aether.contract.limits import MIB, OUTCOME_BYTES_RESERVED
    from aether.substrate.audit.room import Bounds
    from aether.substrate.audit.verify import verify_log

    BOUNDS = Bounds(segment_bytes=2 * MIB, frame_bytes=256 * 1024, headroom_bytes=1 * MIB, step_bytes=256 * 1024)
    DISK, OPEN_JOBS = Path(sys.argv[1]), 300
    (DISK / "log").mkdir()
    log_dir = DISK / "log"

    def fill_disk():
        # another process, a job say, takes every byte it can get
        with open(DISK / "junk", "ab", buffering=0) as junk:
            for size in (1 << 20, 4096, 1):
                try:
                    while True:
                        junk.write(bytes(size))
                except OSError:
                    pass

    def outcome(index):
        # close to what is reserved per job
        return replace(plain(index, "job.outcome", padding=14_000), job_id="job-x")

    def refused(log):
        try:
            log.append(intent)
        except AetherError as error:
            return error.code

    async def admit(log, count):
        for number in range(count):
            assert log.room(), number
            log.reserve(number + 1)
            await log.durable(log.append(intent))

    async def run():
        log = open_log(log_dir, bounds=BOUNDS, disk_free_bytes_min=4 * MIB)
        await admit(log, OPEN_JOBS)
        fill_disk()
        await asyncio.sleep(0.15)
        assert not log.room()
        while (code := refused(log)) is None:
            await log.durable(log.size - 1)
        assert code == "DISK_FULL", code
        try:
            log.store_document(bytes(64 * 1024))
            raise SystemExit("a document fitted on a full disk")
        except AetherError as error:
            assert error.code == "DISK_FULL"
        for kind in ("ticket.revoked", "cell.freed", "cell.lost", "egress.closed"):
            for _ in range(200):
                log.append(lambda index: plain(index, kind, padding=1_900))
            await log.durable(log.size - 1)
        for left in range(OPEN_JOBS // 2, 0, -1):
            log.append(outcome)
            if left % 8 == 0:
                await log.durable(log.size - 1)
        await log.durable(log.size - 1)
        size = log.size
        log.close()
        # a new process on the same full disk: the room is still there
        log = open_log(log_dir, bounds=BOUNDS, disk_free_bytes_min=4 * MIB)
        assert log.size == size, (log.size, size)
        log.reserve(OPEN_JOBS // 2)
        assert not log.room()
        for left in range(OPEN_JOBS // 2, 0, -1):
            await log.durable(log.append(outcome))
            log.reserve(left - 1)
        (DISK / "junk").unlink()
        for _ in range(30):
            await asyncio.sleep(0.1)
            if log.room():
                break
        assert log.room()
        await log.durable(log.append(intent))
        size = log.size
        log.close()
        found = verify_log(log_dir, str(SIGNER.verifier))
        assert found.facts["size"] == size and found.facts["checkpoint_size"] == size, found.facts
        assert {p.code for p in found.problems} <= {"DOCUMENT_MISSING"}, found.problems
        print("good", size)

    asyncio.run(run())
    """
)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs in its own mount namespace")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
def test_accepted_jobs_get_their_outcome_on_a_full_disk(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o size=24m tmpfs {disk} && exec {sys.executable} {script} {disk}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("good")
    assert not list(disk.iterdir())
