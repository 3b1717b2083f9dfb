"""Showing what a job writes while it runs, and turning its end into an exit code."""

from __future__ import annotations

import sys
import threading
import time
from typing import BinaryIO, Final

from aether.cli.terminal import TerminalFilter
from aether.client import Client
from aether.contract.errors import EXIT_FAILED, EXIT_TIMEOUT, AetherError
from aether.contract.jobs import JobState, JobView

RESUME_S: Final = 30.0
"""How long a broken stream is resumed before it is given up: a restart of the node takes a few seconds."""
RESUMED: Final = frozenset({"PROTOCOL", "UNREACHABLE", "UNAVAILABLE", "DRAINING", "BUSY", "NOT_READY"})


def copy_stream(client: Client, job_id: str, stream: str, out: BinaryIO, *, follow: bool = True) -> None:
    """Writes one stream of the job to `out` as it comes, resuming at the same byte after a break.

    On a terminal control sequences are made harmless (`cli.terminal`).
    """
    clean = TerminalFilter() if out.isatty() else None
    cursor, broken_since = 0, None
    while True:
        try:
            for chunk in client.logs(job_id, stream=stream, follow=follow, cursor=cursor):
                cursor, broken_since = cursor + len(chunk), None
                out.write(clean.feed(chunk) if clean else chunk)
                out.flush()
            break
        except AetherError as error:
            broken_since = broken_since or time.monotonic()
            if error.code not in RESUMED or time.monotonic() - broken_since > RESUME_S:
                raise
            time.sleep(0.1)
    if clean:
        out.write(clean.end())
        out.flush()


class Follower:
    """Copies stdout and stderr of a job to ours in two threads; `finish` waits for what is left."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._copy, args=(client, job_id, name, out), daemon=True)
            for name, out in (("stdout", sys.stdout.buffer), ("stderr", sys.stderr.buffer))
        ]
        for thread in self._threads:
            thread.start()

    def _copy(self, client: Client, job_id: str, stream: str, out: BinaryIO) -> None:
        try:
            copy_stream(client, job_id, stream, out)
        except (AetherError, OSError) as error:
            self.errors.append(error)

    def finish(self, timeout_s: float) -> None:
        """Waits for the rest of the output; raises what stopped a stream early."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self.errors:
            raise self.errors[0]


def exit_code(job: JobView) -> int:
    """The job's own code; 124 when it ran out of time, 128 + n for signal n, else that of its error."""
    if job.state is JobState.TIMED_OUT:
        return EXIT_TIMEOUT
    if job.signal is not None:
        return 128 + job.signal
    if job.exit_code is not None and job.state in (JobState.SUCCEEDED, JobState.FAILED):
        return job.exit_code
    if job.state is JobState.SUCCEEDED:
        return 0
    return AetherError.of(job.error).kind.exit if job.error else EXIT_FAILED


def ended_by_itself(job: JobView) -> bool:
    """Whether the executable exited with a code of its own, so that nothing needs explaining."""
    return (
        job.exit_code is not None
        and job.state in (JobState.SUCCEEDED, JobState.FAILED)
        and (job.error is None or job.error.code == "JOB_FAILED")
    )
