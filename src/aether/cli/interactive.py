"""Attending an executable of a cell: its output live, our input and terminal handed to it.

A terminal of ours is in raw mode while its executable has one of its own, so every key goes there, Ctrl-C too; it
is put back on every way out. What the executable's terminal sends is written as it is: whoever asks for a terminal
gives it theirs, as with ssh.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import tty as ttys
from collections.abc import Iterator
from types import FrameType

from aether.cli.follow import Follower
from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView

_CHUNK_BYTES = 64 * 1024


def attend(client: Client, job: JobView, *, tty: bool, interactive: bool, quiet: bool) -> JobView:
    """The terminal job. The first Ctrl-C stops an executable without a terminal, a second one leaves it."""
    if tty:
        _talk(client, job, interactive)
        return client.wait(job.job_id)
    follower = None if quiet else Follower(client, job.job_id)
    try:
        if interactive:
            _feed(client, job)
        job = client.wait(job.job_id)
    except KeyboardInterrupt:
        client.stop(job.job_id)
        job = client.wait(job.job_id)
    if follower is not None:
        follower.finish(timeout_s=30.0)
    return job


def _talk(client: Client, job: JobView, interactive: bool) -> None:
    """Our terminal and the executable's, until that one closes."""
    connection = client.attach(job.job_id)
    here = sys.stdin.fileno()
    with connection, _raw(here if interactive and os.isatty(here) else -1), _resizing(client, job.job_id):
        sources = [connection.fileno(), *([here] if interactive else [])]
        while True:
            ready, _, _ = select.select(sources, [], [])
            if connection.fileno() in ready:
                try:
                    data = connection.recv(_CHUNK_BYTES)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return
                _write_all(sys.stdout.fileno(), data)
            if here in ready:
                typed = os.read(here, _CHUNK_BYTES)
                if not typed:
                    sources.remove(here)
                    typed = b"\x04"  # end of file, as a terminal says it (VEOF, termios(3))
                connection.sendall(typed)


def _feed(client: Client, job: JobView) -> None:
    """Our standard input until its end, or until nobody takes it any more."""
    try:
        connection = client.attach(job.job_id)
    except AetherError as error:
        if error.code in ("NOT_READY", "NOT_FOUND", "NO_SUCH_CELL"):
            return  # it ended before it could be told anything
        raise
    here = sys.stdin.fileno()
    with connection:
        while True:
            ready, _, _ = select.select([here, connection.fileno()], [], [])
            if connection.fileno() in ready:  # it never sends: this is its end
                return
            data = os.read(here, _CHUNK_BYTES)
            if not data:
                break
            try:
                connection.sendall(data)
            except (BrokenPipeError, ConnectionResetError):
                return
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            connection.recv(1)  # until all of it was taken


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """The terminal in raw mode (termios(3), cfmakeraw); as it was on every way out. -1: no terminal."""
    if fd < 0:
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        ttys.setraw(fd, termios.TCSADRAIN)  # and not TCSAFLUSH, which throws away what was typed ahead
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _resizing(client: Client, job_id: str) -> Iterator[None]:
    """The executable's terminal has the size of ours, now and after each SIGWINCH."""

    def tell(_: int = 0, __: FrameType | None = None) -> None:
        with contextlib.suppress(OSError, AetherError):
            size = os.get_terminal_size(sys.stdout.fileno())
            client.window(job_id, max(size.lines, 1), max(size.columns, 1))

    before = signal.signal(signal.SIGWINCH, tell)
    tell()
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
