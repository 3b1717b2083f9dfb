"""Start, find and stop an instance; what `aether up`, `aether down` and `aether run` stand on.

An instance is one supervisor process holding an exclusive lock on `run/supervisor.lock`. The lock, not a pid
file, says whether it lives; the pid in `instance.json` is trusted only while the lock is held.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from aether.contract.errors import AetherError
from aether.contract.paths import Layout

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 20.0


def lock_path(layout: Layout) -> Path:
    return layout.run / "supervisor.lock"


def is_up(layout: Layout) -> bool:
    """Whether a supervisor holds the lock."""
    try:
        with open(lock_path(layout), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except PermissionError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot look at the instance in {layout.root}: {error}") from error
    except BlockingIOError:
        return True
    return False


def instance(layout: Layout) -> dict[str, Any] | None:
    """What the supervisor wrote about itself; None when no instance is up."""
    if not is_up(layout):
        return None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(layout.instance_file.read_text())
        if isinstance(found, dict):
            return found
    return None


def ensure_running(state: Path, progress: Callable[[str], None]) -> None:
    """Starts an instance in the background unless one is up, and waits until it answers.

    Raises AetherError UNREACHABLE with the end of the supervisor's log when it does not come up.
    """
    layout = Layout(state)
    if answers(layout):
        return
    log = _supervisor_log(layout)
    process: subprocess.Popen[bytes] | None = None
    if not is_up(layout):
        progress(f"starting an instance in {state}")
        with open(log, "ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "aether.daemons.supervisor", "--state", str(state)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                cwd="/",
            )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if answers(layout):
            return
        if process is not None and process.poll() is not None and not is_up(layout):
            raise AetherError("UNREACHABLE", f"cannot start an instance in {state}: {_tail(log)}")
        time.sleep(0.02)
    raise AetherError("UNREACHABLE", f"cannot start an instance in {state}: no answer after {START_TIMEOUT_S:.0f} s")


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


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:500] if lines else "it ended at once"
