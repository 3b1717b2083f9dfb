"""The loader: the sample loads; every way to tamper with it is refused with its reason, and only that one."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aether.contract.canonical import canonical, digest_bytes
from aether.contract.errors import AetherError
from aether.runtime.modelpackage import MANIFEST, SIGNATURE, LoadedPackage, load_package, load_public_key
from aether.worldmodel.package import sign
from tests.unit.runtime.cfcd_client import PACKAGE, PUBLIC_KEY

OWN_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def refusal(directory: Path, keys: list[Any] | None = None) -> str:
    with pytest.raises(AetherError) as caught:
        load_package(directory, [OWN_KEY.public_key()] if keys is None else keys)
    assert caught.value.code == "BAD_PACKAGE"
    assert caught.value.message.startswith("cannot load model pendulum/1.0.0: ")
    reason: str = caught.value.details["reason"]
    return reason


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A writable copy of the sample, signed with the test's own key."""
    directory = tmp_path / "pendulum" / "1.0.0"
    shutil.copytree(PACKAGE, directory)
    sign(directory, OWN_KEY)
    return directory


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], None], resign: bool = True) -> None:
    manifest = json.loads((directory / MANIFEST).read_bytes())
    change(manifest)
    (directory / MANIFEST).write_bytes(canonical(manifest))
    if resign:
        sign(directory, OWN_KEY)


def replace(directory: Path, name: str, data: bytes) -> None:
    """Another file, with a manifest that names it and a signature that holds."""
    (directory / name).write_bytes(data)
    entry = {"sha256": digest_bytes(data), "size_bytes": len(data)}
    edit_manifest(directory, lambda manifest: manifest["files"].update({name: entry}))


def edit_document(directory: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((directory / name).read_bytes())
    change(document)
    replace(directory, name, canonical(document))


def test_the_sample_loads_under_its_committed_key(package: LoadedPackage) -> None:
    assert (package.manifest.id, package.manifest.version) == ("pendulum", "1.0.0")
    assert package.digest == digest_bytes((PACKAGE / MANIFEST).read_bytes())
    assert package.info.schema.dt_max_s == 0.25
    assert sum(entry.size_bytes for entry in package.manifest.files.values()) <= 5 << 20


def test_own_signature_loads_too(copy: Path) -> None:
    load_package(copy, [OWN_KEY.public_key()])


def test_another_key_or_none_is_refused(copy: Path) -> None:
    assert refusal(copy, [load_public_key(PUBLIC_KEY)]) == "signature"
    assert refusal(copy, []) == "signature"


def test_every_file_is_bound_by_its_hash(copy: Path) -> None:
    names = json.loads((copy / MANIFEST).read_bytes())["files"]
    for name in names:
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert refusal(copy) == "hash", name
        (copy / name).write_bytes(before + b" ")
        assert refusal(copy) == "size", name
        (copy / name).write_bytes(before[:-1])
        assert refusal(copy) == "hash", name
        (copy / name).write_bytes(before)
    load_package(copy, [OWN_KEY.public_key()])


def test_a_changed_manifest_needs_a_new_signature(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest.update(created="2000-01-01T00:00:00.000000Z"), resign=False)
    assert refusal(copy) == "signature"


@pytest.mark.parametrize(
    "damage",
    [
        lambda envelope: envelope.update(payloadType="text/plain"),
        lambda envelope: envelope.update(payload=base64.b64encode(b"{}").decode()),
        lambda envelope: envelope.update(payload="!"),
        lambda envelope: envelope.update(signatures=[]),
        lambda envelope: envelope["signatures"][0].update(sig=base64.b64encode(bytes(64)).decode()),
        lambda envelope: envelope["signatures"][0].update(sig=""),
        lambda envelope: envelope.update(extra=1),
    ],
)
def test_a_damaged_envelope_is_refused(copy: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    envelope = json.loads((copy / SIGNATURE).read_bytes())
    damage(envelope)
    (copy / SIGNATURE).write_bytes(json.dumps(envelope).encode())
    assert refusal(copy) == "signature"


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(schema_version=2),
        lambda manifest: manifest.update(id="../up"),
        lambda manifest: manifest.update(version="1"),
        lambda manifest: manifest.update(extra=1),
        lambda manifest: manifest.pop("created"),
        lambda manifest: manifest["files"].pop("step.onnx"),
        lambda manifest: manifest["files"].update({"../evil": {"sha256": "sha256:0", "size_bytes": 1}}),
        lambda manifest: manifest["files"].update({"/etc/passwd": {"sha256": "sha256:0", "size_bytes": 1}}),
        lambda manifest: manifest["files"]["step.onnx"].update(size_bytes=-1),
        lambda manifest: manifest["limits"].update(history_max=0),
    ],
)
def test_a_wrong_manifest_is_refused_though_signed(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit_manifest(copy, change)
    assert refusal(copy) == "manifest"


def test_a_manifest_in_another_spelling_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_bytes())
    for text in (json.dumps(manifest), '{"id":"other",' + canonical(manifest).decode()[1:]):
        (copy / MANIFEST).write_text(text)
        sign(copy, OWN_KEY)
        assert refusal(copy) == "manifest"


