"""Images: directory trees for the roots of cells, named by the digest of their OCI manifest.

An image belongs to the tenants that imported it; a name is a tenant's own and can be moved. Jobs name images by
digest alone, so that the input hash of a job says what it ran in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import msgspec

from aether.contract.errors import AetherError
from aether.contract.ids import parse_digest
from aether.contract.wire import Grant

LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.tar"
"""Media type of a layer kept as an artifact: the changes of a cell's root."""
LISTING_TYPE: Final = "application/vnd.aether.diff+json"
DIFF_NAMES: Final = {LISTING_TYPE: "image-diff.json", LAYER_TYPE: "image-layer.tar"}
"""Names of the artifacts that keep a diff; their media types tell them from a job's own files."""
NAME_PATTERN: Final = r"(?!sha256:)[a-z0-9]+([._-][a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?"
NAME: Final = re.compile(NAME_PATTERN)
NAME_CHARS_MAX: Final = 128
REFERENCE_PATTERN: Final = rf"^(sha256:[0-9a-f]{{64}}|{NAME_PATTERN})$"


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What of an image's configuration is honoured. `uid` and `gid` are those of `user`, null for root and none."""

    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = "/"
    user: str = ""
    uid: int | None = None
    gid: int | None = None


class ImageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An image of a tenant. `size_bytes` and `entries` are of the unpacked tree; `layers` digests, lowest first;
    `skipped` counts entries that no image of ours holds (devices, FIFOs)."""

    digest: str
    names: tuple[str, ...]
    tenant_id: str
    created_at: str
    size_bytes: int
    entries: int
    skipped: int
    layers: tuple[str, ...]
    config: ImageConfig
    labels: tuple[str, ...] = ()


class ImageList(msgspec.Struct, frozen=True, kw_only=True):
    images: tuple[ImageInfo, ...]


class ImageImport(msgspec.Struct, frozen=True, kw_only=True):
    """`image.import`: unpack the tar of an OCI image layout behind descriptor `token`."""

    token: int
    size_bytes: int
    tenant_id: str
    name: str | None = None
    labels: tuple[str, ...] = ()


class LabelQuery(msgspec.Struct, frozen=True, kw_only=True):
    """`artifact.labels`: what artifacts and images of a tenant carry, by digest."""

    tenant_id: str
    artifacts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


class Labelled(msgspec.Struct, frozen=True, kw_only=True):
    """Each label with one digest that carries it, hardly more than LABELS_CARRIED_MAX; a few that are not there."""

    sources: dict[str, str]
    missing: tuple[str, ...] = ()


class ImageKey(msgspec.Struct, frozen=True, kw_only=True):
    """`image.show`, `image.remove`: a name or a digest, as far as the tenant has it."""

    ref: str
    tenant_id: str


@dataclass(frozen=True, slots=True)
class ImportCall:
    """`image.import`: the body was spooled to `fd` (an unlinked file the callee owns and closes)."""

    fd: int
    size_bytes: int
    media_type: str
    name: str | None = None


class ImageCall(msgspec.Struct, frozen=True, kw_only=True):
    """`image.show`, `image.remove`: a name or a digest."""

    image: str


class CommitCall(msgspec.Struct, frozen=True, kw_only=True):
    """`image.commit`: what a job kept, or the `layer` that a cell's diff named on top of the image `base`."""

    job_id: str | None = None
    base: str | None = None
    layer: str | None = None
    name: str | None = None


class CellDiffReply(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.diff`: digests of the image that the cell changes, of the listing and of the layer, now artifacts."""

    base: str
    listing: str
    layer: str


class CellDiff(msgspec.Struct, frozen=True, kw_only=True):
    """`cell.diff`: what the job's cell changed in its image."""

    grant: Grant
    cell_id: str


class CellDiffed(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of two descriptors: the listing as JSON (`DiffListing`), and an uncompressed OCI layer."""

    listing: int
    layer: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`path` is relative to the image's root, what is not UTF-8 in it escaped; `change` is added, modified, replaced
    (a directory, whole) or deleted."""

    path: str
    change: str
    type: str
    size_bytes: int


class DiffListing(msgspec.Struct, frozen=True, kw_only=True):
    """What changed. `refused`: what no image can hold, with the reason."""

    changes: tuple[Change, ...]
    refused: dict[str, str] = {}


class ImageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """`image.list`."""

    tenant_id: str


class ImageCommit(msgspec.Struct, frozen=True, kw_only=True):
    """`image.commit`: what a job changed on top of the image that it changed, or `layer` on `base`."""

    job_id: str | None
    base: str | None
    layer: str | None
    tenant_id: str
    name: str | None = None


def reference(text: str) -> str:
    """A digest, or what can be a name; raises BAD_ID."""
    if text.startswith("sha256:"):
        return parse_digest(text)
    if len(text) > NAME_CHARS_MAX or NAME.fullmatch(text) is None:
        raise AetherError("BAD_ID", f"cannot find image {text[:80]!r}: it is no name and no digest")
    return text


def check_name(name: str) -> str:
    """`name` if it can name an image (an OCI reference of one component, `name` or `name:tag`); raises BAD_ID."""
    if len(name) > NAME_CHARS_MAX or NAME.fullmatch(name) is None:
        raise AetherError("BAD_ID", f"cannot name an image {name[:80]!r}: it must match {NAME.pattern}")
    return name
