"""Operations on images, and the verb that hands out what a job changed in one.

aurorad keeps the images; the authority says whose they are and records which came, were made and went. The record is
durable before the answer is released.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from aether.contract import ids
from aether.contract.allocations import CellView
from aether.contract.calls import Caller, Nothing
from aether.contract.cellcalls import AllocateCall, CellCall
from aether.contract.cells import Images
from aether.contract.errors import AetherError
from aether.contract.images import (
    LAYER_TYPE,
    LISTING_TYPE,
    CellDiff,
    CellDiffed,
    CellDiffReply,
    CommitCall,
    ImageCall,
    ImageCommit,
    ImageImport,
    ImageInfo,
    ImageKey,
    ImageList,
    ImageQuery,
    ImportCall,
    check_name,
    reference,
)
from aether.contract.ports import Link
from aether.contract.records import Record, RecordType
from aether.contract.wire import ArtifactInfo, ArtifactPut
from aether.substrate.access.access import Admission, Resource
from aether.substrate.book import Book
from aether.substrate.cellhouse import CellHouse
from aether.substrate.cells.supervisor import CellSupervisor
from aether.substrate.execution import Execution
from aether.substrate.gate import Gate
from aether.substrate.orchestra import Orchestra

_KIND: Final = "image"


class ImageDesk:
    """Handlers of `image.*` and of the verb `cell.diff`."""

    def __init__(
        self,
        gate: Gate,
        book: Book,
        orchestra: Orchestra,
        execution: Execution,
        cells: CellSupervisor,
        house: CellHouse,
    ) -> None:
        self._gate = gate
        self._book = book
        self._orchestra = orchestra
        self._execution = execution
        self._cells = cells
        self._house = house

    def handlers(self) -> Mapping[str, Callable[[Caller, Any], Awaitable[ImageInfo | ImageList | CellDiffReply]]]:
        return {
            "image.import": self.add,
            "image.list": self.list,
            "image.show": self.show,
            "image.remove": self.remove,
            "image.commit": self.commit,
            "cell.diff": self.diff_cell,
        }

    # ---- operations

    async def add(self, caller: Caller, call: ImportCall) -> ImageInfo:
        """`image.import`; `call.fd` is ours to close."""
        try:
            admission = self._gate.admit(caller, "image.import", Resource(kind=_KIND, id=call.name))
            self._check_room()
            if call.name is not None:
                check_name(call.name)
            link = self._orchestra.link()
            tenant_id = admission.principal.tenant_id
            token = await link.send_fd(call.fd)
            body = ImageImport(
                token=token, size_bytes=call.size_bytes, tenant_id=tenant_id, name=call.name, labels=admission.labels
            )
            info = await link.call("image.import", body, ImageInfo)
        finally:
            os.close(call.fd)
        return await self._recorded("image.imported", caller, admission, "image.import", info, call.name)

    async def list(self, caller: Caller, call: Nothing) -> ImageList:
        admission = self._gate.admit(caller, "image.list", Resource(kind=_KIND))
        query = ImageQuery(tenant_id=admission.principal.tenant_id)
        return await self._orchestra.link().call("image.list", query, ImageList)

    async def show(self, caller: Caller, call: ImageCall) -> ImageInfo:
        ref = reference(call.image)
        admission = self._gate.admit(caller, "image.show", Resource(kind=_KIND, id=ref))
        key = ImageKey(ref=ref, tenant_id=admission.principal.tenant_id)
        return await self._orchestra.link().call("image.show", key, ImageInfo)

    async def remove(self, caller: Caller, call: ImageCall) -> ImageInfo:
        ref = reference(call.image)
        admission = self._gate.admit(caller, "image.remove", Resource(kind=_KIND, id=ref))
        self._check_room()
        key = ImageKey(ref=ref, tenant_id=admission.principal.tenant_id)
        info = await self._orchestra.link().call("image.remove", key, ImageInfo)
        return await self._recorded("image.removed", caller, admission, "image.remove", info, ref)

    async def commit(self, caller: Caller, call: CommitCall) -> ImageInfo:
        job_id = ids.parse(ids.JOB, call.job_id) if call.job_id is not None else None
        base = reference(call.base) if call.base is not None else None
        layer = ids.parse_digest(call.layer) if call.layer is not None else None
        if (job_id is None) == (base is None) or (base is None) != (layer is None):
            raise AetherError("BAD_FIELD", "cannot commit: it takes a job_id, or a base and a layer")
        admission = self._gate.admit(caller, "image.commit", Resource(kind=_KIND, id=job_id or base))
        self._check_room()
        if call.name is not None:
            check_name(call.name)
        tenant_id = admission.principal.tenant_id
        body = ImageCommit(job_id=job_id, base=base, layer=layer, tenant_id=tenant_id, name=call.name)
        info = await self._orchestra.link().call("image.commit", body, ImageInfo)
        return await self._recorded("image.imported", caller, admission, "image.commit", info, call.name)

    async def allocate(self, caller: Caller, call: AllocateCall) -> CellView:
        """`cell.allocate`: of images that the caller's tenant has."""
        asked = call.request.images or Images()
        marks: dict[str, str] = {}
        for digest in (asked.root, asked.work):
            if digest is not None:
                shown = await self.show(caller, ImageCall(image=digest))
                marks |= dict.fromkeys(shown.labels, digest)
        return await self._house.allocate(caller, call, marks)

    async def diff_cell(self, caller: Caller, call: CellCall) -> CellDiffReply:
        """`cell.diff`; raises NO_LAYER."""
        admission, cell = self._house.live(caller, "cell.diff", call.cell)
        self._check_room()
        self._house.touch(cell)
        asked = self._house.request_of(cell).images
        base = asked.changed if asked is not None else None
        if base is None:
            raise AetherError("NO_LAYER", f"cannot tell what cell {call.cell} changed: no image of it can be changed")
        link = self._orchestra.link()
        kept = []
        fds = await self._cells.diff(cell.cell_id)
        try:
            for fd, media_type in zip(fds, (LISTING_TYPE, LAYER_TYPE), strict=True):
                size = os.fstat(fd).st_size
                body = ArtifactPut(
                    token=await link.send_fd(fd),
                    size_bytes=size,
                    media_type=media_type,
                    tenant_id=admission.principal.tenant_id,
                    labels=cell.labels,
                )
                kept.append((await link.call("artifact.put", body, ArtifactInfo)).digest)
        finally:
            for fd in fds:
                os.close(fd)
        return CellDiffReply(base=base, listing=kept[0], layer=kept[1])

    # ---- the verb

    async def diff(self, link: Link, body: CellDiff) -> CellDiffed:
        """`cell.diff`, under the grant of the cell's job."""
        job = self._execution.granted(body.grant)
        listing, layer = await self._cells.diff(job.place)
        try:
            return CellDiffed(listing=await link.send_fd(listing), layer=await link.send_fd(layer))
        finally:
            os.close(listing)
            os.close(layer)

    # ---- inside

    def _check_room(self) -> None:
        if not self._book.log.room():
            raise AetherError("DISK_FULL", "cannot change images: the disk of the state directory is almost full")

    async def _recorded(
        self, kind: RecordType, caller: Caller, admission: Admission, operation: str, info: ImageInfo, name: str | None
    ) -> ImageInfo:
        record = self._book.write(
            lambda index, time: Record(
                type=kind,
                log_index=index,
                time=time,
                node_id=self._gate.node.node_id,
                tenant_id=admission.principal.tenant_id,
                principal=admission.principal.name,
                request_id=caller.request_id,
                traceparent=caller.traceparent,
                operation=operation,
                effect="control",
                ticket=admission.ticket,
                policy=admission.policy,
                detail={"image": info.digest, "name": name or "", "size_bytes": str(info.size_bytes)},
            )
        )
        await self._book.durable(record)
        return info
