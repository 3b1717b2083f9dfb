"""Start, find and stop an instance; what `aether up`, `aether down` and `aether run` stand on.

An instance is one supervisor process; `presence` says whether it is up. Who starts one in the background waits
until every role answers, or until a role has said twice why it cannot run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons.diagnosis import last_words, why_not_up
from aether.daemons.presence import instance, is_up

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.02


def ensure_running(state: Path, progress: Callable[[str], None]) -> None:
    """Starts an instance in the background unless one is up, and waits until it answers.

    Raises the AetherError of a role that cannot run, or UNREACHABLE with the end of the supervisor's log. An
    instance that was started here and cannot run is stopped again; one that is only slow goes on.
    """
    layout = Layout(state)
    if answers(layout):
        return
    process = None
    if not is_up(layout):
        progress(f"starting an instance in {state}")
        process = _start(layout)
    deadline = time.monotonic() + START_TIMEOUT_S
    while not answers(layout):
        if process is not None and process.poll() is not None and not is_up(layout):
            silent = AetherError("UNREACHABLE", f"cannot start an instance in {state}: its supervisor ended at once")
            raise last_words(state, "supervisor") or silent
        if refused := why_not_up(state, instance(layout)):
            if process is not None:
                _stop(process)
            raise refused
        if time.monotonic() > deadline:
            why = f"no answer after {START_TIMEOUT_S:.0f} s"
            remedy = f"it goes on starting: see `aether health` and {layout.daemon_logs}, or stop it with `aether down`"
            raise AetherError("UNREACHABLE", f"cannot wait for the instance in {state}: {why}", remedy)
        time.sleep(_POLL_S)


def _start(layout: Layout) -> subprocess.Popen[bytes]:
    with open(_supervisor_log(layout), "ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "aether.daemons.supervisor", "--state", str(layout.root)],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            cwd="/",
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)


def up(state: Path, foreground: bool, progress: Callable[[str], None] = lambda text: None) -> int:
    """`aether up`: in the foreground until a signal, or in the background. Returns the exit code."""
    layout = Layout(state)
    if is_up(layout):
        raise AetherError("ALREADY_RUNNING", f"cannot start an instance in {state}: one is up")
    if foreground:
        os.execv(sys.executable, [sys.executable, "-m", "aether.daemons.supervisor", "--state", str(state)])
    ensure_running(state, progress)
    return 0


def down(state: Path) -> int:
    """`aether down`: asks the supervisor to end and waits; cells are stopped. Returns the exit code."""
    layout = Layout(state)
    found = instance(layout)
    if found is None:
        raise AetherError("UNREACHABLE", f"cannot stop the instance in {state}: none is up")
    with _pidfd(int(found["pid"])) as pidfd:
        if is_up(layout):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)  # readable once the process is gone (pidfd_open(2))
        if not ended.poll(STOP_TIMEOUT_S * 1000):
            raise AetherError(
                "UNREACHABLE", f"cannot stop the instance in {state}: still up after {STOP_TIMEOUT_S:.0f} s"
            )
    return 0


def answers(layout: Layout) -> bool:
    """Whether GET /v0/health says that every role is there."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(2.0)
            client.connect(str(layout.api_socket))
            client.sendall(b"GET /v0/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            reply = b"".join(iter(lambda: client.recv(65536), b""))
    except OSError:
        return False
    head, _, body = reply.partition(b"\r\n\r\n")
    return b" 200 " in head.split(b"\r\n", 1)[0] and b'"status":"ok"' in body


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise AetherError("UNREACHABLE", f"cannot stop process {pid}: it is gone") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _supervisor_log(layout: Layout) -> Path:
    try:
        layout.daemon_logs.mkdir(parents=True, exist_ok=True, mode=0o750)
    except OSError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot use {layout.root} as state directory: {error}") from error
    return layout.daemon_logs / "supervisor.log"
