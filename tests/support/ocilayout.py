"""OCI image layouts made in memory, so that tests say byte by byte what is wrong with one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def entry(name: str, data: bytes | None = None, **fields: Any) -> tuple[tarfile.TarInfo, bytes | None]:
    """A member of a layer: a file with `data`, else what `type` and `linkname` say."""
    member = tarfile.TarInfo(name)
    member.mode = 0o644
    if data is not None:
        member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, data


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes | None]:
    return entry(name, type=tarfile.DIRTYPE, **fields)


def link(name: str, target: str, *, hard: bool = False) -> tuple[tarfile.TarInfo, bytes | None]:
    return entry(name, type=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, linkname=target)


def layer(entries: Iterable[tuple[tarfile.TarInfo, bytes | None]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in entries:
            tar.addfile(member, None if data is None else io.BytesIO(data))
    return out.getvalue()


def layer_of(root: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(root, ".")
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def archive(
    layers: Iterable[bytes],
    *,
    config: dict[str, Any] | None = None,
    packed: bool = True,
    change: dict[str, Any] | None = None,
) -> bytes:
    """The tar of a layout. `change` replaces keys of the manifest, or blobs by name (`blob:<digest>`)."""
    plain = list(layers)
    stored = [gzip.compress(one, mtime=0) if packed else one for one in plain]
    configuration = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "config": config or {},
        "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in plain]},
    }
    config_blob = json.dumps(configuration).encode()
    kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if packed else "")
    manifest = {
        "schemaVersion": 2,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest(config_blob),
            "size": len(config_blob),
        },
        "layers": [{"mediaType": kind, "digest": digest(one), "size": len(one)} for one in stored],
        **(change or {}).get("manifest", {}),
    }
    manifest_blob = json.dumps(manifest).encode()
    index = {
        "schemaVersion": 2,
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": digest(manifest_blob),
                "size": len(manifest_blob),
            }
        ],
    }
    blobs = {f"blobs/sha256/{digest(one)[7:]}": one for one in (config_blob, manifest_blob, *stored)}
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode(), **blobs}
    files.update((change or {}).get("files", {}))
    return layer(entry(name, data) for name, data in files.items() if data is not None)
