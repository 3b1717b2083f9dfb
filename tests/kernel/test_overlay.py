"""Roots and work directories as overlays: both executors, as root (with ids of other files mapped) and rootless."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aether.contract import cellplan as cp
from tests.support import cells
from tests.support.cellhost import BLOCK
from tests.support.cells import Host, Result
from tests.support.trees import make_tree

OWNER = 0x6FFF_F002
"""Who unpacks images when there is a user for it: nobody in the cell."""
WRITABLE = ("read", "execute", "write")


@dataclass(frozen=True)
class Place:
    """A host with an image and room for a cell's layers."""

    host: Host
    image: Path
    layers: Path

    def run(self, script: str, overlay: cp.Overlay, *more: cp.Step, **request: Any) -> Result:
        fixed = [cp.Proc(), cp.DevMinimal(), cp.Tmpfs("/tmp", 1 << 20)]
        if not any(step.path == "/work" for step in more if isinstance(step, cp.Overlay)):
            fixed.append(cp.Tmpfs("/work", 1 << 20))
        steps = [cp.to_plain(step) for step in (overlay, *more, *fixed)]
        rules = [cp.LandlockRule("/", WRITABLE), cp.LandlockRule("/dev", ("read", "write"))]
        plan = {"steps": steps, "landlock": cp.to_plain(cp.Landlock(tuple(rules))) if cells.abi() else None}
        roots = [str(self.image.parent), str(self.layers)]
        return self.host.run(["sh", "-c", script], plan=plan, roots=roots, **request)

    def layer(self, name: str) -> Path:
        """An upper directory of the job and its scratch sibling."""
        upper, scratch = self.layers / name, self.layers / f".scratch-{name}"
        ids = (cells.ORDINARY, cells.ORDINARY) if self.host.user else (BLOCK + 1000, BLOCK + 1000)
        for path in (upper, scratch):
            path.mkdir(mode=0o755)
            if os.geteuid() == 0 and (self.host.user or path == upper):
                os.chown(path, *ids)
        return upper


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    yield from cells.readable_copy()


@pytest.fixture(params=cells.variants())
def place(request: pytest.FixtureRequest, directory: str, tmp_path: Path) -> Iterator[Place]:
    host = cells.open_host(*request.param, directory)
    base = Path(directory) / f"layers-{host.executor}-{host.user}"
    image = make_tree(base / "images" / "one")
    (base / "cells").mkdir()
    for path in (base, base / "images", base / "cells"):
        path.chmod(0o755)
    if os.geteuid() == 0:
        owner = cells.ORDINARY if host.user else OWNER
        for path in (image, *image.rglob("*")):
            os.chown(path, owner, owner, follow_symlinks=False)
        if host.user:
            os.chown(base / "cells", owner, owner)
    yield Place(host, image, base / "cells")
    shutil.rmtree(base)


def test_a_read_only_root_from_a_tree(place: Place) -> None:
    script = "cat /etc/motd /etc/hosts; touch /srv/data/new || touch /etc/hosts || echo sealed; id -u; ls /"
    files = (cp.File("/etc/hosts", "127.0.0.1 localhost\n"), cp.Dir("/run"))
    result = place.run(script, cp.Overlay("/", str(place.image)), *files)
    assert result.of("Exited")["code"] == 0, result
    lines = result.out.splitlines()
    assert "hello from the image" in lines
    assert "127.0.0.1 localhost" in lines
    assert "sealed" in lines
    assert "1000" in lines
    assert not {".upper", ".scratch"} & set(lines)
    assert not (place.image / "etc/hosts").exists()


def test_a_written_file_replaces_that_of_the_tree_whole(place: Place) -> None:
    result = place.run("cat /etc/motd", cp.Overlay("/", str(place.image)), cp.File("/etc/motd", "new\n"))
    assert result.out == "new\n"
    assert (place.image / "etc/motd").read_text() == "hello from the image\n"


