"""Counting what a tree keeps: blocks once, names, depth, and nothing outside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aether.spawner.diskuse import Use, count_nameless, count_tree

MIB = 1 << 20


def counted(root: Path, name: str = "work", bytes_max: int = 1 << 40, entries_max: int = 1000) -> Use:
    use = Use(bytes_max, entries_max)
    parent = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    before = len(list(Path("/proc/self/fd").iterdir()))
    try:
        count_tree(parent, name, use)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    finally:
        os.close(parent)
    return use


@pytest.fixture
def work(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    return place


def test_blocks_count_once_and_names_each(work: Path) -> None:
    (work / "a").write_bytes(bytes(MIB))
    os.link(work / "a", work / "b")
    with (work / "sparse").open("wb") as file:
        file.truncate(1 << 33)
    use = counted(work.parent)
    assert use.entries == 3 and MIB <= use.size_bytes < MIB + 64 * 1024 and not use.full


def test_links_lead_nowhere(work: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/big").write_bytes(bytes(MIB))
    (work / "link").symlink_to("../outside")
    assert counted(tmp_path).entries == 1
    assert counted(tmp_path).size_bytes < MIB
    (tmp_path / "other").symlink_to("outside")
    assert counted(tmp_path, "other").entries == 0
    assert counted(tmp_path, "missing").entries == 0


def test_it_stops_above_the_bounds(work: Path) -> None:
    for number in range(50):
        (work / str(number)).write_bytes(bytes(4096))
    assert counted(work.parent, entries_max=10).entries == 11
    assert counted(work.parent, entries_max=50).full is False
    assert counted(work.parent, bytes_max=20_000).full


def test_too_deep_is_too_many(work: Path) -> None:
    (work / "/".join(["d"] * 200)).mkdir(parents=True)
    assert not counted(work.parent).full
    (work / "/".join(["d"] * 300)).mkdir(parents=True)
    assert counted(work.parent).full


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
def test_a_closed_directory_is_counted_and_stays_closed(work: Path, mode: int) -> None:
    closed = work / "closed"
    (closed / "in").mkdir(parents=True)
    (closed / "in/file").write_bytes(bytes(MIB))
    closed.chmod(mode)
    try:
        use = counted(work.parent)
        assert use.entries == 3 and use.size_bytes >= MIB
        assert closed.stat().st_mode & 0o777 == mode
    finally:
        closed.chmod(0o700)


def test_what_is_open_without_a_name_counts_for_its_owner(work: Path) -> None:
    file = (work / "gone").open("wb")
    file.write(bytes(MIB))
    file.flush()
    (work / "gone").unlink()
    here = os.open(work, os.O_RDONLY)
    mine, others = Use(1 << 40, 1000), Use(1 << 40, 1000)
    count_nameless([os.getpid()], here, range(os.getuid(), os.getuid() + 1), mine)
    count_nameless([os.getpid()], here, range(1 << 31, 1 << 32), others)
    file.close()
    os.close(here)
    assert mine.size_bytes >= MIB and others.size_bytes == 0
