"""Work directories: inputs go where they are told and nowhere else, only plain outputs come out, removal is total."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.spawner import workdir
from aether.spawner.beneath import safe_path
from aether.spawner.workdir import Owner, WorkError, WorkRoot, collect, open_output, place

ME = Owner(os.geteuid(), os.getegid(), range(os.geteuid(), os.geteuid() + 1))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[WorkRoot]:
    made = WorkRoot(str(tmp_path / "cells"))
    yield made
    made.close()


@pytest.fixture
def work(root: WorkRoot) -> Iterator[tuple[Path, int]]:
    path = Path(root.prepare("c", ME))
    fd = root.open("c")
    yield path, fd
    os.close(fd)


def source(tmp_path: Path, data: bytes) -> int:
    file = tmp_path / "source"
    file.write_bytes(data)
    return os.open(file, os.O_RDONLY)


def test_place_copies_with_mode_and_owner(work: tuple[Path, int], tmp_path: Path) -> None:
    path, fd = work
    owner = Owner(70001, 70002, range(70000, 71000)) if os.geteuid() == 0 else ME
    data = os.urandom(3_000_000)
    given_fd = source(tmp_path, data)
    assert place(fd, "in/deep/er.bin", given_fd, mode=0o755, owner=owner, bytes_max=10**7) == len(data)
    about = (path / "in/deep/er.bin").stat()
    assert (path / "in/deep/er.bin").read_bytes() == data
    assert stat.S_IMODE(about.st_mode) == 0o755 and (about.st_uid, about.st_gid) == (owner.uid, owner.gid)
    assert (path / "in").stat().st_uid == owner.uid
    os.close(given_fd)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/./b", "", ".", "a/..", "a\nb", "a" * 256, "\udcff"])
def test_place_refuses_names(work: tuple[Path, int], tmp_path: Path, name: str) -> None:
    given_fd = source(tmp_path, b"x")
    with pytest.raises(WorkError):
        place(work[1], name, given_fd, mode=0o644, owner=ME, bytes_max=10)
    os.close(given_fd)


def test_place_never_follows_a_link(work: tuple[Path, int], tmp_path: Path) -> None:
    path, fd = work
    outside = tmp_path / "outside"
    outside.mkdir()
    (path / "link").symlink_to(outside)
    (path / "file").symlink_to(outside / "made")
    given_fd = source(tmp_path, b"x")
    for name in ("link/x", "file"):
        with pytest.raises(OSError):
            place(fd, name, given_fd, mode=0o644, owner=ME, bytes_max=10)
    assert list(outside.iterdir()) == []
    os.close(given_fd)


def test_place_is_bounded_and_wants_a_file(work: tuple[Path, int], tmp_path: Path) -> None:
    given_fd = source(tmp_path, b"x" * 11)
    with pytest.raises(WorkError, match="11 bytes"):
        place(work[1], "x", given_fd, mode=0o644, owner=ME, bytes_max=10)
    os.close(given_fd)
    read_end, write_end = os.pipe()
    with pytest.raises(WorkError, match="regular"):
        place(work[1], "x", read_end, mode=0o644, owner=ME, bytes_max=10)
    os.close(read_end)
    os.close(write_end)


def test_collect_takes_plain_files_and_says_why_not(work: tuple[Path, int]) -> None:
    path, fd = work
    (path / "out").mkdir()
    (path / "out/a.txt").write_text("a")
    (path / "out/b.txt").write_text("bb")
    (path / "out/link.txt").symlink_to("/etc/passwd")
    os.mkfifo(path / "out/fifo.txt")
    (path / "out/one.txt").write_text("1")
    os.link(path / "out/one.txt", path / "out/two.txt")
    here = Path.cwd()
    os.chdir(path / "out")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("sock.txt")
    os.chdir(here)
    (path / os.fsdecode(b"out/bad\xff.txt")).write_text("x")
    (path / "out/new\nline.txt").write_text("x")
    if os.geteuid() == 0:
        os.mknod(path / "out/dev.txt", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (path / "out/foreign.txt").write_text("x")
        os.chown(path / "out/foreign.txt", 12345, 12345)
    found = collect(fd, ["out/*.txt"], ME, files_max=10, bytes_max=100)
    assert found.files == [{"path": "out/a.txt", "size_bytes": 1}, {"path": "out/b.txt", "size_bytes": 2}]
    reasons = {
        "out/link.txt": "symbolic link",
        "out/fifo.txt": "FIFO",
        "out/sock.txt": "socket",
        "out/one.txt": "2 names",
        "out/two.txt": "2 names",
        "'out/bad\\udcff.txt'": "UTF-8",
        "'out/new\\nline.txt'": "UTF-8",
    }
    if os.geteuid() == 0:
        reasons |= {"out/dev.txt": "device", "out/foreign.txt": "another user"}
    assert set(found.refused) == set(reasons)
    for name, part in reasons.items():
        assert part in found.refused[name]
    listener.close()


def test_collect_is_bounded(work: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    path, fd = work
    for number in range(5):
        (path / f"{number}").write_bytes(b"x" * 10)
    with open(path / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
    found = collect(fd, ["*"], ME, files_max=3, bytes_max=1000)
    assert len(found.files) == 3 and len(found.refused) == 3
    found = collect(fd, ["*"], ME, files_max=100, bytes_max=35)
    assert sum(file["size_bytes"] for file in found.files) <= 35
    assert "sparse" in found.refused
    monkeypatch.setattr(workdir, "ENTRIES_MAX", 3)
    assert any("entries" in reason for reason in collect(fd, ["*"], ME, files_max=9, bytes_max=99).refused.values())


def test_collect_ends_in_a_deep_tree(work: tuple[Path, int]) -> None:
    path, fd = work
    here = os.open(path, os.O_RDONLY)
    for _ in range(100):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    found = collect(fd, ["**"], ME, files_max=9, bytes_max=99)
    assert found.files == [] and any("deeper" in reason for reason in found.refused.values())


def test_open_output_gives_only_plain_files(work: tuple[Path, int], tmp_path: Path) -> None:
    path, fd = work
    (path / "a").write_bytes(b"data")
    opened, size = open_output(fd, "a", ME)
    assert os.read(opened, 10) == b"data" and size == 4
    with pytest.raises(OSError):
        os.write(opened, b"x")
    os.close(opened)
    (tmp_path / "secret").write_text("secret")
    (path / "l").symlink_to(tmp_path / "secret")
    (path / "d").symlink_to(tmp_path)
    os.mkfifo(path / "f")
    (path / "dir").mkdir()
    for name in ("l", "d/secret", "f", "dir", "../source", "/etc/passwd", "missing"):
        with pytest.raises(WorkError):
            open_output(fd, name, ME)


def test_remove_is_total(root: WorkRoot, tmp_path: Path) -> None:
    """2,000 levels deep (beyond PATH_MAX and the recursion limit), names that collide with ours, links outward."""
    path = Path(root.prepare("c", ME))
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/file").write_text("x")
    (path / "link").symlink_to(tmp_path / "keep")
    (path / "1").mkdir()
    (path / ".removing-c").mkdir()
    (path / "1/x").write_text("x")
    here = os.open(path, os.O_RDONLY)
    for number in range(2000):
        name = str(number % 3)
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (path / "locked").mkdir(mode=0o000)
    assert not root.remove_flat("c")
    root.remove("c")
    assert list(Path(root.path).iterdir()) == []
    assert (tmp_path / "keep/file").read_text() == "x"
    root.remove("c")


def test_remove_flat_takes_a_small_directory(root: WorkRoot) -> None:
    path = Path(root.prepare("c", ME))
    (path / "a").write_text("a")
    (path / "l").symlink_to("/etc")
    assert root.remove_flat("c") and not path.exists()
    assert root.remove_flat("c")


@given(st.text(max_size=40))
def test_safe_paths_stay_below(path: str) -> None:
    if safe_path(path):
        assert not path.startswith("/") and ".." not in path.split("/") and path.encode()
