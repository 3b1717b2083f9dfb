"""The open jobs: the one place where a job changes.

`post` moves a job in one synchronous step (machine, row, queue) and puts the new row on its way to the store.
A launch is performed only once its claim is durable, so that no second claimant can launch too. Where there is a
place at once, the claim is in the same commit as the new row, and the authority, which holds a launch until it
has heard that the row is durable, is asked meanwhile. What follows a launch is fenced by the attempt in its grant
and does not wait for the disk. A death at any point leaves a row from which the same command, or an
earlier one, follows again, and every command is idempotent per job and attempt.

Rows in memory hold a request (it may be large) only while few jobs are open; else it is read from the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec

from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import MODEL_OPS, JobRequest, JobView
from aether.contract.limits import JOBS_OPEN_MAX
from aether.contract.store import Blob, Entry, Facts, JobRow, Store
from aether.contract.wire import Grant, JobSubmit
from aether.orchestrator.jobs import machine, story
from aether.orchestrator.metrics import JobMetrics
from aether.orchestrator.queue.scheduler import Scheduler
from aether.orchestrator.tasks import cancel

REQUESTS_HELD_MAX: Final = 128
Perform = Callable[[JobRow, machine.Command], Awaitable[None]]
_replace: Final = msgspec.structs.replace
_log = logging.getLogger(__name__)


class Desk:
    """Owns the rows that are not done, and the tasks that perform their commands, until `close`."""

    def __init__(
        self, store: Store, scheduler: Scheduler, perform: Perform, clock_ns: Callable[[], int], metrics: JobMetrics
    ) -> None:
        self._store = store
        self._scheduler = scheduler
        self._perform = perform
        self._clock_ns = clock_ns
        self._metrics = metrics
        self._tasks: set[asyncio.Task[None]] = set()
        self.open: dict[str, JobRow] = {}

    def __repr__(self) -> str:
        return f"<Desk open={len(self.open)} performing={len(self._tasks)} {self._scheduler!r}>"

    async def load(self) -> None:
        """Takes up the rows that an earlier process left open. Nothing moves before they are reconciled."""
        for row in await self._store.open_jobs():
            self.open[row.job_id] = row
            if not _is_guest(row):
                self._scheduler.moved(row.job_id, row.phase)

    async def close(self) -> None:
        """Stops performing; the rows stay as they are."""
        await cancel(self._tasks)

    # ---- coming in

    async def submit(self, body: JobSubmit) -> None:
        """Keeps a new job; returns once it is durable. Idempotent. Raises BUSY, DISK_FULL."""
        job_id = body.view.job_id
        event = machine.Submitted(held=body.held)
        facts = Facts(collects=_collects(body.request))
        first = machine.State(body.request.kind, "held" if body.held else "queued", facts)
        state, commands = machine.step(first, event)
        row = _new_row(body, state)
        entry = self._entry(event)
        if job_id in self.open:
            await self._store.submit(row, entry)
            return
        self.check_room()
        self.open[job_id] = row  # with its request, which the store cannot give before the row is durable
        kept = asyncio.ensure_future(self._store.submit(row, entry))
        if body.held:
            pass
        elif _is_guest(row):
            self._move(row, machine.Claimed(), row.view, at_once=True)
            commands = ()
        elif row.kind == "command":
            self._scheduler.enqueue(job_id, row.view.tenant_id)
            self.pump(fresh=job_id)
            commands = ()
        self.spawn(self._admit(kept, row, commands))
        await asyncio.shield(kept)

    def check_room(self) -> None:
        """Raises BUSY when JOBS_OPEN_MAX jobs are open."""
        if len(self.open) >= JOBS_OPEN_MAX:
            raise AetherError("BUSY", f"cannot accept the job: {JOBS_OPEN_MAX} are open", retry_after_s=1)

    def keep_answered(self, body: JobSubmit, event: machine.EngineReplied, blob: Blob | None) -> Awaitable[bool]:
        """Keeps a pure job that was answered already; it is done when its outcome arrives."""
        facts = Facts(verdict=event.verdict)
        row = _new_row(body, machine.State("model", "finishing", facts))
        self.open[row.job_id] = row
        self._metrics.submitted("model").inc()
        return self._store.submit(row, self._entry(event), blob)

    # ---- moving

    def post(self, job_id: str, event: machine.AnyEvent) -> None:
        """Moves an open job; an event that changes nothing, or for a job that is not open, is let go."""
        row = self.open.get(job_id)
        if row is not None:
            self._move(row, event, row.view)

    def outcome(self, view: JobView, log_index: int) -> Awaitable[bool] | None:
        """The outcome of a job is durable in the log. A missing row is made from it.

        Returns the write, or None when there was nothing to write.
        """
        event = machine.Finished(state=view.state, log_index=log_index)
        row = self.open.get(view.job_id)
        if row is None and not _has_row(view):
            return None
        if row is None:
            return self._store.submit(_rebuilt_row(view), self._entry(event))
        if row.outcome_index is not None:
            return None
        self._metrics.finished(row.kind, view.state.value).inc()
        return self._move(row, event, view)

    def finishing(self) -> frozenset[str]:
        """The open jobs whose outcome may be in the log without our knowing it."""
        return frozenset(job_id for job_id, row in self.open.items() if row.phase == "finishing")

    def regrant(self, grant: Grant) -> None:
        """The grant under which an open job goes on; kept with the next change of its row."""
        row = self.open.get(grant.job_id)
        if row is not None and row.attempt == grant.attempt:
            self.open[grant.job_id] = _replace(row, grant=grant)

    async def drop(self, job_ids: tuple[str, ...]) -> None:
        """Forgets jobs that were never admitted."""
        unfinished = [i for i in job_ids if (row := self.open.get(i)) is not None and row.outcome_index is None]
        for job_id in unfinished:
            del self.open[job_id]
            self._scheduler.forget(job_id)
        if unfinished:
            await self._store.drop(unfinished)

    def enqueue(self, job_id: str) -> None:
        """Gives a queued job its turn: a guest of an allocated cell at once, for the cell has its place already."""
        row = self.open.get(job_id)
        if row is not None and _is_guest(row) and row.phase == "queued":
            self._move(row, machine.Claimed(), row.view)
        elif row is not None and not _is_guest(row):
            self._scheduler.enqueue(job_id, row.view.tenant_id)
            self.pump()

    def pump(self, fresh: str | None = None) -> None:
        """Claims as many waiting jobs as there are places; `fresh` is the one whose row is being written."""
        while (job_id := self._scheduler.claim()) is not None:
            row = self.open.get(job_id)
            if row is None or row.phase != "queued":
                self._scheduler.forget(job_id)
                continue
            self._move(row, machine.Claimed(), row.view, at_once=job_id == fresh)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- inside

    def _move(
        self, row: JobRow, event: machine.AnyEvent, view: JobView, at_once: bool = False
    ) -> Awaitable[bool] | None:
        old = machine.State(row.kind, row.phase, row.facts)
        state, commands = machine.step(old, event)
        if state is old and not commands:
            return None
        if state is old and isinstance(event, machine.Reconciled | machine.Submitted):
            self.spawn(self._perform_all(row, commands))  # the row says all that a restart needs already
            return None
        row = _moved_row(row, state, event, view)
        if row.phase == "done":
            del self.open[row.job_id]
        else:
            self.open[row.job_id] = row
        if row.kind == "command" and not _is_guest(row):
            self._scheduler.moved(row.job_id, row.phase)
        at_once = at_once or not isinstance(event, machine.Claimed)
        # Steps of a running cell are found again from the cell itself: only a claim and an end are waited for.
        lazy = at_once and row.kind == "command" and row.phase not in ("queued", "done")
        written = asyncio.ensure_future(self._store.advance(row, self._entry(event), lazy))
        if commands and at_once:
            self.spawn(self._perform_all(row, commands))
            commands = ()
        self.spawn(self._after(written, row, commands))
        if lazy:
            self.pump()
        return written

    def _entry(self, event: machine.Event) -> Entry:
        return story.entry(rfc3339(self._clock_ns()), event)

    async def _admit(self, kept: Awaitable[bool], row: JobRow, commands: tuple[machine.Command, ...]) -> None:
        try:
            await kept
        except AetherError:
            self.open.pop(row.job_id, None)
            self._scheduler.forget(row.job_id)
            return
        held = self.open.get(row.job_id)
        if held is not None and len(self.open) > REQUESTS_HELD_MAX:
            self.open[row.job_id] = _replace(held, request=None)
        self._metrics.submitted(row.kind).inc()
        await self._perform_all(row, commands)

    async def _after(self, written: Awaitable[bool], row: JobRow, commands: tuple[machine.Command, ...]) -> None:
        try:
            ours = await written
        except AetherError:
            ours = False  # the row itself could not be kept: `submit` says so
        if not ours:
            # Another process moved this attempt: it is not ours any more, and nothing may be done for it.
            _log.error("job %s: revision %d was not written", row.job_id, row.revision)
            self.open.pop(row.job_id, None)
            self._scheduler.forget(row.job_id)
            return
        self.pump()
        await self._perform_all(row, commands)

    async def _perform_all(self, row: JobRow, commands: tuple[machine.Command, ...]) -> None:
        for command in commands:
            await self._perform(row, command)


def _is_guest(row: JobRow) -> bool:
    """Whether it is an executable of an allocated cell, which takes no place among the running cells."""
    return row.view.cell is not None


def _collects(request: JobRequest) -> bool:
    """Whether a command may leave something: outputs, or what it changes in an image."""
    return any(request.params.get(name) for name in ("outputs", "images"))


def _has_row(view: JobView) -> bool:
    """A model runtime is a job of the node itself, without a row: the model operations are what clients submit."""
    return view.kind != "model" or view.op in MODEL_OPS


def _first_row(view: JobView, state: machine.State) -> JobRow:
    """The first revision of a job's row, as its view has it."""
    return JobRow(
        job_id=view.job_id,
        tenant_id=view.tenant_id,
        node_id=view.node_id,
        attempt=view.attempt,
        revision=1,
        kind=view.kind,
        effect="cell" if view.kind == "command" else "pure",
        labels=view.labels,
        phase=state.phase,
        state=view.state,
        batch_key="",
        grant=None,
        view=view,
        facts=state.facts,
        intent_index=view.intent_index,
        outcome_index=view.outcome_index,
    )


