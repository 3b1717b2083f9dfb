"""Images: layouts, layers and hostile archives. The unpacking process is the real one."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.contract.images import ImageInfo, check_name
from aether.orchestrator.images.layout import Archive, Bounded, ImageError, read_image
from aether.orchestrator.images.store import ImageStore
from aether.orchestrator.images.tree import Tree, apply_layer, finish, split_name
from tests.support import ocilayout as oci
from tests.support.hostile import JSON, changed_bytes

TENANT = "tenant_a"


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    made = ImageStore(tmp_path / "images", lambda: 1_700_000_000_000_000_000)
    made.open()
    return made


def with_file(data: bytes, use: Callable[[int], Awaitable[Any]]) -> Any:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return asyncio.run(use(file.fileno()))  # type: ignore[arg-type]


def add(store: ImageStore, data: bytes, name: str | None = None, tenant: str = TENANT) -> ImageInfo:
    info: ImageInfo = with_file(data, lambda fd: store.add(fd, tenant, name))
    return info


def shown(root: Path) -> dict[str, str]:
    """Everything below `root` but what every image has: kind and content."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "/"
        else:
            found[name] = path.read_text()
    return found


BASE = [
    oci.directory("etc"),
    oci.entry("etc/motd", b"one\n"),
    oci.directory("srv"),
    oci.entry("srv/a", b"a"),
    oci.entry("srv/b", b"b"),
    oci.entry("bin/tool", b"#!/bin/sh\n", mode=0o4755),
    oci.link("lib", "usr/lib"),
    oci.directory("usr/lib"),
]


def test_layers_apply_in_order_with_whiteouts(store: ImageStore) -> None:
    top = [
        oci.entry("etc/motd", b"two\n"),
        oci.entry("srv/.wh.a", b""),
        oci.entry("srv/c", b"c"),
        oci.entry("lib/through", b"the link of a lower layer"),
        oci.link("srv/d", "srv/c", hard=True),
    ]
    info = add(store, oci.archive([oci.layer(BASE), oci.layer(top)]), "tools:1")
    tree = store.tree(info.digest)
    found = shown(tree)
    assert found["etc/motd"] == "two\n"
    assert "srv/a" not in found
    assert found["srv/b"] == "b"
    assert found["srv/c"] == found["srv/d"] == "c"
    assert found["usr/lib/through"] == "the link of a lower layer"
    assert (tree / "srv/c").stat().st_ino == (tree / "srv/d").stat().st_ino
    assert (tree / "bin/tool").stat().st_mode & 0o7777 == 0o755
    assert info.names == ("tools:1",)
    assert len(info.layers) == 2


def test_an_opaque_directory_hides_lower_layers_alone(store: ImageStore) -> None:
    top = [oci.entry("srv/new", b"n"), oci.entry("srv/.wh..wh..opq", b""), oci.entry("srv/.wh..wh.plnk", b"")]
    found = shown(store.tree(add(store, oci.archive([oci.layer(BASE), oci.layer(top)])).digest))
    assert [name for name in found if name.startswith("srv/")] == ["srv/new"]


def test_a_directory_may_give_way_and_return(store: ImageStore) -> None:
    middle = [oci.entry("srv", b"a file now")]
    top = [oci.directory("srv"), oci.entry("srv/x", b"x")]
    layers = [oci.layer(one) for one in (BASE, middle, top)]
    found = shown(store.tree(add(store, oci.archive(layers)).digest))
    assert [name for name in found if name.startswith("srv")] == ["srv", "srv/x"]


def test_mount_points_are_real_and_the_job_has_a_name(store: ImageStore) -> None:
    layer = [
        oci.link("tmp", "/etc"),
        oci.link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
        oci.entry("etc/passwd", b"root:x:0:0::/root:/bin/sh"),
    ]
    tree = store.tree(add(store, oci.archive([oci.layer(layer)])).digest)
    assert not (tree / "tmp").is_symlink()
    assert (tree / "etc/resolv.conf").read_text() == ""
    lines = (tree / "etc/passwd").read_text().splitlines()
    assert lines == ["root:x:0:0::/root:/bin/sh", "job:x:1000:1000:job:/work:/bin/sh"]
    assert all((tree / name).is_dir() for name in ("proc", "dev", "work", "run"))


