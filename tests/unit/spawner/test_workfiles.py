"""Files of a live work directory: replaced whole, listed, never through what the job put in the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.workdir import Owner, WorkError
from aether.spawner.workfiles import list_directory, replace_file

OWNER = Owner(os.geteuid(), os.getegid(), range(os.geteuid(), os.geteuid() + 1))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    root = tmp_path / "work"
    root.mkdir()
    (tmp_path / "outside").write_text("untouched")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    yield root, fd
    os.close(fd)
    assert (tmp_path / "outside").read_text() == "untouched"


def source(data: bytes) -> int:
    fd = os.memfd_create("source")
    os.write(fd, data)
    return fd


def put(directory: int, path: str, data: bytes, bytes_max: int = 1 << 20) -> int:
    fd = source(data)
    try:
        return replace_file(directory, path, fd, mode=0o640, owner=OWNER, bytes_max=bytes_max)
    finally:
        os.close(fd)


def test_a_file_is_replaced_whole(work: tuple[Path, int]) -> None:
    root, fd = work
    assert put(fd, "deep/er/file", b"first") == 5
    with (root / "deep/er/file").open("rb") as reading:
        put(fd, "deep/er/file", b"the second")
        assert reading.read() == b"first", "who reads has the old one"
    assert (root / "deep/er/file").read_bytes() == b"the second"
    assert (root / "deep/er/file").stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in (root / "deep/er").iterdir()] == ["file"]


def test_links_are_replaced_and_never_followed(work: tuple[Path, int]) -> None:
    root, fd = work
    (root / "link").symlink_to("../outside")
    put(fd, "link", b"mine")
    assert not (root / "link").is_symlink() and (root / "link").read_bytes() == b"mine"
    (root / "way").symlink_to("..")
    for path in ("way/outside", "../outside", "/etc/passwd", "a/../../outside", ""):
        with pytest.raises((WorkError, OSError)):
            put(fd, path, b"x")
    (root / "dir").mkdir()
    with pytest.raises(OSError, match="directory"):
        put(fd, "dir", b"x")
    assert sorted(entry.name for entry in root.iterdir()) == ["dir", "link", "way"], "nothing is left beside"


def test_too_much_leaves_the_old_file(work: tuple[Path, int]) -> None:
    root, fd = work
    put(fd, "file", b"old")
    with pytest.raises(WorkError):
        put(fd, "file", b"x" * 100, bytes_max=99)
    assert (root / "file").read_bytes() == b"old"


def test_a_listing_says_what_is_what(work: tuple[Path, int]) -> None:
    root, fd = work
    (root / "b.txt").write_bytes(b"12345")
    (root / "a").mkdir()
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("/etc/passwd")
    (root / os.fsdecode(b"\xff\x1b[2J")).write_bytes(b"")
    listing = list_directory(fd, "")
    kinds = {entry["name"]: entry["kind"] for entry in listing["entries"]}
    assert kinds == {"a": "directory", "b.txt": "file", "link": "other", "pipe": "other", "\\xff\x1b[2J": "file"}
    assert not listing["truncated"]
    assert {entry["name"]: entry["size_bytes"] for entry in listing["entries"]}["b.txt"] == 5
    for path in ("b.txt", "link", "nothing", "../work"):
        with pytest.raises(WorkError):
            list_directory(fd, path)


@given(path=st.text(max_size=40))
def test_no_path_leads_outside(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    root = tmp_path_factory.mktemp("any")
    (root / "work").mkdir()
    fd = os.open(root / "work", os.O_RDONLY | os.O_DIRECTORY)
    try:
        put(fd, path, b"x")
    except (WorkError, OSError, ValueError):
        pass
    finally:
        os.close(fd)
    assert [entry.name for entry in root.iterdir()] == ["work"]