def test_files_are_capped_by_the_manifest_before_they_are_read(copy: Path) -> None:
    edit_manifest(copy, lambda manifest: manifest["files"]["step.onnx"].update(size_bytes=1 << 40))
    assert refusal(copy) == "size"


def test_links_extra_files_and_missing_files_are_refused(copy: Path) -> None:
    (copy / "extra.txt").write_text("x")
    assert refusal(copy) == "layout"
    (copy / "extra.txt").unlink()
    target = copy.parent / "elsewhere"
    shutil.move(copy / "step.onnx", target)
    assert refusal(copy) == "layout"
    (copy / "step.onnx").symlink_to(target)
    assert refusal(copy) == "layout"
    (copy / "step.onnx").unlink()
    os.mkfifo(copy / "step.onnx")
    assert refusal(copy) == "layout"


def test_a_missing_directory_or_signature_is_refused(copy: Path) -> None:
    (copy / SIGNATURE).unlink()
    assert refusal(copy) == "layout"
    shutil.rmtree(copy)
    assert refusal(copy) == "layout"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("schema.json", lambda schema: schema.update(dt_min_s=0)),
        ("schema.json", lambda schema: schema.update(time_unit="ms")),
        ("schema.json", lambda schema: schema["observation"].pop()),
        ("schema.json", lambda schema: schema.update(more=1)),
        ("stats.json", lambda stats: stats["dt_edges_s"].reverse()),
        ("stats.json", lambda stats: stats["interval_factor"].pop()),
        ("stats.json", lambda stats: stats["interval_factor"][0].pop()),
        ("stats.json", lambda stats: stats["log_energy_std"][0].__setitem__(0, 0)),
        ("stats.json", lambda stats: stats.update(thresholds=[])),
        ("stats.json", lambda stats: stats.update(surprise_sorted=[2, 1])),
    ],
)
def test_documents_must_agree(copy: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    edit_document(copy, name, change)
    assert refusal(copy) == "document"


def test_graphs_must_be_the_formats(copy: Path) -> None:
    encode, step = (copy / "encode.onnx").read_bytes(), (copy / "step.onnx").read_bytes()
    for data in (b"", b"not a graph", encode, step[: len(step) // 2]):
        replace(copy, "step.onnx", data)
        assert refusal(copy) == "graph"
    replace(copy, "step.onnx", step)
    edit_document(copy, "schema.json", lambda schema: schema.update(state_size=7))
    assert refusal(copy) == "graph"


def npz(arrays: dict[str, Any], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def test_golden_vectors_must_be_reproduced(copy: Path) -> None:
    with np.load(copy / "golden.npz") as loaded:
        golden = {name: loaded[name] for name in loaded.files}
    for damage in (
        golden | {"step.out.obs_mean": golden["step.out.obs_mean"] + 1e-3},
        golden | {"encode.out.z": golden["encode.out.z"][:1]},
        {name: value for name, value in golden.items() if name != "sequence.in.dt"},
        golden | {"encode.out.z": np.array([{"a": 1}], dtype=object)},
        golden | {"more": np.zeros(2 << 20, np.float32)},
    ):
        replace(copy, "golden.npz", npz(damage))
        assert refusal(copy) == "golden"
    replace(copy, "golden.npz", npz(golden, compressed=True))
    assert refusal(copy) == "golden"
    replace(copy, "golden.npz", b"PK")
    assert refusal(copy) == "golden"


def test_a_key_that_is_not_ed25519_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k.pub"
    for text in (b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        path.write_bytes(text)
        with pytest.raises(AetherError, match="public key"):
            load_public_key(path)


def test_info_travels(package: LoadedPackage) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(package.info), type=type(package.info)) == package.info