@pytest.mark.parametrize(
    ("config", "ids"),
    [
        ({"User": "1234:99"}, (1234, 99)),
        ({"User": "app"}, (77, 78)),
        ({"User": "app:staff"}, (77, 50)),
        ({"User": "root"}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_the_user_of_the_configuration(store: ImageStore, config: dict[str, str], ids: tuple[int, int]) -> None:
    layer = [
        oci.entry("etc/passwd", b"root:x:0:0::/:\napp:x:77:78::/:\n"),
        oci.entry("etc/group", b"staff:x:50:\n"),
    ]
    info = add(store, oci.archive([oci.layer(layer)], config={**config, "Env": ["A=b"], "Cmd": ["run"]}))
    assert (info.config.uid, info.config.gid) == ids
    assert info.config.env == ("A=b",)
    assert info.config.cmd == ("run",)


OUTSIDE = "outside"


@pytest.mark.parametrize(
    "entries",
    [
        [oci.entry("../outside", b"x")],
        [oci.entry("/outside", b"x")],
        [oci.entry("a/../../outside", b"x")],
        [oci.directory("d"), oci.link("h", "../outside-secret", hard=True)],
        [oci.link("up", "../.."), oci.link("h", "up/outside-secret", hard=True)],
        [oci.link("a", "b"), oci.entry("a/x", b"x")],
        [oci.entry("f", b"x"), oci.entry("f/below", b"x")],
        [oci.link("to", "/etc"), oci.link("h", "to", hard=True)],
        [oci.entry(".wh...", b"")],
        [oci.entry("x" * 300, b"")],
        [oci.entry("/".join("d" * 200), b"")],
        [oci.link("l", "t" * 2000)],
    ],
    ids=lambda entries: "-".join(member.name[:20] for member, _ in entries),
)
def test_hostile_entries_are_refused(store: ImageStore, tmp_path: Path, entries: list[Any]) -> None:
    (tmp_path / "outside-secret").write_text("secret")
    with pytest.raises(AetherError) as caught:
        add(store, oci.archive([oci.layer(entries)]))
    assert caught.value.code == "BAD_IMAGE", caught.value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "outside-secret"]
    assert not list((tmp_path / "images/tmp").iterdir())


def test_links_out_of_the_root_write_inside_of_it(store: ImageStore, tmp_path: Path) -> None:
    """As in a cell: ".." of the root is the root, and an absolute link begins there."""
    layer = [
        oci.link("up", "../../../.."),
        oci.entry("up/file", b"in"),
        oci.link("abs", "/etc"),
        oci.entry("abs/x", b"y"),
    ]
    tree = store.tree(add(store, oci.archive([oci.layer([oci.directory("etc"), *layer])])).digest)
    assert (tree / "file").read_text() == "in"
    assert (tree / "etc/x").read_text() == "y"
    assert not (tmp_path / "file").exists()


def test_devices_are_skipped_and_counted(store: ImageStore) -> None:
    kinds = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    info = add(store, oci.archive([oci.layer([oci.entry(f"n{i}", type=kind) for i, kind in enumerate(kinds)])]))
    assert info.skipped == 3
    assert not [name for name in shown(store.tree(info.digest)) if name.startswith("n")]


def _swap(kind: str) -> bytes:
    good = oci.layer(BASE)
    packed = gzip.compress(good, mtime=0)
    name = f"blobs/sha256/{oci.digest(packed)[7:]}"
    files: dict[str, Any] = {
        "layer": {name: gzip.compress(good, compresslevel=1, mtime=0)},
        "cut": {name: packed[:-20]},
        "missing": {name: None},
        "layout": {"oci-layout": b'{"imageLayoutVersion": "2.0.0"}'},
        "index": {"index.json": b'{"manifests": []}'},
        "json": {"index.json": b"[" * 100_000},
    }[kind]
    return oci.archive([good], change={"files": files})


@pytest.mark.parametrize("kind", ["layer", "cut", "missing", "layout", "index", "json"])
def test_what_does_not_match_its_digest_is_refused(store: ImageStore, kind: str) -> None:
    with pytest.raises(AetherError) as caught:
        add(store, _swap(kind))
    assert caught.value.code == "BAD_IMAGE"
    assert store.list(TENANT) == ()


def test_a_bomb_ends_at_the_bound(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = Bounded(io.BytesIO(bytes(4096)), 1024)
    with pytest.raises(ImageError, match="larger than"):
        bomb.read()


def test_unpacked_once_referenced_by_name_and_tenant(store: ImageStore) -> None:
    data = oci.archive([oci.layer(BASE)])
    first = add(store, data, "one")
    inode = store.tree(first.digest).stat().st_ino
    again = add(store, data, "two")
    other = add(store, data, "one", "tenant_b")
    assert first.digest == again.digest == other.digest
    assert again.names == ("one", "two")
    assert store.tree(first.digest).stat().st_ino == inode
    moved = add(store, oci.archive([oci.layer(BASE[:2])]), "one")
    assert store.find("one", TENANT).digest == moved.digest
    assert store.find(first.digest, TENANT).names == ("two",)
    with pytest.raises(AetherError, match="cannot find image"):
        store.find("two", "tenant_b")
    asyncio.run(store.remove(first.digest, TENANT))
    assert store.tree(first.digest).exists()
    asyncio.run(store.remove("one", "tenant_b"))
    assert not store.tree(first.digest).exists()


def test_references_survive_a_restart(store: ImageStore, tmp_path: Path) -> None:
    info = add(store, oci.archive([oci.layer(BASE)]), "kept")
    (tmp_path / "images/tmp/left").mkdir()
    again = ImageStore(tmp_path / "images", lambda: 0)
    again.open()
    assert again.find("kept", TENANT) == info
    assert not (tmp_path / "images/tmp/left").exists()


def test_commit_stacks_a_layer_and_leaves_the_base_alone(store: ImageStore) -> None:
    base = add(store, oci.archive([oci.layer(BASE)], config={"Env": ["A=1"]}), "base")
    before = shown(store.tree(base.digest))
    top = oci.layer([oci.entry("etc/motd", b"changed"), oci.entry("srv/.wh.a", b"")])
    made = with_file(top, lambda fd: store.commit("base", fd, TENANT, "derived"))
    assert made.layers == (*base.layers, oci.digest(top))
    assert made.config == base.config
    found = shown(store.tree(made.digest))
    assert found["etc/motd"] == "changed"
    assert "srv/a" not in found
    assert shown(store.tree(base.digest)) == before
    again = with_file(top, lambda fd: store.commit("derived", fd, TENANT, None))
    assert again.digest != made.digest


@pytest.mark.parametrize("name", ["", "UPPER", "a b", "../x", "sha256:" + "0" * 64, "x" * 129, "a:b:c", "-a"])
def test_bad_names(name: str) -> None:
    with pytest.raises(AetherError):
        check_name(name)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=4096))
def test_any_bytes_as_archive_are_refused_in_order(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(ImageError):
            read_image(Archive(file.fileno()))


names = st.lists(st.sampled_from(["a", "b", "..", ".", "", ".wh.a", ".wh..wh..opq", "l", "tmp"]), max_size=5).map(
    "/".join
)
members = st.tuples(names, st.sampled_from("frslhdc"), names)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(members, max_size=8), max_size=3))
def test_any_layers_stay_in_their_root(layers: list[list[tuple[str, str, str]]]) -> None:
    """Whatever the entries are: refused, or nothing outside of the root is made, changed or removed."""
    with tempfile.TemporaryDirectory(prefix="aether-images-") as top:
        _fill(Path(top), layers)


