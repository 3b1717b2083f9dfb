"""The instance's lock and announcement: looked at without being in the way, and by nobody forged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.daemons import presence

HOLD = """
import sys
from pathlib import Path
from aether.contract.paths import Layout
from aether.daemons import presence
presence.acquire(Layout(Path(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    found = Layout(tmp_path)
    found.supervisor.mkdir(mode=0o755)
    return found


def test_nothing_is_up_where_nothing_is(tmp_path: Path) -> None:
    assert not presence.is_up(Layout(tmp_path / "absent"))
    assert presence.instance(Layout(tmp_path)) is None


def test_another_process_holds_the_lock_until_it_ends(layout: Layout) -> None:
    argv = [sys.executable, "-c", HOLD, str(layout.root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert presence.is_up(layout)
        with pytest.raises(AetherError) as refused:
            presence.acquire(layout)
        assert refused.value.code == "ALREADY_RUNNING"
        holder.kill()
    assert not presence.is_up(layout)
    os.close(presence.acquire(layout))


def test_who_looks_is_not_in_the_way(layout: Layout) -> None:
    """Looking takes no lock: with the file open for looking, the lock can still be taken."""
    os.close(presence.acquire(layout))
    with layout.supervisor_lock.open("rb"):
        assert not presence.is_up(layout)
        os.close(presence.acquire(layout))


def test_what_is_announced_counts_while_the_lock_is_held(layout: Layout) -> None:
    lock = presence.acquire(layout)
    # the holder's own description does not conflict with itself, another one does (fcntl(2))
    presence.announce(layout, {"pid": 7})
    assert presence.instance(layout) == {"pid": 7}
    assert layout.instance_file.stat().st_mode & 0o777 == 0o644
    os.close(lock)
    assert presence.instance(layout) is None
    presence.withdraw(layout)
    presence.withdraw(layout)
    assert [path.name for path in layout.supervisor.iterdir()] == ["lock"]


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"pid": 1}' + " " * 70_000 + "x"])
def test_an_announcement_that_is_none(layout: Layout, text: str) -> None:
    lock = presence.acquire(layout)
    layout.instance_file.write_text(text)
    found = presence.instance(layout)
    os.close(lock)
    assert found is None or found == {"pid": 1}


def test_a_link_is_not_followed(layout: Layout, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"pid": 1}))
    lock = presence.acquire(layout)
    layout.instance_file.symlink_to(secret)
    assert presence.instance(layout) is None
    presence.announce(layout, {"pid": 2})
    assert json.loads(secret.read_text()) == {"pid": 1} and not layout.instance_file.is_symlink()
    os.close(lock)
    layout.supervisor_lock.unlink()
    layout.supervisor_lock.symlink_to(secret)
    with pytest.raises(OSError):
        presence.acquire(layout)


def test_a_directory_that_others_can_write_is_refused(layout: Layout) -> None:
    layout.supervisor.chmod(0o777)
    with pytest.raises(AetherError) as refused:
        presence.is_up(layout)
    assert refused.value.code == "STATE_UNUSABLE"
    with pytest.raises(OSError):
        presence.announce(layout, {"pid": 1})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to give the directory to another uid")
def test_a_directory_of_another_user_is_refused(layout: Layout) -> None:
    os.chown(layout.supervisor, 12_345, -1)
    with pytest.raises(AetherError) as refused:
        presence.is_up(layout)
    assert refused.value.code == "STATE_UNUSABLE"
