"""One model package being served: launch, serve until the runtime dies, clean up, launch again.

The runtime runs in a cell of its own under a grant of the node. Its channel belongs to this process: it stays
while aetherd restarts, and dies with aurorad, which ends the runtime (end of file). A runtime found after a
restart without its channel is of no use to anyone and is retired (`retire`).

A runtime that dies is launched again after a delay that doubles from 0.1 s to 5 s. Requests wait through a
restart; after a launch that was refused they fail at once with the reason, until one succeeds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.ports import Link
from aether.contract.store import Verdict
from aether.contract.wire import (
    CellKey,
    CellStop,
    Empty,
    Grant,
    JobFinish,
    JobOutcome,
    WorkerLaunch,
    WorkerLaunched,
)
from aether.orchestrator.engines.calls import LinkLostError, insist, take_fd
from aether.orchestrator.engines.channel import Channel
from aether.orchestrator.engines.packages import Package
from aether.orchestrator.tasks import cancel

HELLO_S_MAX: Final = 20.0
_DELAY_S_MIN: Final = 0.1
_DELAY_S_MAX: Final = 5.0
_STEADY_S: Final = 5.0
"""A runtime that served this long starts again without the delay that earlier deaths built up."""
_EXIT_S_MAX: Final = 10.0
_log = logging.getLogger(__name__)


class Worker:
    """Serves `package` from `start` until `stop`. `link` waits for a connected, reconciled link."""

    def __init__(
        self, package: Package, link: Callable[[], Awaitable[Link]], on_death: Callable[[Package], None]
    ) -> None:
        self.package = package
        self.channel: Channel | None = None
        self.grant: Grant | None = None
        self._link = link
        self._on_death = on_death
        self._refused: AetherError | None = None
        self._change = asyncio.Event()
        self._exited = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ending = False

    def __repr__(self) -> str:
        return f"<Worker {self.package.name} {self.state}>"

    @property
    def state(self) -> str:
        if self.channel is not None:
            return "serving"
        return f"failed: {self._refused.message}" if self._refused is not None else "starting"

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        if self._task is not None:
            await cancel([self._task])
        if self.channel is not None:
            self.channel.close()

    @property
    def idle(self) -> bool:
        """Serving, and nobody waits for an answer."""
        return self.channel is not None and self.channel.pending == 0

    def end(self) -> asyncio.Task[None]:
        """Makes an idle worker close its runtime and clean up; the task ends when that is done."""
        assert self._task is not None and self.channel is not None
        self._ending = True
        self.channel.close()
        return self._task

    async def ready(self, within_s: float) -> Channel:
        """The channel, once there is one; raises the refusal of the last launch, or TIMED_OUT."""
        try:
            async with asyncio.timeout(within_s):
                while self.channel is None:
                    if self._refused is not None:
                        raise self._refused
                    await self._change.wait()
        except TimeoutError:
            raise AetherError("TIMED_OUT", f"cannot reach {self.package.name}: its runtime is not up") from None
        return self.channel

    def owns(self, job_id: str) -> bool:
        """Whether the cell of `job_id` is the one that this worker looks after."""
        return self.grant is not None and self.grant.job_id == job_id

    def exited(self) -> None:
        """The executable in its cell ended."""
        self._exited.set()

    # ---- inside

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = _DELAY_S_MIN
        while not self._ending:
            link = await self._link()
            started = loop.time()
            try:
                await self._serve_once(link)
            except LinkLostError:
                pass
            except AetherError as error:
                _log.warning("model %s: %s", self.package.name, error)
                self._refuse(error)
            except Exception as error:
                _log.exception("model %s", self.package.name)
                self._refuse(AetherError("INTERNAL", f"cannot serve {self.package.name}: {error}"))
            if self._ending:
                return
            if loop.time() - started > _STEADY_S:
                delay_s = _DELAY_S_MIN
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, _DELAY_S_MAX)

    async def _serve_once(self, link: Link) -> None:
        package = self.package
        body = WorkerLaunch(
            model_id=package.model_id,
            model_version=package.version,
            model_digest=package.digest,
            package_dir=str(package.directory),
        )
        launched = await insist(link, "worker.launch", body, WorkerLaunched)
        self.grant = launched.grant
        self._exited.clear()
        try:
            await self._serve_cell(link, launched)
        finally:
            self.grant = None

    async def _serve_cell(self, link: Link, launched: WorkerLaunched) -> None:
        error: AetherError | None = None
        try:
            channel = await self._connect(link, launched)
            self._announce(channel)
            await asyncio.shield(channel.closed)
        except AetherError as refused:
            why = f"{refused.message} (its output is the log of {launched.grant.job_id})"
            error = AetherError(refused.code, why, refused.remedy)
        finally:
            self.channel = None
        if not self._ending:
            self._on_death(self.package)
        await retire(await self._link(), launched.grant, launched.cell.cell_id, self._exited, error)
        if error is not None:
            raise error

    async def _connect(self, link: Link, launched: WorkerLaunched) -> Channel:
        if launched.cell.channel is None:
            raise AetherError("PROTOCOL", "cannot reach the model runtime: its cell came without a channel")
        channel = await Channel.open(await take_fd(link, launched.cell.channel), HELLO_S_MAX)
        served = {(model.id, model.version, model.digest) for model in channel.hello.result().models}
        if (self.package.model_id, self.package.version, self.package.digest) not in served:
            channel.close()
            raise AetherError("BAD_PACKAGE", f"cannot serve {self.package.name}: the runtime loaded something else")
        return channel

    def _announce(self, channel: Channel) -> None:
        self.channel = channel
        self._refused = None
        self._turn()

    def _refuse(self, error: AetherError) -> None:
        self._refused = error
        self._turn()

    def _turn(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


async def retire(link: Link, grant: Grant, cell_id: str, exited: asyncio.Event | None, why: AetherError | None) -> None:
    """Ends a runtime's cell: stop it unless `exited` is set or null, state its end, free it. Idempotent."""
    if exited is not None and not exited.is_set():
        stop = CellStop(grant=grant, cell_id=cell_id, grace_ms=0)
        if await _done(insist(link, "cell.stop", stop, Empty)):
            try:
                async with asyncio.timeout(_EXIT_S_MAX):
                    await exited.wait()
            except TimeoutError:
                _log.error("cell %s: no exit within %s s of its stop", cell_id, _EXIT_S_MAX)
    error = why or AetherError("ENGINE_DIED", "cannot go on serving: the model runtime ended")
    body = finish_body(grant, Verdict(state=JobState.FAILED, error=error.body()))
    await _done(insist(link, "job.finish", body, JobOutcome))
    await _done(insist(link, "cell.free", CellKey(grant=grant, cell_id=cell_id), Empty))


def finish_body(grant: Grant, verdict: Verdict) -> JobFinish:
    """`job.finish` for a verdict."""
    return JobFinish(
        grant=grant,
        state=verdict.state,
        exit=verdict.exit,
        error=verdict.error,
        result_digest=verdict.result_digest,
        result_bytes=verdict.result_bytes,
        artifacts=verdict.artifacts,
        model_id=verdict.model_id,
        model_version=verdict.model_version,
        code=verdict.code,
        usage=verdict.usage,
        timings_us=verdict.timings_us,
    )


async def _done(call: Awaitable[object]) -> bool:
    """False when the cell or job is gone already, which is what was wanted."""
    try:
        await call
    except AetherError as error:
        if error.code not in ("NO_SUCH_CELL", "NO_GRANT", "NOT_FOUND"):
            raise
        return False
    return True