def _fill(top: Path, layers: list[list[tuple[str, str, str]]]) -> None:
    (top / "root").mkdir()
    (top / "a").write_text("outside")
    (top / "b").mkdir()
    fd = os.open(top / "root", os.O_RDONLY | os.O_DIRECTORY)
    try:
        tree = Tree(fd)
        for entries in layers:
            apply_layer(tree, Bounded(io.BytesIO(oci.layer(_member(*one) for one in entries)), 1 << 20))
        finish(tree)
    except (ImageError, OSError):
        pass
    finally:
        os.close(fd)
    assert sorted(path.name for path in top.iterdir()) == ["a", "b", "root"]
    assert (top / "a").read_text() == "outside"
    assert not list((top / "b").iterdir())
    for path in (top / "root").rglob("*"):
        assert path.is_symlink() or path.is_dir() or path.is_file()


def _member(name: str, kind: str, target: str) -> tuple[tarfile.TarInfo, bytes | None]:
    if kind in "fr":
        return oci.entry(name, b"data")
    if kind in "sl":
        return oci.link(name, target or "x")
    if kind == "h":
        return oci.link(name, target or "x", hard=True)
    return oci.directory(name) if kind == "d" else oci.entry(name, type=tarfile.CHRTYPE)


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_split_names_never_climb(name: str) -> None:
    try:
        parts = split_name(name)
    except (ImageError, UnicodeEncodeError):
        return
    assert ".." not in parts
    assert not any("/" in part or part in ("", ".") for part in parts)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob("images/tmp/*"))


@settings(max_examples=80, deadline=None)
@given(changed_bytes(oci.archive([oci.layer([oci.entry("a", b"a")])])))
def test_a_changed_archive_is_an_image_or_refused(data: bytes) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with suppress(ImageError):
            read_image(Archive(file.fileno()))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["config", "layers", "schemaVersion", "mediaType", "extra"]), JSON, max_size=3))
def test_any_manifest_is_an_image_or_refused(manifest: dict[str, Any]) -> None:
    """Its digest and size hold, so that it is read to its end."""
    with tempfile.TemporaryFile() as file:
        file.write(oci.archive([oci.layer([oci.entry("a", b"a")])], change={"manifest": manifest}))
        file.flush()
        with suppress(ImageError):
            read_image(Archive(file.fileno()))
