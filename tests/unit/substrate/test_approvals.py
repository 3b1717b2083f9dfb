"""Approvals: what waits does nothing, who may decide, once and on exactly one input, through deaths and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aether.contract import approvals as wire
from aether.contract import ids
from aether.contract.allocations import CellRequest, CellView
from aether.contract.approvals import ApprovalState
from aether.contract.calls import Caller, JobCall, StopCall, SubmitCall, SubmittedJob
from aether.contract.canonical import canonical_record
from aether.contract.cellcalls import AllocateCall
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState
from aether.contract.records import Record
from aether.contract.ticketcalls import MintCall, MintRequest, RevokeCall
from aether.contract.wire import CellLaunch, CellLaunched, JobFinish, JobOutcome
from aether.substrate.audit.receipt_rules import check_receipt
from aether.substrate.cells.drivers.memory import Program, Run
from tests.support.onenode import OWNER, STRANGER, OneNode, caller, command, running

HOUR_MS = 3_600_000
DEFAULT = resources.files("aether.substrate.access").joinpath("default.cedar").read_text(encoding="utf-8")
POLICY = (
    DEFAULT
    + """
@id("agent-submit")
permit (principal in Role::"agent", action in [Action::"submit", Action::"read", Action::"control"], resource);
@id("agents-ask")
forbid (principal in Role::"agent", action in Action::"unapproved", resource);
"""
)
Step = Callable[[OneNode], Awaitable[None]]
RUNS: list[str] = []


async def ok(run: Run) -> int:
    RUNS.append(run.spec.argv[-1])
    return 0


PROGRAMS: dict[str, Program] = {"ok": ok}


def on_node(directory: Path, step: Step, **fields: Any) -> None:
    RUNS.clear()

    async def main() -> None:
        async with running(directory, PROGRAMS, **{"policy": POLICY, **fields}) as node:
            await step(node)

    asyncio.run(main())


async def agent(node: OneNode, uid: int = STRANGER, **fields: Any) -> Caller:
    request = MintRequest(**{"expires_ms": HOUR_MS, "role": "agent", **fields})
    return caller(uid, ticket=(await node.call("ticket.mint", caller(), MintCall(request=request))).ticket)


async def refused(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


async def approvals(node: OneNode, *states: ApprovalState, by: Caller | None = None) -> tuple[wire.ApprovalView, ...]:
    call = wire.ListApprovalsCall(state=states)
    listed: wire.ApprovalList = await node.call("approval.list", by or caller(), call)
    return listed.approvals


async def decide(node: OneNode, how: str, job: str, by: Caller | None = None, reason: str | None = None) -> Any:
    call = wire.DecideCall(approval_id=wire.approval_id(job), reason=reason)
    return await node.call(f"approval.{how}", by or caller(), call)


async def submit(node: OneNode, by: Caller, request: JobRequest, **fields: Any) -> SubmittedJob:
    answer = await node.call("job.submit", by, SubmitCall(request=request, **fields))
    assert isinstance(answer, SubmittedJob)
    return answer


def test_a_job_waits_does_nothing_and_goes_ahead_once_approved(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node)
        job = await submit(node, by, command("ok", "once"), wait_ms=50)
        assert job.state is JobState.WAITING_APPROVAL and job.approval_id == wire.approval_id(job.job_id)
        assert (await node.view(job.job_id)).state is JobState.WAITING_APPROVAL and RUNS == []
        (waiting,) = await approvals(node)
        assert (waiting.job_id, waiting.role, waiting.demanded_by) == (job.job_id, "agent", ("agents-ask",))
        shown = await node.call("approval.show", caller(), wire.ApprovalCall(approval_id=waiting.approval_id))
        assert shown.request["params"]["argv"] == ["ok", "once"] and shown.input_hash == job.input_hash
        granted = await decide(node, "approve", job.job_id, reason="seen")
        assert (granted.state, granted.decided_by, granted.reason) == (ApprovalState.GRANTED, f"uid:{OWNER}", "seen")
        assert (await node.view(job.job_id, wait_ms=5_000)).state is JobState.SUCCEEDED and RUNS == ["once"]
        assert await approvals(node) == ()
        (used,) = await approvals(node, ApprovalState.USED)
        assert used.approval_id == waiting.approval_id
        kinds = [r.type for r in await node.records() if r.job_id == job.job_id]
        assert kinds == ["job.intent", "approval.requested", "approval.granted", "job.started", "job.outcome"]
        (record,) = await node.records("approval.granted")
        assert record.input_hash == job.input_hash and record.principal == f"uid:{OWNER}"
        assert record.ticket is not None and record.ticket.role == "queen" and record.policy is not None

    on_node(tmp_path, step)


def test_others_are_not_held_and_the_default_policy_demands_nothing(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        assert (await node.submit(command("ok"), caller(), 5_000)).state is JobState.SUCCEEDED
        assert (await node.submit(command("ok"), caller(STRANGER), 5_000)).state is JobState.SUCCEEDED
        assert await node.records("approval.requested") == []

    on_node(tmp_path, step)
    on_node(tmp_path / "default", step, policy=DEFAULT)


def test_a_policy_that_permits_nothing_unapproved_holds_everything(tmp_path: Path) -> None:
    policy = DEFAULT.replace('permit (principal, action in Action::"unapproved", resource);', "")
    policy = policy.replace('@id("goes-ahead")', "")

    async def step(node: OneNode) -> None:
        assert (await node.submit(command("ok"), caller(STRANGER))).state is JobState.WAITING_APPROVAL

    on_node(tmp_path, step, policy=policy)


def test_denied_it_is_cancelled_and_says_why(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await submit(node, await agent(node), command("ok"))
        assert (await decide(node, "deny", job.job_id, reason="no")).state is ApprovalState.DENIED
        view = await node.view(job.job_id, wait_ms=2_000)
        assert view.state is JobState.CANCELLED and view.error is not None
        assert view.error.code == "APPROVAL_DENIED" and "no" in view.error.message and RUNS == []
        assert await refused(decide(node, "approve", job.job_id)) == "APPROVAL_DECIDED"
        assert (await decide(node, "deny", job.job_id)).state is ApprovalState.DENIED, "said again, not done again"
        assert len(await node.records("approval.denied")) == 1

    on_node(tmp_path, step)


def test_nobody_approves_it_in_time(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node, budget={"ops": 1})
        job = await submit(node, by, command("ok"), approval_ms=1_000)
        assert await refused(submit(node, by, command("ok"))) == "BUDGET_EXHAUSTED", "what waits holds its budget"
        view = await node.view(job.job_id, wait_ms=5_000)
        assert view.state is JobState.CANCELLED and view.error is not None and view.error.code == "APPROVAL_EXPIRED"
        assert await refused(decide(node, "approve", job.job_id)) == "APPROVAL_DECIDED"
        assert len(await node.records("approval.expired")) == 1 and RUNS == []
        for wrong in (0, 999, 8 * 24 * HOUR_MS):
            assert await refused(submit(node, await agent(node), command("ok"), approval_ms=wrong)) == "BAD_FIELD"

    on_node(tmp_path, step)


def test_it_does_not_outlive_the_ticket(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node, expires_ms=2_000)
        await submit(node, by, command("ok"))
        (waiting,) = await approvals(node)
        minted = (await node.records("ticket.minted"))[-1]
        assert f"expires={caveats_of(waiting.expires_at)}" in minted.detail["caveats"]

    on_node(tmp_path, step)


def caveats_of(time: str) -> int:
    from aether.contract.clock import epoch_ns

    return epoch_ns(time) // 1_000_000


def test_nobody_decides_on_their_own_request(tmp_path: Path) -> None:
    everybody = POLICY + '@id("all") forbid (principal, action in Action::"unapproved", resource);\n'
    everybody += '@id("deciders") permit (principal, action == Action::"approval.approve", resource);\n'

    async def step(node: OneNode) -> None:
        own = await submit(node, caller(), command("ok"))
        assert await refused(decide(node, "approve", own.job_id)) == "POLICY_DENIED"
        by = await agent(node)
        job = await submit(node, by, command("ok"))
        assert await refused(decide(node, "approve", job.job_id, by)) == "POLICY_DENIED"
        narrower = caller(STRANGER + 1, ticket=by.credential)
        assert await refused(decide(node, "approve", job.job_id, narrower)) == "POLICY_DENIED", "the same ticket"
        same_uid = await submit(node, await agent(node, uid=OWNER), command("ok"))
        assert (await decide(node, "approve", same_uid.job_id)).state is ApprovalState.GRANTED, (
            "an agent of the operator"
        )
        assert (await decide(node, "approve", job.job_id)).state is ApprovalState.GRANTED

    on_node(tmp_path, step, policy=everybody)


def test_only_the_operator_decides_and_tenants_do_not_see_each_other(tmp_path: Path) -> None:
    held = POLICY + '@id("users-ask") forbid (principal in Role::"user", action in Action::"unapproved", resource);\n'

    async def step(node: OneNode) -> None:
        job = await submit(node, caller(STRANGER), command("ok"))
        assert await refused(decide(node, "approve", job.job_id, caller(STRANGER))) == "POLICY_DENIED"
        assert await refused(decide(node, "approve", job.job_id, caller(STRANGER + 1))) == "POLICY_DENIED"
        assert await approvals(node, by=caller(STRANGER + 1)) == ()
        assert len(await approvals(node, by=caller(STRANGER))) == 1
        (seen,) = await approvals(node)
        assert seen.tenant_id != (await node.view(job.job_id, caller(STRANGER))).node_id
        assert (await decide(node, "approve", job.job_id)).state is ApprovalState.GRANTED
        assert (await node.view(job.job_id, caller(STRANGER), 5_000)).state is JobState.SUCCEEDED
        unknown = ids.new(ids.APPROVAL)
        assert (
            await refused(node.call("approval.approve", caller(), wire.DecideCall(approval_id=unknown))) == "NOT_FOUND"
        )

    on_node(tmp_path, step, policy=held)


def test_an_approver_of_one_tenant_cannot_tell_anothers(tmp_path: Path) -> None:
    policy = POLICY + '@id("users-ask") forbid (principal in Role::"user", action in Action::"unapproved", resource);\n'
    policy += '@id("approvers") permit (principal in Role::"user", action == Action::"approval.approve", resource);\n'

    async def step(node: OneNode) -> None:
        job = await submit(node, caller(STRANGER), command("ok"))
        assert await refused(decide(node, "approve", job.job_id, caller(STRANGER + 1))) == "NOT_FOUND"

    on_node(tmp_path, step, policy=policy)


def test_a_revoked_ticket_ends_what_waits(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node)
        job = await submit(node, by, command("ok"))
        await node.call("ticket.revoke", caller(), RevokeCall(ticket=by.credential))
        view = await node.view(job.job_id, wait_ms=2_000)
        assert view.error is not None and view.error.code == "REVOKED"
        assert await refused(decide(node, "approve", job.job_id)) == "APPROVAL_DECIDED"
        (gone,) = await approvals(node, ApprovalState.WITHDRAWN)
        assert gone.job_id == job.job_id and RUNS == []

    on_node(tmp_path, step)


def test_a_stop_withdraws_it(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node)
        job = await submit(node, by, command("ok"))
        await node.call("job.stop", by, StopCall(job_id=job.job_id))
        assert (await node.view(job.job_id, wait_ms=5_000)).state is JobState.CANCELLED
        assert await refused(decide(node, "approve", job.job_id)) == "APPROVAL_DECIDED" and RUNS == []

    on_node(tmp_path, step)


def test_the_authority_itself_holds_what_waits(tmp_path: Path) -> None:
    """An aurorad that goes ahead, or that was given another input to keep, gets nothing."""

    async def step(node: OneNode) -> None:
        job = await submit(node, await agent(node), command("ok", "asked"))
        grant = node.parts.book.ledger.open[job.job_id].grant
        launch = CellLaunch(grant=grant, request=command("ok", "asked"))
        assert await refused(node.link.call("cell.launch", launch, CellLaunched)) == "NO_GRANT"
        finish = JobFinish(grant=grant, state=JobState.SUCCEEDED)
        assert await refused(node.link.call("job.finish", finish, JobOutcome)) == "NO_GRANT"
        await node.kill_aurorad()
        await decide(node, "approve", job.job_id)
        await node.start_aurorad()
        await node.connected()
        assert (await node.view(job.job_id, wait_ms=5_000)).state is JobState.SUCCEEDED and RUNS == ["asked"]
        other = await submit(node, await agent(node), command("ok", "asked"))
        await decide(node, "approve", other.job_id)
        swapped = CellLaunch(grant=node.parts.book.ledger.open[other.job_id].grant, request=command("ok", "swapped"))
        assert await refused(node.link.call("cell.launch", swapped, CellLaunched)) == "NO_GRANT"

    on_node(tmp_path, step)


@pytest.mark.parametrize("dies", ["aetherd", "aurorad", "both"])
@pytest.mark.parametrize("granted", [True, False])
def test_what_waits_survives_deaths(tmp_path: Path, dies: str, granted: bool) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node)
        job = await submit(node, by, command("ok"))
        if granted:
            # the decision is durable, and the node dies before it is told on
            node.parts.orchestra.detach(node.parts.orchestra.link())
            await decide(node, "approve", job.job_id)
        if dies in ("aurorad", "both"):
            await node.kill_aurorad()
        if dies in ("aetherd", "both"):
            node.parts.book.snapshot()
            await node.kill_aetherd()
            await node.start_aetherd()
        if dies in ("aurorad", "both"):
            await node.start_aurorad()
        await node.connected()
        if not granted:
            await asyncio.sleep(0.05)
            assert (await node.view(job.job_id)).state is JobState.WAITING_APPROVAL and RUNS == []
            await decide(node, "approve", job.job_id)
        assert (await node.view(job.job_id, wait_ms=5_000)).state is JobState.SUCCEEDED and len(RUNS) == 1

    on_node(tmp_path, step)


def test_it_expires_while_the_authority_is_away(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await submit(node, await agent(node), command("ok"), approval_ms=1_000)
        await node.kill_aetherd()
        await asyncio.sleep(1.1)
        await node.start_aetherd()
        await node.connected()
        view = await node.view(job.job_id, wait_ms=5_000)
        assert view.error is not None and view.error.code == "APPROVAL_EXPIRED" and RUNS == []

    on_node(tmp_path, step)


def test_the_memory_of_approvals_is_the_fold_of_the_log(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node)
        jobs = [await submit(node, by, command("ok", str(n))) for n in range(4)]
        await decide(node, "approve", jobs[0].job_id, reason="token=abc123")
        await decide(node, "deny", jobs[1].job_id)
        await node.call("job.stop", by, StopCall(job_id=jobs[2].job_id))
        for job in jobs[:3]:
            await node.view(job.job_id, wait_ms=5_000)
        before = await approvals(node, *ApprovalState)
        assert {each.state for each in before} == {"waiting", "used", "denied", "withdrawn"}
        assert "abc123" not in str(before)
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        assert await approvals(node, *ApprovalState) == before

    on_node(tmp_path, step)


def test_a_cell_is_asked_for_approved_and_allocated_once(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = await agent(node)

        async def allocate(**fields: Any) -> CellView:
            view = await node.call("cell.allocate", by, AllocateCall(request=CellRequest(**{"name": "a", **fields})))
            assert isinstance(view, CellView)
            return view

        assert await refused(allocate()) == "APPROVAL_NEEDED"
        assert await refused(allocate()) == "APPROVAL_NEEDED"
        (waiting,) = await approvals(node)
        assert (waiting.cell, waiting.operation, waiting.job_id) == ("a", "cell.allocate", None)
        shown = await node.call("approval.show", caller(), wire.ApprovalCall(approval_id=waiting.approval_id))
        assert shown.request["isolate_network"] is True
        await decide(node, "approve", waiting.approval_id)
        assert await refused(allocate(labels=("other",))) == "APPROVAL_NEEDED", "it was approved for another input"
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        assert (await allocate()).name == "a"
        await node.call("cell.free", caller(ticket=by.credential), free("a"))
        assert await refused(allocate()) == "APPROVAL_NEEDED", "an approval serves once"
        await decide(node, "deny", (await approvals(node))[0].approval_id)
        assert await refused(allocate()) == "APPROVAL_DENIED"

    on_node(tmp_path, step)


def free(name: str) -> Any:
    from aether.contract.cellcalls import FreeCall

    return FreeCall(cell=name)


def test_a_model_job_that_waits_takes_the_long_way(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        request = JobRequest(
            kind="model", op="encode_state", params={"model": "pendulum"}, inputs={"obs": [[1.0, 0.0]]}
        )
        job = await submit(node, await agent(node), request, wait_ms=100)
        assert job.state is JobState.WAITING_APPROVAL and job.result is None
        await decide(node, "approve", job.job_id)
        view = await node.view(job.job_id, wait_ms=20_000)
        assert view.state in (JobState.SUCCEEDED, JobState.FAILED) and view.outcome_index is not None

    on_node(tmp_path, step, models=True)


def test_so_many_wait_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.contract.limits.APPROVALS_WAITING_MAX", 3)

    async def step(node: OneNode) -> None:
        by = await agent(node)
        for _ in range(3):
            await submit(node, by, command("ok"))
        assert await refused(submit(node, by, command("ok"))) == "APPROVAL_LIMIT"

    on_node(tmp_path, step)


def test_a_receipt_holds_who_asked_and_who_approved(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await submit(node, await agent(node), command("ok"))
        await decide(node, "approve", job.job_id)
        receipt = await node.call("job.receipt", caller(), JobCall(job_id=job.job_id, wait_ms=5_000))
        types = [msgspec.json.decode(item.entry, type=Record).type for item in receipt.entries]
        assert types == ["job.intent", "approval.requested", "approval.granted", "job.started", "job.outcome"]
        key = node.layout.audit_public_key.read_text()
        assert check_receipt(canonical_record(receipt), key).ok
        left_out = msgspec.structs.replace(receipt, entries=(*receipt.entries[:2], *receipt.entries[3:]))
        found = check_receipt(canonical_record(left_out), key)
        assert {each.code for each in found.problems} == {"APPROVAL_MISSING"}

    on_node(tmp_path, step)
