"""Races on the work directory: a thread swaps what lies there while the host goes over it."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aether.spawner.workdir import Owner, WorkError, collect, open_output
from tests.support import cells, machine

ROUNDS = 30_000
LAUNCHES = 6
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def swapping(first: Path, second: Path) -> Iterator[None]:
    """The two names change places all the time, each time in one step (renameat2(2), RENAME_EXCHANGE)."""
    ended = threading.Event()
    exchange = ctypes.CDLL(None).renameat2

    def swap() -> None:
        while not ended.is_set():
            exchange(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the host that ordinary users may enter, with a secret beside the work directory."""
    directory = Path(tempfile.mkdtemp(prefix="aether-race-"))
    directory.chmod(0o755)
    (directory / "work").mkdir()
    (directory / "secret").mkdir()
    (directory / "secret" / "out").write_text("of the host")
    yield directory
    shutil.rmtree(directory)


def read_output(directory: int, path: str, owner: Owner) -> bytes:
    try:
        fd, _ = open_output(directory, path, owner)
    except WorkError:
        return b""
    try:
        return os.read(fd, 64)
    finally:
        os.close(fd)


@pytest.mark.parametrize("swapped", ["file", "directory"])
def test_an_output_swapped_for_a_link_is_never_followed(place: Path, swapped: str) -> None:
    work, owner = place / "work", Owner(os.geteuid(), os.getegid(), range(os.geteuid(), os.geteuid() + 1))
    (work / "d").mkdir()
    (work / "d" / "out").write_text("of the job")
    if swapped == "file":
        link, real = work / "d" / "link", work / "d" / "out"
        link.symlink_to(place / "secret" / "out")
    else:
        link, real = work / "link", work / "d"
        link.symlink_to(place / "secret")
    directory = os.open(work, os.O_PATH | os.O_DIRECTORY)
    try:
        with swapping(real, link):
            seen = {read_output(directory, "d/out", owner) for _ in range(ROUNDS)}
    finally:
        os.close(directory)
    assert b"of the host" not in seen
    assert seen == {b"of the job", b""}, "the two never changed places"


def test_collecting_while_a_directory_becomes_a_link_stays_inside(place: Path) -> None:
    work, owner = place / "work", Owner(os.geteuid(), os.getegid(), range(os.geteuid(), os.geteuid() + 1))
    (work / "d").mkdir()
    (work / "d" / "mine").write_text("of the job")
    (work / "link").symlink_to(place / "secret")
    directory = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    names: set[str] = set()
    try:
        with swapping(work / "d", work / "link"):
            for _ in range(ROUNDS // 20):
                found = collect(directory, ["**"], owner, files_max=100, bytes_max=1 << 20)
                names |= {entry["path"] for entry in found.files}
    finally:
        os.close(directory)
    assert names and not any("out" in name for name in names), names


@pytest.mark.parametrize("kind", ["native", "portable"])
def test_a_mount_point_swapped_for_a_link_stays_in_the_cell(kind: str, directory: str, place: Path) -> None:
    """A tmpfs below a writable bind whose parent flips between a directory and a link to /usr: it lands in the bind
    or nowhere. Were the link followed, /usr/bin of the cell would be empty, and `true` not there."""
    host = cells.open_host(kind, os.geteuid() != 0, directory)
    work = place / "work"
    (work / "d").mkdir()
    (work / "link").symlink_to("/usr")
    steps = [
        {"op": "bind_rw", "path": "/data", "source": str(work)},
        {"op": "tmpfs", "path": "/data/d/bin", "size_bytes": 4096},
    ]
    before = len(machine.mounts("/usr"))
    with swapping(work / "d", work / "link"):
        results = [host.run(["true"], steps=steps, roots=[str(work)]) for _ in range(LAUNCHES)]
    for result in results:
        ended = {e["kind"]: e for e in result.events}
        if "StepFailed" in ended:
            assert ended["StepFailed"]["errno"] in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT)
        else:
            assert ended["Exited"]["code"] == 0
    assert len(machine.mounts("/usr")) == before
