"""Reading a tar of an OCI image layout (github.com/opencontainers/image-spec): which blobs make the image.

Every document is found by its digest and checked against it; sizes and counts are bounded before anything is
read. Docker's types of the same documents are understood. Bytes come from a client: ImageError for all that is not
exactly such an archive.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import tarfile
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TypeVar

import msgspec

from aether.contract import limits

ARCHIVE_MEMBERS_MAX: Final = 4096
INDEX_DEPTH_MAX: Final = 3
_CHUNK_BYTES: Final = 1 << 20
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_LAYERS: Final = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
}
_MACHINES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
T = TypeVar("T")


class ImageError(Exception):
    """Why bytes are no image; the text follows "cannot import the image: "."""


class Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename={"media_type": "mediaType"}):
    """A reference to a blob (image-spec, descriptor.md)."""

    digest: str
    size: int
    media_type: str = ""
    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True):
    config: Descriptor
    layers: tuple[Descriptor, ...]


class Execution(msgspec.Struct, frozen=True, rename="pascal"):
    """The `config` of a configuration, as far as it is honoured."""

    env: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    working_dir: str = ""
    user: str = ""


class Rootfs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...]


class Configuration(msgspec.Struct, frozen=True):
    rootfs: Rootfs
    config: Execution | None = None
    architecture: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """`size_bytes` from `offset` of the archive; `diff_id` is the digest of the tar within."""

    digest: str
    diff_id: str
    compression: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Image:
    digest: str
    manifest: bytes
    config: bytes
    execution: Execution
    layers: tuple[Layer, ...]


class Archive:
    """Blobs of an archive by name; `fd` is a seekable file that stays open as long as this is used."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._places: dict[str, tuple[int, int]] = {}
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            with open(os.dup(fd), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for number, member in enumerate(tar):
                    if number >= ARCHIVE_MEMBERS_MAX:
                        raise ImageError(f"its archive has more than {ARCHIVE_MEMBERS_MAX} members")
                    if member.isreg() and not member.sparse:
                        self._places[member.name.removeprefix("./")] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise ImageError(f"it is no tar archive: {error}") from error

    def place(self, name: str) -> tuple[int, int]:
        """(offset, bytes) of a member; raises ImageError."""
        found = self._places.get(name)
        if found is None:
            raise ImageError(f"its archive holds no {name}")
        return found

    def read(self, name: str) -> bytes:
        offset, size = self.place(name)
        if size > limits.IMAGE_DOCUMENT_BYTES_MAX:
            raise ImageError(f"{name} has more than {limits.IMAGE_DOCUMENT_BYTES_MAX} bytes")
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise ImageError(f"{name} ends early")
        return data

    def blob(self, descriptor: Descriptor) -> bytes:
        """A small blob, checked against its descriptor."""
        data = self.read(_blob_name(descriptor.digest))
        if len(data) != descriptor.size or f"sha256:{hashlib.sha256(data).hexdigest()}" != descriptor.digest:
            raise ImageError(f"blob {descriptor.digest} is not what its descriptor says")
        return data


def read_image(archive: Archive) -> Image:
    """The one image of the archive for this machine; raises ImageError. Layers are not read yet."""
    layout = _decode(archive.read("oci-layout"), dict[str, Any], "oci-layout")
    if layout.get("imageLayoutVersion") != "1.0.0":
        raise ImageError("its oci-layout is not of version 1.0.0")
    chosen = _choose(archive, _decode(archive.read("index.json"), Index, "index.json"), 1)
    manifest_bytes = archive.blob(chosen)
    manifest = _decode(manifest_bytes, Manifest, "the manifest")
    config_bytes = archive.blob(manifest.config)
    config = _decode(config_bytes, Configuration, "the configuration")
    if len(manifest.layers) > limits.IMAGE_LAYERS_MAX:
        raise ImageError(f"it has more than {limits.IMAGE_LAYERS_MAX} layers")
    if len(manifest.layers) != len(config.rootfs.diff_ids):
        raise ImageError("its manifest and its configuration name different layers")
    if config.architecture and config.architecture != _architecture():
        raise ImageError(f"it is for {config.architecture[:32]!a}, this machine is {_architecture()}")
    pairs = zip(manifest.layers, config.rootfs.diff_ids, strict=True)
    layers = tuple(_layer(archive, descriptor, diff_id) for descriptor, diff_id in pairs)
    return Image(chosen.digest, manifest_bytes, config_bytes, config.config or Execution(), layers)


def _architecture() -> str:
    return _MACHINES.get(platform.machine(), platform.machine())


def _choose(archive: Archive, index: Index, depth: int) -> Descriptor:
    ours = [one for one in index.manifests if one.platform is None or _suits(one.platform)]
    if len(ours) != 1:
        raise ImageError(f"its index names {len(ours)} images for linux/{_architecture()}, not one")
    if ours[0].media_type not in _INDEXES:
        return ours[0]
    if depth == INDEX_DEPTH_MAX:
        raise ImageError("its indexes name each other")
    return _choose(archive, _decode(archive.blob(ours[0]), Index, "an index"), depth + 1)


def _suits(where: Platform) -> bool:
    return where.os in ("", "linux") and where.architecture in ("", _architecture())


def _layer(archive: Archive, descriptor: Descriptor, diff_id: str) -> Layer:
    compression = _LAYERS.get(descriptor.media_type)
    if compression is None:
        raise ImageError(f"a layer has the unknown media type {descriptor.media_type[:80]!a}")
    if not _DIGEST.fullmatch(diff_id):
        raise ImageError("a diff_id is no SHA-256 digest")
    offset, size = archive.place(_blob_name(descriptor.digest))
    if size != descriptor.size:
        raise ImageError(f"blob {descriptor.digest} is not as long as its descriptor says")
    return Layer(descriptor.digest, diff_id, compression, offset, size)


def _blob_name(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise ImageError(f"{digest[:80]!a} is no SHA-256 digest")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _decode(data: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ImageError(f"{what} cannot be read: {error}") from error


class Section:
    """`size` bytes of a file from `offset` on as a stream, hashed as they are read."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._at, self._end = fd, offset, offset + size
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        left = self._end - self._at
        data = os.pread(self._fd, min(left, _CHUNK_BYTES if size < 0 else size), self._at)
        if not data and left and size:
            raise ImageError("a layer ends early")
        self._at += len(data)
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Of all; reads what nobody has read."""
        while self.read():
            pass
        return f"sha256:{self._hash.hexdigest()}"


class Bounded:
    """What a layer holds, uncompressed, at most `bytes_max` of it, hashed as it is read."""

    def __init__(self, source: BinaryIO | Any, bytes_max: int) -> None:
        self._source = source
        self._left = bytes_max
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._source.read(_CHUNK_BYTES if size < 0 else size)
        self._left -= len(data)
        if self._left < 0:
            raise ImageError(f"it is larger than {limits.IMAGE_BYTES_MAX} bytes when unpacked")
        self._hash.update(data)
        return data

    def digest(self) -> str:
        """Of all; reads what nobody has read."""
        while self.read(_CHUNK_BYTES):
            pass
        return f"sha256:{self._hash.hexdigest()}"
