"""A job's life as a pure function: `step(state, event) -> (state, commands)`. No clock, no I/O, no ids made here.

```
command: [held ->] queued -> launching -> running [-> collecting] -> finishing -> done
model:   [held ->]                        running ------------->   finishing -> done
```
Invariants (tests/unit/orchestrator/test_machine.py)
- A verdict is set once, on the way into `finishing`, and never changes: FinishJob may be commanded again after
  a restart, always with that same verdict. What the log says (Finished) wins over a verdict on the way.
- An attempt's cell is asked for only in `launching`; asking twice is safe because `cell.launch` is idempotent
  per job and attempt.
- What is `held` waits for an approval: nothing of it is done before Released.
- A command that was running and whose cell is gone may have had effects: it ends `lost` and is never rerun.
  A model job is pure: it is computed again.
- Messages may be late or repeated, so an event that HANDLED does not list for a phase changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import msgspec

from aether.contract.cells import ExecEnd
from aether.contract.errors import KINDS, ErrorBody
from aether.contract.jobs import ArtifactRef, JobState
from aether.contract.store import Facts, Phase, Verdict
from aether.contract.wire import LiveCell

# ---- events (kept as the job's history, tagged by name)


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=str.lower, tag_field="event", omit_defaults=True):
    """What happened. A repeated or late one is harmless."""


class Submitted(Event, frozen=True, kw_only=True):
    """The row is durable. `held`: it began as held, and nothing follows."""

    held: bool = False


class Released(Event, frozen=True, kw_only=True):
    """Its approval was granted."""


class Claimed(Event, frozen=True, kw_only=True):
    """The scheduler gave the job a place among the running cells."""


class CellStarted(Event, frozen=True, kw_only=True):
    cell_id: str
    exec_id: str
    started_at: str


class LaunchFailed(Event, frozen=True, kw_only=True):
    """The authority refused the launch, or the cell could not be made."""

    error: ErrorBody


class CellExited(Event, frozen=True, kw_only=True):
    end: ExecEnd


class Collected(Event, frozen=True, kw_only=True):
    """The declared outputs are artifacts. `error`: an output was refused, which fails an otherwise good job."""

    artifacts: tuple[ArtifactRef, ...] = ()
    error: ErrorBody | None = None


class CollectFailed(Event, frozen=True, kw_only=True):
    """The outputs cannot be had any more."""

    error: ErrorBody


class EngineReplied(Event, frozen=True, kw_only=True):
    """A model runtime answered (with a result or an error), or died while it had the job."""

    verdict: Verdict


class StopRequested(Event, frozen=True, kw_only=True):
    grace_ms: int


class Finished(Event, frozen=True, kw_only=True):
    """The outcome is durable in the audit log at `log_index`."""

    state: JobState
    log_index: int


class Reconciled(Event, frozen=True, kw_only=True):
    """After a reconnect: what the authority knows of the job's cell, null when there is none; whether it is `held`."""

    cell: LiveCell | None = None
    held: bool = False


AnyEvent = (
    Submitted | Released | Claimed | CellStarted | LaunchFailed | CellExited | Collected | CollectFailed | EngineReplied
    | StopRequested | Finished | Reconciled
)  # fmt: skip

_COMMAND_OPEN: Final = frozenset[Phase]({"held", "queued", "launching", "running", "collecting", "finishing"})
HANDLED: Final[dict[type[Event], frozenset[Phase]]] = {
    Submitted: frozenset({"queued"}),
    Released: frozenset({"held"}),
    Claimed: frozenset({"queued"}),
    CellStarted: frozenset({"launching"}),
    LaunchFailed: frozenset({"launching"}),
    CellExited: frozenset({"launching", "running"}),
    Collected: frozenset({"collecting"}),
    CollectFailed: frozenset({"collecting"}),
    EngineReplied: frozenset({"running"}),
    StopRequested: frozenset({"held", "queued", "launching", "running"}),
    Finished: _COMMAND_OPEN,
    Reconciled: _COMMAND_OPEN,
}

