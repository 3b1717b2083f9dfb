"""Command jobs: inputs into a cell, the cell's life, outputs into artifacts.

Each method performs one command of the machine over a link and returns the event that answers it. Every one
may be performed again after a restart: `cell.launch` and `job.finish` are idempotent per job and attempt,
artifacts are content-addressed. The authority frees the cell when the outcome is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from mimetypes import MimeTypes
from typing import Final

import msgspec

from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError, ErrorBody
from aether.contract.images import DIFF_NAMES, LAYER_TYPE, LISTING_TYPE, CellDiff, CellDiffed
from aether.contract.jobs import ArtifactRef, CommandInputs, CommandParams, JobRequest, parse_command
from aether.contract.limits import KIB, OUTPUT_BYTES_MAX, OUTPUT_FILES_MAX
from aether.contract.ports import Link
from aether.contract.store import JobRow, Store
from aether.contract.wire import (
    ArtifactInfo,
    CellCollect,
    CellFile,
    CellFiles,
    CellLaunch,
    CellLaunched,
    CellOpen,
    CellStop,
    Empty,
    Grant,
    Token,
)
from aether.orchestrator.artifacts.store import ArtifactStore
from aether.orchestrator.engines.calls import insist, send_fd, take_fd
from aether.orchestrator.images.store import ImageStore
from aether.orchestrator.images.verbs import check_images
from aether.orchestrator.jobs import machine

MANIFEST_NAME: Final = "artifacts.json"
_REFS_BYTES_MAX: Final = 12 * KIB
"""References in the outcome record, within OUTCOME_BYTES_RESERVED; more are named by one manifest artifact."""
_REFUSALS_SHOWN: Final = 5
_encode: Final = msgspec.json.Encoder().encode
_TYPES: Final = MimeTypes()


@dataclass(frozen=True, slots=True)
class _Command:
    grant: Grant
    request: JobRequest
    params: CommandParams
    inputs: CommandInputs
    labels: tuple[str, ...]


class CommandEngine:
    """Runs command jobs through the authority. Holds no state of its own."""

    def __init__(self, store: Store, artifacts: ArtifactStore, images: ImageStore, clock_ns: Callable[[], int]) -> None:
        self._store = store
        self._artifacts = artifacts
        self._images = images
        self._clock_ns = clock_ns

    async def launch(self, link: Link, row: JobRow, again: bool) -> machine.AnyEvent:
        """Performs LaunchCell."""
        try:
            command = await self._load(row)
            tokens = [await self._hand_over(link, file.artifact) for file in command.inputs.files]
            body = CellLaunch(
                grant=command.grant,
                request=command.request,
                labels=command.labels,
                tokens=tuple(tokens),
                again=again,
            )
            launched = await insist(link, "cell.launch", body, CellLaunched)
        except AetherError as error:
            return machine.LaunchFailed(error=error.body())
        return machine.CellStarted(cell_id=launched.cell_id, exec_id=launched.exec_id, started_at=launched.started_at)

    async def stop(self, link: Link, row: JobRow, grace_ms: int) -> None:
        """Performs StopCell; the end arrives as an event."""
        grant, cell_id = _cell(row)
        try:
            await insist(link, "cell.stop", CellStop(grant=grant, cell_id=cell_id, grace_ms=grace_ms), Empty)
        except AetherError as error:
            if error.code != "NO_SUCH_CELL":
                raise

    async def collect(self, link: Link, row: JobRow) -> machine.AnyEvent:
        """Performs CollectOutputs."""
        try:
            command = await self._load(row)
            refs, problem = await self._gather(link, row, command)
            return machine.Collected(artifacts=refs, error=problem)
        except AetherError as error:
            if error.code in ("NO_SUCH_CELL", "NO_GRANT"):
                return machine.CollectFailed(error=error.body())
            return machine.Collected(error=error.body())

    # ---- inside

    async def _load(self, row: JobRow) -> _Command:
        """The job's request, and the labels that its inputs pass on to it and its outputs."""
        kept = row if row.request is not None else await self._store.get(row.job_id)
        if kept is None or kept.request is None or row.grant is None:
            raise AetherError("INTERNAL", f"cannot run {row.job_id}: its request is not kept")
        params, inputs = parse_command(kept.request)
        if params.images is not None:
            check_images(self._images, (params.images.root, params.images.work), row.tenant_id)
        labels = set(row.labels)
        for file in inputs.files:
            info = await self._store.find_artifact(file.artifact, row.tenant_id)
            if info is None:
                raise AetherError("NOT_FOUND", f"cannot place input {file.path!r}: no artifact {file.artifact}")
            labels.update(info.labels)
        return _Command(row.grant, kept.request, params, inputs, tuple(sorted(labels)))

    async def _hand_over(self, link: Link, digest: str) -> int:
        fd, _ = await self._artifacts.open_fd(digest)
        try:
            return await send_fd(link, fd)
        finally:
            os.close(fd)

    async def _gather(
        self, link: Link, row: JobRow, command: _Command
    ) -> tuple[tuple[ArtifactRef, ...], ErrorBody | None]:
        """The declared outputs as artifacts, and what was wrong with some of them."""
        diff = await self._take_diff(link, row, command)
        if not command.params.outputs:
            return diff, None
        grant, cell_id = _cell(row)
        body = CellCollect(grant=grant, cell_id=cell_id, globs=command.params.outputs)
        found = await insist(link, "cell.collect", body, CellFiles)
        command = replace(command, labels=tuple(sorted({*command.labels, *found.labels})))
        refused = dict(found.refused)
        refs = list(diff)
        room = OUTPUT_BYTES_MAX
        for number, file in enumerate(found.files):
            if number >= OUTPUT_FILES_MAX:
                refused[file.path] = f"more than {OUTPUT_FILES_MAX} files"
                break
            try:
                ref = await self._take(link, row, command, file, room)
            except AetherError as error:
                if error.code not in ("TOO_LARGE", "OUTPUT_REFUSED", "BAD_FIELD"):
                    raise
                refused[file.path] = error.message
                continue
            room -= ref.size_bytes
            refs.append(ref)
        return await self._bounded(row, command, tuple(refs)), _refusal(refused)

    async def _take_diff(self, link: Link, row: JobRow, command: _Command) -> tuple[ArtifactRef, ...]:
        """What the job changed in its image, if it is to be kept: the listing and the layer."""
        if command.params.images is None or not command.params.images.keep_diff:
            return ()
        grant, cell_id = _cell(row)
        found = await insist(link, "cell.diff", CellDiff(grant=grant, cell_id=cell_id), CellDiffed)
        refs = []
        for token, media_type in ((found.listing, LISTING_TYPE), (found.layer, LAYER_TYPE)):
            fd = await take_fd(link, token)
            try:
                kept = await self._artifacts.ingest(fd)
            finally:
                os.close(fd)
            refs.append(
                ArtifactRef(
                    name=DIFF_NAMES[media_type], digest=kept.digest, size_bytes=kept.size_bytes, media_type=media_type
                )
            )
            await self._index(row, command, refs[-1])
        return tuple(refs)

    async def _take(self, link: Link, row: JobRow, command: _Command, file: CellFile, room: int) -> ArtifactRef:
        grant, cell_id = _cell(row)
        opened = await insist(link, "cell.open", CellOpen(grant=grant, cell_id=cell_id, path=file.path), Token)
        fd = await take_fd(link, opened.token)
        try:
            kept = await self._artifacts.ingest(fd, room)
        finally:
            os.close(fd)
        media_type = _TYPES.guess_type(file.path)[0] or "application/octet-stream"
        ref = ArtifactRef(name=file.path, digest=kept.digest, size_bytes=kept.size_bytes, media_type=media_type)
        await self._index(row, command, ref)
        return ref

    async def _bounded(self, row: JobRow, command: _Command, refs: tuple[ArtifactRef, ...]) -> tuple[ArtifactRef, ...]:
        """`refs` as the outcome record may hold them: themselves, or one manifest that commits to all."""
        listing = _encode(refs)
        if len(listing) <= _REFS_BYTES_MAX:
            return refs
        kept = await self._artifacts.keep(listing)
        ref = ArtifactRef(
            name=MANIFEST_NAME, digest=kept.digest, size_bytes=kept.size_bytes, media_type="application/json"
        )
        await self._index(row, command, ref)
        return (ref,)

    async def _index(self, row: JobRow, command: _Command, ref: ArtifactRef) -> None:
        await self._artifacts.index(
            ArtifactInfo(
                digest=ref.digest,
                size_bytes=ref.size_bytes,
                media_type=ref.media_type,
                created_at=rfc3339(self._clock_ns()),
                tenant_id=row.tenant_id,
                labels=command.labels,
                job_id=row.job_id,
                name=ref.name,
            )
        )


def _cell(row: JobRow) -> tuple[Grant, str]:
    if row.grant is None or row.facts.cell_id is None:
        raise AetherError("INTERNAL", f"cannot reach the cell of {row.job_id}: it has none")
    return row.grant, row.facts.cell_id


def _refusal(refused: dict[str, str]) -> ErrorBody | None:
    if not refused:
        return None
    shown = "; ".join(f"{path}: {why}" for path, why in list(refused.items())[:_REFUSALS_SHOWN])
    more = "" if len(refused) <= _REFUSALS_SHOWN else f" and {len(refused) - _REFUSALS_SHOWN} more"
    return machine.error_body("OUTPUT_REFUSED", f"cannot keep the outputs: {shown}{more}")
