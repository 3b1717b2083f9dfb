"""Owners and modes of the state directory, and what was planted in it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import samples
from aether.daemons.accounts import accounts, prepare

TRY_TO_WRITE = """
import os, sys
from pathlib import Path
uid, gid = int(sys.argv[2]), int(sys.argv[3])
os.setgroups([]); os.setresgid(gid, gid, gid); os.setresuid(uid, uid, uid)
there = Path(sys.argv[1])
for attempt in (
    lambda: (there / "lock").unlink(),
    lambda: (there / "lock").open("ab"),
    lambda: (there / "instance.json").open("ab"),
    lambda: (there / "instance.json.new").symlink_to("/etc/passwd"),
    lambda: (there.parent / "run/mine").rename(there / "instance.json"),
    lambda: there.rename(there.parent / "run/moved"),
):
    try:
        attempt()
        sys.exit("it could be changed")
    except PermissionError:
        pass
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "a/state")


def test_prepare_twice_gives_the_same(layout: Layout) -> None:
    who = accounts(os.getuid(), os.getgid())
    prepare(layout, who)
    layout.keys.chmod(0o777)
    prepare(layout, who)
    for path, mode in ((layout.root, 0o750), (layout.keys, 0o750), (layout.spool, 0o700), (layout.supervisor, 0o755)):
        assert path.stat().st_mode & 0o7777 == mode, path
    assert layout.run.stat().st_uid == who.aetherd
    assert layout.trusted_keys.stat().st_uid == who.spawner


def test_directories_are_walked_through_only_where_cells_have_no_view_of_their_own(layout: Layout) -> None:
    who = accounts(os.getuid(), os.getgid())
    prepare(layout, who, by_path=True)
    expected = 0o751 if who.split else 0o750
    assert {path.stat().st_mode & 0o777 for path in (layout.root, layout.models, layout.keys)} == {expected}
    assert {path.stat().st_mode & 0o777 for path in (layout.run, layout.audit, layout.job_logs)} == {0o750}
    prepare(layout, who)
    assert layout.root.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("name", [".", "run", "keys", "keys/models", "logs", "logs/audit", "supervisor"])
def test_links_in_the_place_of_directories_are_refused(layout: Layout, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    before = elsewhere.stat()
    (layout.root / name).parent.mkdir(parents=True, exist_ok=True)
    (layout.root / name).symlink_to(elsewhere) if name != "." else layout.root.symlink_to(elsewhere)
    with pytest.raises(AetherError) as refused:
        prepare(layout, accounts(os.getuid(), os.getgid()))
    assert refused.value.code == "STATE_UNUSABLE"
    after = elsewhere.stat()
    assert (after.st_uid, after.st_mode, list(elsewhere.iterdir())) == (before.st_uid, before.st_mode, [])


def test_samples_are_not_written_through_links(layout: Layout, tmp_path: Path) -> None:
    """aetherd could put a directory of its own in the place of `keys/models`, with links in it."""
    who = accounts(os.getuid(), os.getgid())
    prepare(layout, who)
    found = samples.source()
    assert found is not None
    victim = tmp_path / "victim"
    victim.write_text("as before")
    for key in (found / "keys").glob("*.pub"):
        (layout.trusted_keys / key.name).symlink_to(victim)
        (layout.trusted_keys / f".{key.name}.partial").symlink_to(victim)
    samples.install(layout, who)
    assert victim.read_text() == "as before"
    for key in (found / "keys").glob("*.pub"):
        assert (layout.trusted_keys / key.name).read_bytes() == key.read_bytes()


def test_a_path_too_long_for_sockets_is_refused_with_the_reason(tmp_path: Path) -> None:
    layout = Layout(tmp_path / ("x" * 100))
    with pytest.raises(AetherError, match="107") as refused:
        prepare(layout, accounts(os.getuid(), os.getgid()))
    assert refused.value.code == "STATE_UNUSABLE" and "shorter" in refused.value.remedy
    assert not layout.root.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: roles of other uids")
def test_no_role_can_write_where_the_supervisor_does() -> None:
    with tempfile.TemporaryDirectory(prefix="aether-test-") as parent:
        Path(parent).chmod(0o755)
        layout, who = Layout(Path(parent) / "state"), accounts(0, 0)
        prepare(layout, who)
        (layout.run / "mine").touch()
        for name in ("lock", "instance.json"):
            (layout.supervisor / name).write_text("root's")
        for uid in (who.aetherd, who.aurorad, who.keeper):
            words = [sys.executable, "-c", TRY_TO_WRITE, str(layout.supervisor), str(uid), str(who.gid)]
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
            assert done.returncode == 0, done.stderr
        assert {path.read_text() for path in layout.supervisor.iterdir()} == {"root's"}