NO_FACTS: Final = Facts()
CELL_ENDED: Final = {
    "cell-freed": (JobState.CANCELLED, "CANCELLED", "its cell was freed"),
    "idle": (JobState.CANCELLED, "CANCELLED", "its cell was freed because it was idle"),
    "cell-died": (JobState.FAILED, "JOB_FAILED", "its cell died"),
    "disk-limit": (JobState.FAILED, "DISK_LIMIT", "its cell kept more on disk than its limit"),
    "revoked": (JobState.CANCELLED, "REVOKED", "the ticket of its cell was revoked"),
    "parent-ended": (JobState.CANCELLED, "CANCELLED", "the cell around its own ended"),
}
"""How an executable ends when its cell does."""

# ---- commands


@dataclass(frozen=True, slots=True)
class Enqueue:
    """Give the job its place in the queue of cells."""


@dataclass(frozen=True, slots=True)
class LaunchCell:
    """Ask for the cell; answered by CellStarted or LaunchFailed. `again`: it may have been asked for before."""

    again: bool = False


@dataclass(frozen=True, slots=True)
class StopCell:
    grace_ms: int


@dataclass(frozen=True, slots=True)
class CollectOutputs:
    """Answered by Collected or CollectFailed."""


@dataclass(frozen=True, slots=True)
class RunModel:
    """Answered by EngineReplied."""


@dataclass(frozen=True, slots=True)
class FinishJob:
    """State the verdict to the authority; answered by Finished."""

    verdict: Verdict


Command = Enqueue | LaunchCell | StopCell | CollectOutputs | RunModel | FinishJob


@dataclass(frozen=True, slots=True)
class State:
    """All that decides: the kind of job, its phase and the facts of the attempt."""

    kind: str
    phase: Phase
    facts: Facts = NO_FACTS


Step = tuple[State, tuple[Command, ...]]


def step(state: State, event: AnyEvent) -> Step:
    """The next state and what to do once it is durable. An unlisted pair returns the state itself and nothing."""
    if state.phase not in HANDLED[type(event)]:
        return state, ()
    match event:
        case Submitted():
            return _submitted(state)
        case Released():
            return _submitted(replace(state, phase="queued"))
        case Claimed():
            return replace(state, phase="launching"), (LaunchCell(),)
        case CellStarted():
            return _started(state, event.cell_id, event.exec_id, event.started_at)
        case LaunchFailed():
            return _finish(state, _launch_verdict(event.error))
        case CellExited():
            return _exited(state, event.end)
        case Collected():
            return _finish(state, conclude(state.facts, event))
        case CollectFailed():
            return _finish(state, _lost(state.facts, event.error.message))
        case EngineReplied():
            return _finish(state, event.verdict) if state.kind == "model" else (state, ())
        case StopRequested():
            return _stop(state, event.grace_ms)
        case Finished():
            return replace(state, phase="done"), ()
        case Reconciled():
            return (state, ()) if event.held else _reconciled(state, event.cell)


def job_state(phase: Phase) -> JobState | None:
    """The public state of an open job in `phase`; None when the outcome says it."""
    if phase == "held":
        return JobState.WAITING_APPROVAL
    if phase in ("queued", "launching"):
        return JobState.QUEUED
    return JobState.RUNNING if phase in ("running", "collecting", "finishing") else None


def ended_state(facts: Facts) -> tuple[JobState, str | None, str]:
    """State, error code and reason of a command whose executable ended, before its outputs are looked at."""
    end = facts.end
    assert end is not None
    status = end.exit
    if status.reason in CELL_ENDED:
        return CELL_ENDED[status.reason]
    if status.timed_out:
        return JobState.TIMED_OUT, "TIMED_OUT", "it ran longer than its limit"
    if facts.stop_grace_ms is not None or status.reason == "killed":
        return JobState.CANCELLED, "CANCELLED", "it was stopped"
    if status.reason == "spawner-died" or (status.code is None and status.signal is None):
        return JobState.LOST, "LOST", f"nobody saw how it ended ({status.reason or 'no exit status'})"
    if status.code == 0:
        return JobState.SUCCEEDED, None, ""
    if status.oom_killed:
        return JobState.FAILED, "OUT_OF_MEMORY", "it used more memory than its limit"
    how = f"signal {status.signal}" if status.code is None else f"exit code {status.code}"
    return JobState.FAILED, "JOB_FAILED", how


def conclude(facts: Facts, collected: Collected) -> Verdict:
    """The verdict on a command: the way it ended, then its outputs."""
    state, code, why = ended_state(facts)
    error = error_body(code, f"cannot finish the job: {why}") if code is not None else None
    if state is JobState.SUCCEEDED and collected.error is not None:
        state, error = JobState.FAILED, collected.error
    return Verdict(state=state, exit=facts.end.exit if facts.end else None, error=error, artifacts=collected.artifacts)


