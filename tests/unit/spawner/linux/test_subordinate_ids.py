"""Which ids an ordinary user is lent, by files; which this process has, by its map."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.cellids import IdMap, IdSpace, root_space
from aether.spawner.linux import idspace, subordinate

UID = 4242


def test_the_largest_range_counts() -> None:
    lines = "4242:100000:65536\nsomebody:1:999999\nx:300000:70000\n4242:x:y\nbroken\n4242:0:99\n4242:4294967290:99\n"
    assert subordinate.largest_range(lines, ("4242", "x")) == (300_000, 70_000)
    assert subordinate.largest_range(lines, ("nobody",)) == (0, 0)


@given(st.text(max_size=200))
def test_any_file_is_read(text: str) -> None:
    first, count = subordinate.largest_range(text, ("u", ""))
    assert (first > 0) == (count > 0)


def test_what_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, remedy = subordinate.lacking(UID, tmp_path) or ("", "")
    assert "no subordinate ids" in reason and "usermod --add-subuids" in remedy
    (tmp_path / "etc").mkdir()
    for name in ("subuid", "subgid"):
        (tmp_path / "etc" / name).write_text(f"{UID}:100000:10\n")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert subordinate.lacking(UID, tmp_path) == ("newuidmap is not installed", "apt-get install uidmap")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert subordinate.lacking(UID, tmp_path) is None and subordinate.lent(UID, tmp_path).count == 10
    monkeypatch.setenv(subordinate.SETTING, "off")
    assert "off" in (subordinate.lacking(UID, tmp_path) or ("", ""))[0]


def test_the_map_tells_which_ids_there_are() -> None:
    everyone = "0 0 4294967295\n"
    assert idspace.space(0, everyone) == root_space()
    assert idspace.space(UID, everyone) == IdSpace("own", UID)
    found = idspace.space(0, f"0 {UID} 1\n1 100000 101\n")
    assert found == IdSpace("subordinate", UID, 1, 2, 50, 100_000)
    assert [found.host(0), found.host(1), found.host(100)] == [UID, 100_000, 100_099]
    assert [found.slot(uid) for uid in (0, 1, 2, 3, 99, 101)] == [None, 0, None, 1, 49, None]
    assert idspace.space(0, f"0 {UID} 1\n").kind == "own"


def test_a_pair_is_mapped_one_by_one() -> None:
    ids = IdMap(7, 9, 2)
    assert ids.extents(ids.host_uid, ids.job_uid) == ((0, 7, 1), (1000, 8, 1)) and ids.job_host == (8, 10)
    block = IdMap(1 << 20, 1 << 20, 65536)
    assert block.extents(block.host_uid, block.job_uid) == ((0, 1 << 20, 65536),)
    assert block.job_host == ((1 << 20) + 1000, (1 << 20) + 1000)
    assert IdMap(UID, UID, 1, 1000).extents(UID, 1000) == ((1000, UID, 1),)
