"""Replaying a job: the same input once more, as a new job that names the first.

The request is the one that was kept, its hash checked against the intent's; a model is pinned to the version that
answered. The new job is admitted like any other, by the ticket of whoever asks, with the labels that the first one
carried. What it left is for whoever asked to compare (`client.compare`).

Refused: a job that has not ended (NOT_READY), whose request or inputs are gone (GONE), and, unless effects are allowed,
one that may have had effects beside what it left here (NOT_REPEATABLE): it had a network, it ran in an allocated cell
whose files were others' too, or nobody knows how it ended.
"""

from __future__ import annotations

from typing import Any

import msgspec

from aether.contract.calls import Caller, JobCall, ReplayCall, SubmitCall, SubmittedJob
from aether.contract.canonical import input_hash
from aether.contract.errors import AetherError
from aether.contract.jobs import TERMINAL, JobRequest, JobState, JobView, parse_command
from aether.contract.wire import JobKey, KeptRequest
from aether.substrate.labels import LabelDesk, named_by
from aether.substrate.orchestra import Orchestra
from aether.substrate.reading import Reading
from aether.substrate.submission import Submitter


class Replayer:
    """The handler of `job.replay`."""

    def __init__(self, orchestra: Orchestra, reading: Reading, labels: LabelDesk, submitter: Submitter) -> None:
        self._orchestra = orchestra
        self._reading = reading
        self._labels = labels
        self._submitter = submitter

    async def replay(self, caller: Caller, call: ReplayCall) -> SubmittedJob:
        first = await self._reading.view(caller, "job.replay", JobCall(job_id=call.job_id))
        if first.state not in TERMINAL:
            raise AetherError("NOT_READY", f"cannot replay {first.job_id}: it is {first.state}")
        request = await self._kept(first)
        if not call.allow_effects and (why := effects_of(first, request)) is not None:
            remedy = "replay it with --allow-effects if it may have them again"
            raise AetherError("NOT_REPEATABLE", f"cannot replay {first.job_id}: {why}", remedy)
        missing = (await self._labels.ask(first.tenant_id, *named_by(request))).missing
        if missing:
            raise AetherError("GONE", f"cannot replay {first.job_id}: its inputs are gone: {', '.join(missing)}")
        again = SubmitCall(request=pinned(request, first), wait_ms=call.wait_ms, approval_ms=call.approval_ms)
        return await self._submitter.submit(caller, again, first)

    async def _kept(self, first: JobView) -> JobRequest:
        found = await self._orchestra.link().call("job.request", JobKey(job_id=first.job_id), KeptRequest)
        request = found.request
        kept = input_hash(request.schema_version, request.kind, request.op, request.params, request.inputs)
        if kept != first.input_hash:
            raise AetherError("GONE", f"cannot replay {first.job_id}: another request is kept in its place")
        return request


def effects_of(first: JobView, request: JobRequest) -> str | None:
    """Why running it again might repeat more than what it left here; None when it cannot."""
    if first.state is JobState.LOST:
        return "nobody knows how it ended"
    if request.kind != "command":
        return None
    params, _ = parse_command(request)
    if params.network is not None:
        return "it had a network"
    return None if params.cell is None else "it ran in an allocated cell, whose files are not kept"


def pinned(request: JobRequest, first: JobView) -> JobRequest:
    """The request with the version of the model that answered it."""
    if request.kind != "model" or first.model_id is None or first.model_version is None:
        return request
    params: dict[str, Any] = {**request.params, "model": f"{first.model_id}@{first.model_version}"}
    return msgspec.structs.replace(request, params=params)