def error_body(code: str, message: str) -> ErrorBody:
    """An error with its kind's remedy."""
    return ErrorBody(code, message, KINDS[code].remedy)


# ---- inside


def _finish(state: State, verdict: Verdict) -> Step:
    facts = msgspec.structs.replace(state.facts, verdict=verdict)
    return replace(state, phase="finishing", facts=facts), (FinishJob(verdict),)


def _submitted(state: State) -> Step:
    if state.kind == "model":
        return replace(state, phase="running"), (RunModel(),)
    return state, (Enqueue(),)


def _started(state: State, cell_id: str, exec_id: str, started_at: str) -> Step:
    facts = msgspec.structs.replace(state.facts, cell_id=cell_id, exec_id=exec_id, started_at=started_at)
    if facts.end is not None:
        return _collect(replace(state, facts=facts))
    stop = () if facts.stop_grace_ms is None else (StopCell(facts.stop_grace_ms),)
    return replace(state, phase="running", facts=facts), stop


def _exited(state: State, end: ExecEnd) -> Step:
    facts = msgspec.structs.replace(state.facts, end=end, cell_id=end.cell_id, exec_id=end.exec_id)
    if state.phase == "launching":  # overtook the reply to cell.launch, which brings the start time
        return replace(state, facts=facts), ()
    return _collect(replace(state, facts=facts))


def _collect(state: State) -> Step:
    """The executable has ended: its outputs are next, if it declared any."""
    if not state.facts.collects:
        return _finish(state, conclude(state.facts, Collected()))
    return replace(state, phase="collecting"), (CollectOutputs(),)


def _stop(state: State, grace_ms: int) -> Step:
    if state.phase in ("held", "queued") or state.kind == "model":
        return _finish(state, cancelled())
    if state.facts.stop_grace_ms is not None and state.facts.stop_grace_ms <= grace_ms:
        return state, ()
    facts = msgspec.structs.replace(state.facts, stop_grace_ms=grace_ms)
    stop: tuple[Command, ...] = (StopCell(grace_ms),) if state.phase == "running" else ()
    return replace(state, facts=facts), stop


def _reconciled(state: State, cell: LiveCell | None) -> Step:
    match state.phase:
        case "held" | "queued":
            return _submitted(replace(state, phase="queued"))
        case "finishing":
            assert state.facts.verdict is not None
            return state, (FinishJob(state.facts.verdict),)
        case "collecting":
            return state, (CollectOutputs(),)
    if state.kind == "model":
        return state, (RunModel(),)
    if cell is None:
        if state.phase == "launching":
            return _relaunch(state)
        return _finish(state, _lost(state.facts, "its cell is gone"))
    return _adopt(state, cell)


def _relaunch(state: State) -> Step:
    if state.facts.end is not None:
        return _collect(state)
    if state.facts.stop_grace_ms is not None:
        return _finish(state, cancelled())
    return state, (LaunchCell(again=True),)


def _adopt(state: State, cell: LiveCell) -> Step:
    facts = msgspec.structs.replace(
        state.facts,
        cell_id=cell.cell_id,
        exec_id=cell.exec_id,
        started_at=cell.started_at,
        end=cell.end or state.facts.end,  # its end may have overtaken this answer
    )
    if facts.end is not None:
        return _collect(replace(state, facts=facts))
    stop = () if facts.stop_grace_ms is None else (StopCell(facts.stop_grace_ms),)
    return replace(state, phase="running", facts=facts), stop


def cancelled() -> Verdict:
    """The verdict on a job that was stopped before it did anything."""
    error = error_body("CANCELLED", "cannot finish the job: it was stopped")
    return Verdict(state=JobState.CANCELLED, error=error)


def _lost(facts: Facts, why: str) -> Verdict:
    exit_status = facts.end.exit if facts.end else None
    return Verdict(state=JobState.LOST, exit=exit_status, error=error_body("LOST", f"cannot finish the job: {why}"))


def _launch_verdict(error: ErrorBody) -> Verdict:
    return Verdict(state=JobState.LOST if error.code == "LOST" else JobState.FAILED, error=error)
