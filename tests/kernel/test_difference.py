"""An overlay's upper directory as a listing and a layer: of real overlays, and applied again the tree is the same."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aether.orchestrator.images.layout import Bounded
from aether.orchestrator.images.tree import Tree, apply_layer, copy_linked
from aether.spawner.difference import write_difference

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes an overlay mount and whiteouts, which needs root")


def difference(upper: Path, lower: Path, **more: Any) -> tuple[dict[str, Any], bytes]:
    out = io.BytesIO()
    above, below = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (upper, lower))
    try:
        return write_difference(above, below, out, 1 << 20, **more), out.getvalue()
    finally:
        os.close(above)
        os.close(below)


def snapshot(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        kind = f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else path.read_text()
        found[str(path.relative_to(root))] = kind
    return found


def in_overlay(top: Path, script: str) -> None:
    """Runs `script` in an overlay over `top`/lower in a mount namespace of its own, which ends with it."""
    for name in ("upper", "scratch", "merged"):
        (top / name).mkdir()
    options = f"lowerdir={top}/lower,upperdir={top}/upper,workdir={top}/scratch,redirect_dir=nofollow,metacopy=off"
    words = f"mount -t overlay none -o {options} {top}/merged && cd {top}/merged && {{ {script}; }}"
    done = subprocess.run(["unshare", "-m", "sh", "-ec", words], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "mount" in done.stderr:
        pytest.skip(f"no overlay here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    (top / "merged").rmdir()


def applied_again(top: Path, layer: bytes) -> dict[str, str]:
    (top / "again").mkdir()
    fds = [os.open(top / name, os.O_RDONLY | os.O_DIRECTORY) for name in ("lower", "again")]
    try:
        tree = Tree(fds[1])
        copy_linked(fds[0], tree)
        apply_layer(tree, Bounded(io.BytesIO(layer), 1 << 20))
    finally:
        for fd in fds:
            os.close(fd)
    return snapshot(top / "again")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    lower = tmp_path / "lower"
    (lower / "d/e").mkdir(parents=True)
    for name in ("a", "b", "d/c", "d/e/f"):
        (lower / name).write_text(f"{name}\n")
    return tmp_path


def test_every_kind_of_change(top: Path) -> None:
    in_overlay(
        top,
        "echo x >> a; rm b; rm -r d/e; mkdir d/e; echo n > d/e/new; ln -s a l; ln a h;"
        "mkfifo p; mkdir m; echo q > .wh.x; rm d/c; mkdir d/c",
    )
    found, layer = difference(top / "upper", top / "lower")
    changes = {change["path"]: change["change"] for change in found["changes"]}
    assert changes == {
        "a": "modified",
        "b": "deleted",
        "d/c": "replaced",
        "d/e": "replaced",
        "d/e/new": "added",
        "h": "added",
        "l": "added",
        "m": "added",
        "p": "added",
    }
    assert set(found["refused"]) == {"p", ".wh.x"}
    expected = snapshot(top / "lower")
    for name in ("b", "d/c", "d/e", "d/e/f"):
        del expected[name]
    expected |= {"a": "a\nx\n", "h": "a\nx\n", "l": "-> a", "m": "/", "d/c": "/", "d/e": "/", "d/e/new": "n\n"}
    assert applied_again(top, layer) == dict(sorted(expected.items()))


def test_skipped_paths_and_bounds(top: Path) -> None:
    in_overlay(top, "echo x > skipped; echo y > kept")
    found, layer = difference(top / "upper", top / "lower", skipped=frozenset({"skipped"}))
    assert [change["path"] for change in found["changes"]] == ["kept"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert tar.getnames() == ["kept"]
    (top / "upper/big").write_bytes(bytes(2 << 20))
    with pytest.raises(ValueError, match="more than"):
        difference(top / "upper", top / "lower")


NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda raw: b"/" not in raw and b"\0" not in raw and raw not in (b".", b"..")
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.sampled_from(["file", "dir", "link", "whiteout", "fifo", "opaque"]), max_size=6))
def test_any_names_make_a_layer_that_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, made: dict[bytes, str]
) -> None:
    """Whatever the job called its files: the listing is text, the layer applies, and nothing leaves the tree."""
    top = tmp_path_factory.mktemp("names")
    for name in ("upper", "lower", "target"):
        (top / name).mkdir()
    for raw, kind in made.items():
        path = os.fsencode(top / "upper") + b"/" + raw
        _make(path, kind)
    found, layer = difference(top / "upper", top / "lower")
    assert len(found["changes"]) + sum(os.fsencode(n).startswith(b".wh.") for n in found["refused"]) >= len(made)
    assert all(change["path"].isascii() or change["path"].encode() for change in found["changes"])
    fd = os.open(top / "target", os.O_RDONLY | os.O_DIRECTORY)
    try:
        apply_layer(Tree(fd), Bounded(io.BytesIO(layer), 1 << 20))
    finally:
        os.close(fd)
    kept = {os.fsencode(path.name) for path in (top / "target").iterdir()}
    expected = {raw for raw, kind in made.items() if kind not in ("whiteout", "fifo") and not raw.startswith(b".wh.")}
    assert kept == expected


def _make(path: bytes, kind: str) -> None:
    if kind == "file":
        with open(path, "wb") as file:
            file.write(b"data")
    elif kind in ("dir", "opaque"):
        os.mkdir(path)  # noqa: PTH102
        if kind == "opaque":
            os.setxattr(path, "user.overlay.opaque", b"y")
    elif kind == "link":
        os.symlink(b"/etc/passwd", path)  # noqa: PTH211
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.mknod(path, 0o020000, os.makedev(0, 0))