def test_changes_to_a_writable_root_stay_in_its_layer(place: Place) -> None:
    upper = place.layer("over")
    script = (
        "set -e; echo new > /srv/data/new; echo more >> /srv/data/old; rm /srv/data/gone; mkdir /fresh; "
        "rm -r /srv/data/sub 2>/dev/null || true; cat /srv/data/old; ls /srv/data"
    )
    result = place.run(script, cp.Overlay("/", str(place.image), str(upper)))
    assert result.of("Exited")["code"] == 0, result
    assert result.out.split() == ["old", "more", "new", "old"]
    assert (place.image / "srv/data/old").read_text() == "old\n"
    assert (place.image / "srv/data/gone").exists()
    assert (upper / "srv/data/new").read_text() == "new\n"
    gone = (upper / "srv/data/gone").lstat()
    assert stat.S_ISCHR(gone.st_mode)
    assert gone.st_rdev == 0
    owner = cells.ORDINARY if place.host.user else BLOCK + 1000
    if os.geteuid() == 0:
        assert (upper / "srv/data/new").stat().st_uid == (upper / "srv/data/old").stat().st_uid == owner


def test_a_work_directory_over_a_tree(place: Place) -> None:
    upper = place.layer("work")
    more = cp.Overlay("/work", str(place.image / "srv"), str(upper))
    result = place.run(
        "cat data/old && echo x > data/made && rm data/gone && ls data", cp.Overlay("/", str(place.image)), more
    )
    assert result.of("Exited")["code"] == 0, result
    assert result.out.split() == ["old", "made", "old"]
    assert (upper / "data/made").read_text() == "x\n"


def test_mountinfo_names_no_path_of_the_host(place: Place) -> None:
    upper = place.layer("over")
    result = place.run("cat /proc/self/mountinfo", cp.Overlay("/", str(place.image), str(upper)))
    assert "overlay" in result.out
    assert "layers-" not in result.out


@pytest.mark.parametrize("kept", [False, True])
def test_nothing_of_the_host_stays_mounted(place: Place, kept: bool) -> None:
    upper = str(place.layer("over")) if kept else None
    result = place.run("cat /proc/self/mountinfo", cp.Overlay("/", str(place.image), upper))
    mounts = [line.split()[4] for line in result.out.splitlines()]
    devices = [path for path in mounts if path.startswith("/dev/")]
    assert sorted(set(mounts) - set(devices)) == ["/", "/dev", "/proc", "/tmp", "/work"]
    assert len(mounts) == 5 + len(devices), result.out
    assert set(devices) <= {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"}


def test_setuid_files_of_the_tree_gain_nothing(place: Place) -> None:
    target = place.image / shutil.which("id").lstrip("/")  # type: ignore[union-attr]
    target.chmod(0o4755)
    result = place.run("id -u; cat /proc/self/mountinfo", cp.Overlay("/", str(place.image)))
    lines = result.out.splitlines()
    assert lines[0] == "1000"
    root = next(line for line in lines[1:] if line.split()[4] == "/")
    assert {"nosuid", "nodev", "ro"} <= set(root.split()[5].split(","))


def test_a_link_in_the_way_to_a_layer_is_refused(place: Place) -> None:
    link = place.image.parent / "link"
    link.symlink_to("/")
    failed = place.run("true", cp.Overlay("/", str(link)), actions=[]).of("StepFailed")
    assert failed["errno"] in (errno.ELOOP, errno.ENOTDIR)
    assert "show host tree" in failed["why"]


def test_a_layer_is_not_reached_through_links_of_the_tree(place: Place) -> None:
    """A hostile image whose mount points are links: steps never follow them."""
    shutil.rmtree(place.image / "tmp")
    (place.image / "tmp").symlink_to("/srv")
    failed = place.run("true", cp.Overlay("/", str(place.image)), actions=[]).of("StepFailed")
    assert failed["errno"] == errno.ELOOP
