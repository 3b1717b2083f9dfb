"""What aurorad does with images when the authority asks: import, list, show, remove, commit."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from aether.contract import images
from aether.contract.errors import AetherError
from aether.contract.jobs import parse_command
from aether.contract.limits import LABELS_CARRIED_MAX
from aether.contract.ports import Handler, Link
from aether.contract.store import Store
from aether.orchestrator.artifacts.store import ArtifactStore
from aether.orchestrator.images.store import ImageStore

LIST_BYTES_MAX: Final = 192 * 1024
"""A list must fit in a frame: the newest images that do."""
MISSING_SHOWN: Final = 16
_encode: Final = msgspec.msgpack.Encoder().encode


class ImageVerbs:
    """Handlers over an ImageStore; layers come from the artifacts."""

    def __init__(self, kept: ImageStore, artifacts: ArtifactStore, store: Store) -> None:
        self._images = kept
        self._artifacts = artifacts
        self._store = store

    def handlers(self, link: Callable[[], Link | None]) -> Mapping[str, tuple[type[msgspec.Struct], Handler]]:
        """The verbs; `link` is the connection that descriptors come by."""

        async def add(body: images.ImageImport) -> images.ImageInfo:
            over = link()
            if over is None:
                raise AetherError("UNAVAILABLE", "cannot import an image: the connection ended", retry_after_s=1)
            return await self.add(over, body)

        return {
            "image.import": (images.ImageImport, add),
            "image.list": (images.ImageQuery, self.list),
            "image.show": (images.ImageKey, self.show),
            "image.remove": (images.ImageKey, self.remove),
            "image.commit": (images.ImageCommit, self.commit),
            "artifact.labels": (images.LabelQuery, self.labels),
        }

    async def add(self, link: Link, body: images.ImageImport) -> images.ImageInfo:
        fd = await link.take_fd(body.token)
        try:
            return await self._images.add(fd, body.tenant_id, body.name, body.labels)
        finally:
            os.close(fd)

    async def list(self, body: images.ImageQuery) -> images.ImageList:
        shown: list[images.ImageInfo] = []
        room = LIST_BYTES_MAX
        for info in reversed(self._images.list(body.tenant_id)):
            room -= len(_encode(info))
            if room < 0:
                break
            shown.append(info)
        return images.ImageList(images=tuple(shown))

    async def show(self, body: images.ImageKey) -> images.ImageInfo:
        return self._images.find(body.ref, body.tenant_id)

    async def remove(self, body: images.ImageKey) -> images.ImageInfo:
        return await self._images.remove(body.ref, body.tenant_id)

    async def commit(self, body: images.ImageCommit) -> images.ImageInfo:
        base, layer = await self._committed(body)
        carried = await self.labels(images.LabelQuery(tenant_id=body.tenant_id, artifacts=(layer,)))
        fd, _ = await self._artifacts.open_fd(layer)
        try:
            return await self._images.commit(base, fd, body.tenant_id, body.name, tuple(carried.sources))
        finally:
            os.close(fd)

    async def labels(self, body: images.LabelQuery) -> images.Labelled:
        sources: dict[str, str] = {}
        missing: list[str] = []
        for digest in dict.fromkeys(body.artifacts):
            known = await self._store.find_artifact(digest, body.tenant_id)
            if known is None or await self._artifacts.size(digest) is None:
                missing.append(digest)
            _carry(sources, digest, known.labels if known is not None else ())
        for digest in body.images:
            try:
                _carry(sources, digest, self._images.find(digest, body.tenant_id).labels)
            except AetherError:
                missing.append(digest)
        return images.Labelled(sources=sources, missing=tuple(missing[:MISSING_SHOWN]))

    async def _committed(self, body: images.ImageCommit) -> tuple[str, str]:
        """The image below and the layer, which the tenant has both; raises NOT_FOUND, NO_LAYER."""
        if body.job_id is None:
            known = await self._store.find_artifact(body.layer or "", body.tenant_id)
            if known is None or known.media_type != images.LAYER_TYPE:
                raise AetherError("NO_LAYER", f"cannot commit {body.layer}: it is no layer", "see `aether cell diff`")
            return body.base or "", known.digest
        row = await self._store.get(body.job_id)
        if row is None or row.request is None or row.tenant_id != body.tenant_id:
            raise AetherError("NOT_FOUND", f"cannot find job {body.job_id}")
        layer = next((ref.digest for ref in row.view.artifacts if ref.media_type == images.LAYER_TYPE), None)
        asked = parse_command(row.request)[0].images if layer is not None else None
        if layer is None or asked is None or asked.changed is None:
            why = f"cannot commit what {body.job_id} changed: it kept no diff"
            raise AetherError("NO_LAYER", why, "run it with --keep-diff")
        return asked.changed, layer


def _carry(sources: dict[str, str], digest: str, labels: tuple[str, ...]) -> None:
    for label in labels:
        if len(sources) <= LABELS_CARRIED_MAX:
            sources.setdefault(label, digest)


def check_images(kept: ImageStore, digests: tuple[str | None, ...], tenant_id: str) -> None:
    """The tenant has these images, unpacked; raises NOT_FOUND, GONE."""
    for digest in digests:
        if digest is not None and not kept.tree(kept.find(digest, tenant_id).digest).is_dir():
            raise AetherError("GONE", f"cannot use image {digest}: it is not unpacked here", "import it again")
