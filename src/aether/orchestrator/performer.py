"""What the machine commands, done: each command over the engines, its answer posted as the next event.

A command that cannot be performed because the link broke is let go: the row commands it again after the next
reconciliation. A command that fails otherwise becomes an event, so that no job hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aether.contract import wire
from aether.contract.canonical import digest_bytes
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.limits import RESULT_INLINE_BYTES_MAX
from aether.contract.ports import Link
from aether.contract.store import Blob, JobRow, Store, Verdict
from aether.orchestrator.artifacts.store import ArtifactStore
from aether.orchestrator.engines.calls import LinkLostError, insist
from aether.orchestrator.engines.command import CommandEngine
from aether.orchestrator.engines.model import Inference, ModelEngine
from aether.orchestrator.engines.worker import finish_body
from aether.orchestrator.images.store import ImageStore
from aether.orchestrator.jobs import machine

RESULT_NAME: Final = "result.json"
"""The artifact name of a result that is too large to be answered inline."""
_REFUSED_S: Final = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Effects:
    """Where the answers go. `link` is the connection of the moment, if any."""

    link: Callable[[], Link | None]
    post: Callable[[str, machine.AnyEvent], None]
    enqueue: Callable[[str], None]
    outcome: Callable[[wire.JobOutcome], None]
    disown: Callable[[JobRow], None]


class Performer:
    """Performs commands; remembers only which model jobs it is running."""

    def __init__(
        self,
        store: Store,
        artifacts: ArtifactStore,
        images: ImageStore,
        models: ModelEngine,
        effects: Effects,
        clock_ns: Callable[[], int],
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._commands = CommandEngine(store, artifacts, images, clock_ns)
        self._models = models
        self._effects = effects
        self._clock_ns = clock_ns
        self._inferring: set[str] = set()

    async def perform(self, row: JobRow, command: machine.Command) -> None:
        """Performs one command; the row says all that a restart needs to command it again."""
        link = self._effects.link()
        try:
            if isinstance(command, machine.Enqueue):
                self._effects.enqueue(row.job_id)
            elif isinstance(command, machine.RunModel):
                await self._run_queued(row)
            elif link is not None:
                await self._perform_over(link, row, command)
        except LinkLostError:
            pass
        except Exception as error:
            _log.exception("job %s: %s", row.job_id, type(command).__name__)
            self._failed(row, command, error)

    async def _perform_over(self, link: Link, row: JobRow, command: machine.Command) -> None:
        match command:
            case machine.LaunchCell():
                self._effects.post(row.job_id, await self._commands.launch(link, row, command.again))
            case machine.StopCell():
                await self._commands.stop(link, row, command.grace_ms)
            case machine.CollectOutputs():
                self._effects.post(row.job_id, await self._commands.collect(link, row))
            case machine.FinishJob():
                await self._finish(link, row, command.verdict)

    def _failed(self, row: JobRow, command: machine.Command, error: Exception) -> None:
        """A command that cannot be performed must not leave its job hanging."""
        body = AetherError("INTERNAL", f"cannot go on with the job: {type(error).__name__}: {error}").body()
        if isinstance(command, machine.LaunchCell):
            self._effects.post(row.job_id, machine.LaunchFailed(error=body))
        elif isinstance(command, machine.CollectOutputs):
            self._effects.post(row.job_id, machine.CollectFailed(error=body))
        elif isinstance(command, machine.RunModel):
            verdict = Verdict(state=JobState.FAILED, error=body)
            self._effects.post(row.job_id, machine.EngineReplied(verdict=verdict))

    async def _finish(self, link: Link, row: JobRow, verdict: Verdict) -> None:
        """States the verdict until the authority has recorded it; a refusal may pass (a full disk)."""
        if row.grant is None:
            return
        while True:
            try:
                outcome = await insist(link, "job.finish", finish_body(row.grant, verdict), wire.JobOutcome)
            except AetherError as error:
                if error.code == "NO_GRANT":
                    self._effects.disown(row)
                    return
                _log.error("job %s: cannot record its outcome: %s", row.job_id, error)
                await asyncio.sleep(_REFUSED_S)
                continue
            self._effects.outcome(outcome)
            return

    async def _run_queued(self, row: JobRow) -> None:
        """Performs RunModel; a reconciliation while it runs does not start it twice."""
        if row.job_id in self._inferring:
            return
        self._inferring.add(row.job_id)
        try:
            self._effects.post(row.job_id, await self._infer(row))
        finally:
            self._inferring.discard(row.job_id)

    async def _infer(self, row: JobRow) -> machine.EngineReplied:
        kept = row if row.request is not None else await self._store.get(row.job_id)
        try:
            if kept is None or kept.request is None:
                raise AetherError("INTERNAL", f"cannot run {row.job_id}: its request is not kept")
            done = await self._models.infer(row.job_id, kept.request, row.batch_key)
            verdict, blob = await self.keep_result(row.view, done)
            if blob is not None:
                await self._store.put_blob(blob)
        except AetherError as error:
            verdict = Verdict(state=JobState.FAILED, error=error.body())
        return machine.EngineReplied(verdict=verdict)

    async def keep_result(self, view: JobView, done: Inference) -> tuple[Verdict, Blob | None]:
        """The verdict on an inference, and the blob to keep with the row; a large result is kept here."""
        digest: str | None = None
        size, blob = None, None
        if done.result is not None:
            size = len(done.result)
            if size <= RESULT_INLINE_BYTES_MAX:
                digest = digest_bytes(done.result)
                blob = Blob(digest=digest, data=done.result)
            else:
                digest = (await self._artifacts.keep(done.result)).digest
                await self._artifacts.index(self._result_info(view, digest, size))
        verdict = Verdict(
            state=done.state,
            error=done.error,
            result_digest=digest,
            result_bytes=size,
            model_id=done.package.model_id,
            model_version=done.package.version,
            code=done.code,
            usage=done.usage,
            timings_us=done.timings_us,
        )
        return verdict, blob

    def _result_info(self, view: JobView, digest: str, size_bytes: int) -> wire.ArtifactInfo:
        return wire.ArtifactInfo(
            digest=digest,
            size_bytes=size_bytes,
            media_type="application/json",
            created_at=rfc3339(self._clock_ns()),
            tenant_id=view.tenant_id,
            labels=view.labels,
            job_id=view.job_id,
            name=RESULT_NAME,
        )
