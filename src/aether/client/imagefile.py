"""What is sent for `image.import`: the tar of an OCI image layout, made here of whatever the caller names.

A file goes as it is, a directory with an `oci-layout` as a tar, and any other directory becomes an image of one
layer: with this user's rights, in a fixed order, without owners, so that the same tree is the same image.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, cast

from aether.contract import limits
from aether.contract.errors import AetherError

_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
_TYPE: Final = "application/vnd.oci.image."


@contextmanager
def opened_image(source: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The archive to send, from its start; raises BAD_FIELD."""
    path = Path(source)
    try:
        if path.is_dir():
            with tempfile.TemporaryFile() as out:
                _pack_layout(path, out) if (path / "oci-layout").exists() else _pack_tree(path, out)
                out.seek(0)
                yield cast("BinaryIO", out)
        else:
            with path.open("rb") as file:
                yield file
    except OSError as error:
        why = f"cannot send {str(source)!r} as an image: {error.strerror or error}"
        raise AetherError("BAD_FIELD", why, "name an OCI layout, its tar, or a directory") from error


def _pack_layout(path: Path, out: IO[bytes]) -> None:
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("oci-layout", "index.json"):
            tar.add(path / name, name)
        for blob in sorted((path / "blobs/sha256").iterdir()):
            tar.add(blob, f"blobs/sha256/{blob.name}", recursive=False)


def _pack_tree(path: Path, out: IO[bytes]) -> None:
    with tempfile.TemporaryFile() as layer:
        with tarfile.open(fileobj=layer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            _add_tree(tar, path)
        size = layer.tell()
        if size > limits.UPLOAD_BYTES_MAX:
            raise AetherError("TOO_LARGE", f"cannot send {str(path)!r} as an image: it has {size} bytes")
        layer.seek(0)
        digest = hashlib.file_digest(layer, "sha256").hexdigest()
        machine = _MACHINES.get(platform.machine(), platform.machine())
        config = {"architecture": machine, "os": "linux", "config": {}}
        config_blob = _json({**config, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}})
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{_TYPE}manifest.v1+json",
                "config": _descriptor("config.v1+json", config_blob),
                "layers": [{"mediaType": f"{_TYPE}layer.v1.tar", "digest": f"sha256:{digest}", "size": size}],
            }
        )
        index = _json({"schemaVersion": 2, "manifests": [_descriptor("manifest.v1+json", manifest)]})
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
            _add(tar, "index.json", index)
            for blob in (config_blob, manifest):
                _add(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)
            layer.seek(0)
            member = tarfile.TarInfo(f"blobs/sha256/{digest}")
            member.size = size
            tar.addfile(member, layer)


def _add_tree(tar: tarfile.TarFile, root: Path) -> None:
    """Directories, files and links in the order of their names; anything else is no part of an image."""
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted((*names, *files)):
            path = Path(directory, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                continue
            member = tar.gettarinfo(str(path), str(path.relative_to(root)))
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = int(member.mtime)
            if member.isreg():
                with path.open("rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _descriptor(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": _TYPE + kind, "digest": f"sha256:{hashlib.sha256(blob).hexdigest()}", "size": len(blob)}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