def _new_row(body: JobSubmit, state: machine.State) -> JobRow:
    batch_key = body.batch_key or "\0".join((body.view.tenant_id, *body.view.labels))
    return _replace(_first_row(body.view, state), batch_key=batch_key, grant=body.grant, request=body.request)


def _rebuilt_row(view: JobView) -> JobRow:
    """The row of a job whose outcome is in the log and whose row was lost before it was durable."""
    return _first_row(view, machine.State(view.kind, "done"))


def _moved_row(row: JobRow, state: machine.State, event: machine.AnyEvent, view: JobView) -> JobRow:
    facts = state.facts
    if isinstance(event, machine.Finished):
        return _replace(
            row,
            revision=row.revision + 1,
            phase=state.phase,
            facts=facts,
            state=view.state,
            view=view,
            intent_index=view.intent_index,
            outcome_index=event.log_index,
        )
    public = machine.job_state(state.phase) or row.state
    shown = _replace(
        view, state=public, started_at=facts.started_at, cell_id=facts.cell_id, exec_id=facts.exec_id
    ) if (public, facts.cell_id, facts.started_at) != (view.state, view.cell_id, view.started_at) else view  # fmt: skip
    return _replace(row, revision=row.revision + 1, phase=state.phase, facts=facts, state=public, view=shown)
