"""Outputs land below the chosen directory and nowhere else; nothing is replaced unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from aether.cli.download import save_outputs
from aether.client import Client
from aether.contract.errors import AetherError
from aether.contract.jobs import ArtifactRef


def ref(client: Client, name: str, data: bytes) -> ArtifactRef:
    info = client.artifact_put(data)
    return ArtifactRef(name=name, digest=info.digest, size_bytes=len(data))


def test_writes_nested_and_empty(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    names = save_outputs(client, [ref(client, "a/b/c.txt", b"x"), ref(client, "empty", b"")], out, force=False)
    assert names == ["a/b/c.txt", "empty"]
    assert ((out / "a/b/c.txt").read_bytes(), (out / "empty").read_bytes()) == (b"x", b"")
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == ["c.txt", "empty"]


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/../../x", "a//b", ".", "", "a/./b", "x\n", "a\x00b"])
def test_names_that_lead_outside(client: Client, tmp_path: Path, name: str) -> None:
    with pytest.raises(AetherError):
        save_outputs(client, [ref(client, name, b"x")], tmp_path, force=True)


def test_symbolic_links_are_not_followed(client: Client, tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / "dir").symlink_to(outside)
    (outside / "target").write_text("kept")
    (out / "file").symlink_to(outside / "target")
    for name in ("dir/x", "file"):
        with pytest.raises(AetherError, match="OUTPUT_REFUSED"):
            save_outputs(client, [ref(client, name, b"x")], out, force=False)
    save_outputs(client, [ref(client, "file", b"new")], out, force=True)
    assert not (out / "file").is_symlink() and (outside / "target").read_text() == "kept"
    with pytest.raises(AetherError, match="symbolic link"):
        save_outputs(client, [ref(client, "dir/x", b"x")], out, force=True)
    assert [p.name for p in outside.iterdir()] == ["target"]


def test_existing_files(client: Client, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(AetherError) as caught:
        save_outputs(client, [ref(client, "f", b"new")], tmp_path, force=False)
    assert caught.value.code == "OUTPUT_REFUSED" and "sha256:" in caught.value.remedy
    assert (tmp_path / "f").read_bytes() == b"old"
    save_outputs(client, [ref(client, "f", b"old")], tmp_path, force=False)
    save_outputs(client, [ref(client, "f", b"new")], tmp_path, force=True)
    assert (tmp_path / "f").read_bytes() == b"new"


def test_wrong_bytes_leave_nothing(client: Client, node, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    artifact = ref(client, "f", b"right")
    node.service.artifacts[artifact.digest] = (b"wrong", node.service.artifacts[artifact.digest][1])
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(AetherError, match="VERIFY_FAILED"):
        save_outputs(client, [artifact], out, force=False)
    assert list(out.iterdir()) == []
