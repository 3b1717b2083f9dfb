"""What is said of a job whose budget ran out, or whose ticket expired, while it ran. Pure."""

from __future__ import annotations

from msgspec.structs import replace

from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.records import Record
from aether.contract.units import TTL, told
from aether.contract.wire import JobFinish
from aether.substrate import entries
from aether.substrate.access.budget import exhausted
from aether.substrate.metering.due import Found


def record(of: Record, found: Found, index: int, time: str) -> Record:
    """`budget.exhausted`: written before what runs under the account is ended. `of` is the job's intent, or the
    `cell.allocated` of a cell."""
    detail = {"account": found.account, "unit": found.unit, "limit": str(found.limit), "used": str(found.used)}
    return replace(entries.follow_up("budget.exhausted", of, index, time), cell_id=of.cell_id, detail=detail)


def error_of(found: Record) -> AetherError:
    """What whoever asks is told."""
    detail = found.detail
    if detail["unit"] == TTL:
        return AetherError("TICKET_EXPIRED", "cannot finish the job: its ticket expired while it was open")
    limit, used = int(detail["limit"]), int(detail["used"])
    error = exhausted(detail["account"], detail["unit"], limit, used)
    unit = detail["unit"]
    error.message = f"cannot finish the job: its budget of {told(unit, limit)} ran out, {told(unit, used)} were used"
    return error


def ended_by(found: Record, finish: JobFinish) -> JobFinish:
    """The verdict on such a job: nothing that it made is kept. What was lost stays lost, and what succeeded before it
    could be ended succeeded."""
    if finish.state in (JobState.LOST, JobState.SUCCEEDED):
        return finish
    state = JobState.CANCELLED if found.detail["unit"] == TTL else JobState.FAILED
    return JobFinish(
        grant=finish.grant,
        state=state,
        error=error_of(found).body(),
        exit=finish.exit,
        code=finish.code,
        usage=finish.usage,
    )
