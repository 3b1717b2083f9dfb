"""The policy as operations: loaded atomically and recorded, kept over a restart, tried, looked back with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from aether.contract import policycalls as wire
from aether.contract.calls import Caller, JobCall, Nothing
from aether.contract.errors import AetherError
from aether.contract.jobs import JobView
from aether.contract.records import Record
from aether.substrate.access.policy import Policy
from aether.substrate.access.review import reconsider
from aether.substrate.cells.drivers.memory import Program, Run
from tests.support.onenode import OWNER, STRANGER, OneNode, caller, command, running

DEFAULT = Policy.default().text
CLOSED = DEFAULT + '@id("closed") forbid (principal in Role::"user", action == Action::"job.submit", resource);'
ALICE = caller(STRANGER)


async def ok(run: Run) -> int:
    return 0


PROGRAMS: dict[str, Program] = {"ok": ok}
Step = Callable[[OneNode], Awaitable[None]]


def on_node(directory: Path, step: Step, policy: str | None = None) -> None:
    async def main() -> None:
        async with running(directory, PROGRAMS, policy=policy) as node:
            await step(node)

    asyncio.run(main())


async def refused(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


async def load(node: OneNode, text: str, by: Caller | None = None, **fields: Any) -> wire.Version:
    done = await node.call("policy.load", by or caller(), wire.LoadCall(policy=text, **fields))
    assert isinstance(done, wire.Version)
    return done


async def submit(node: OneNode, by: Caller) -> JobView:
    return await node.submit(command("ok"), by)


async def settled(node: OneNode) -> None:
    """Returns when what was recorded so far is durable: a refusal does not wait for that."""
    await node.parts.book.log.durable(node.parts.book.log.size - 1)


def records(node: OneNode, kind: str) -> list[Record]:
    log = node.parts.book.log
    return [record for record in log.read(0, log.size) if record.type == kind]


def test_what_is_loaded_decides_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await submit(node, ALICE)
        first = await node.call("policy.show", caller(), wire.VersionCall())
        version = await load(node, CLOSED)
        assert (version.number, version.principal) == (2, f"uid:{OWNER}")
        assert await refused(submit(node, ALICE)) == "POLICY_DENIED"
        assert (await load(node, CLOSED)).log_index == version.log_index  # repeating it changes nothing
        record = records(node, "policy.loaded")[-1]
        assert record.policy is not None and record.policy.digest == version.digest
        assert record.detail["under"] == first.version.digest and record.detail["by"] == "operator"
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        assert await refused(submit(node, ALICE)) == "POLICY_DENIED"
        shown = await node.call("policy.show", caller(), wire.VersionCall())
        assert (shown.text, shown.loaded, shown.version.number) == (CLOSED, True, 2)
        assert (
            await node.call("policy.show", ALICE, wire.VersionCall(digest=first.version.digest[7:15]))
        ).text == DEFAULT
        back = await node.call("policy.rollback", caller(), wire.RollbackCall(digest=first.version.digest))
        assert (back.number, back.digest) == (3, first.version.digest)
        await submit(node, ALICE)
        listed = await node.call("policy.list", ALICE, Nothing())
        assert [each.number for each in listed.versions] == [3, 2, 1]

    on_node(tmp_path, step)


def test_a_changed_file_outweighs_what_was_loaded_before(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await load(node, CLOSED)
        await node.kill_aetherd()
        node.layout.policy.write_text(DEFAULT + "// by hand\n")
        await node.start_aetherd()
        await node.connected()
        await submit(node, ALICE)
        assert records(node, "policy.loaded")[-1].detail["source"] == "file"

    on_node(tmp_path, step)


def test_who_may_load_and_what_is_refused(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        assert await refused(load(node, CLOSED, ALICE)) == "POLICY_DENIED"
        assert await refused(load(node, "permit (")) == "BAD_POLICY"
        shut = 'permit (principal in Role::"user", action, resource);'
        assert await refused(load(node, shut)) == "POLICY_LOCKOUT"
        assert await refused(node.call("policy.rollback", caller(), wire.RollbackCall(digest="ffffff"))) == "NOT_FOUND"
        assert len(records(node, "policy.loaded")) == 1
        await load(node, shut, force=True)
        assert await refused(load(node, DEFAULT)) == "POLICY_DENIED"

    on_node(tmp_path, step)


def test_a_trial_is_recorded_enforced_and_ends(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        async def trial(policy: str | None, **fields: Any) -> wire.Trial | None:
            found = await node.call(
                "policy.trial", caller(), wire.TrialCall(policy=policy, share_percent=100, **fields)
            )
            assert isinstance(found, wire.Versions)
            return found.trial

        shadow = await trial(CLOSED)
        assert shadow is not None and shadow.mode == "shadow"
        await submit(node, ALICE)
        said = records(node, "job.intent")[-1].policy
        assert said is not None and said.decision == "allow" and said.shadow is not None
        assert (said.shadow.decision, said.shadow.determining) == ("deny", ("closed",))
        await trial(CLOSED, mode="enforced")
        assert await refused(submit(node, ALICE)) == "POLICY_DENIED"
        await settled(node)
        denied = records(node, "access.denied")[-1].policy
        assert denied is not None and denied.digest == shadow.digest
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        assert await refused(submit(node, ALICE)) == "POLICY_DENIED"
        assert await trial(None) is None
        await submit(node, ALICE)
        assert len((await node.call("policy.list", caller(), Nothing())).versions) == 1

    on_node(tmp_path, step)


def test_the_log_is_looked_at_again(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await submit(node, ALICE)
        await load(node, CLOSED)
        assert await refused(submit(node, ALICE)) == "POLICY_DENIED"

        await settled(node)

        async def look(policy: str, by: Caller, **fields: Any) -> wire.Counterfactual:
            found = await node.call("policy.counterfactual", by, wire.CounterfactualCall(policy=policy, **fields))
            assert isinstance(found, wire.Counterfactual)
            return found

        closed = await look(CLOSED, caller())
        assert [(c.job_id, c.before, c.after) for c in closed.changed] == [(job.job_id, "allow", "deny")]
        assert closed.changed[0].determining_after == ("closed",) and closed.changed[0].principal == f"uid:{STRANGER}"
        opened = await look(DEFAULT, caller())
        assert [(c.before, c.after) for c in opened.changed] == [("deny", "allow")]
        assert (opened.examined, closed.examined, closed.unchanged) == (2, 2, 1) and not opened.undecidable
        assert (await look(CLOSED, caller(), until="2001-01-01T00:00:00Z")).examined == 0
        assert await refused(look(CLOSED, caller(), since="yesterday")) == "BAD_FIELD"
        assert await refused(look(CLOSED, ALICE)) == "POLICY_DENIED"

    on_node(tmp_path, step)


def test_an_old_record_is_undecidable(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        await submit(node, ALICE)
        intent = records(node, "job.intent")[-1]
        assert intent.policy is not None and intent.policy.question is not None
        assert (
            reconsider(Policy.load(CLOSED), replace(intent, policy=replace(intent.policy, question=None))) == "question"
        )
        cut = replace(intent.policy, question=replace(intent.policy.question, complete=False))
        assert reconsider(Policy.load(CLOSED), replace(intent, policy=cut)) == "hosts, credentials and paths"

    on_node(tmp_path, step)


def test_explanations_cases_and_differences(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await submit(node, ALICE)
        await load(node, CLOSED)
        why = await node.call("policy.explain", ALICE, wire.ExplainPolicyCall(job_id=job.job_id))
        assert why.allow and why.determining == ("user-submit",) and why.asked.owner == f"uid:{STRANGER}"
        asking = wire.Asking(operation="job.submit", kind="command")
        now = await node.call("policy.explain", ALICE, wire.ExplainPolicyCall(asking=asking))
        assert not now.allow and now.determining == ("closed",)
        assert await refused(node.call("policy.explain", ALICE, wire.ExplainPolicyCall())) == "BAD_FIELD"
        case = wire.Case(operation="job.submit", kind="command", expect="deny", policies=("closed",))
        assert (await node.call("policy.test", caller(), wire.TestCall(cases=(case,)))).passed == 1
        assert (await node.call("policy.test", caller(), wire.TestCall(cases=(case,), policy=DEFAULT))).failed == 1
        found = await node.call("policy.diff", caller(), wire.PolicyText(policy=DEFAULT))
        assert found.removed == ("closed",) and {each.role for each in found.decisions} == {"user"}
        bad = await node.call("policy.check", caller(), wire.PolicyText(policy="permit ("))
        assert not bad.ok and bad.problems[0].line == 1

    on_node(tmp_path, step)


OWN = (
    'permit (principal in Role::"queen", action, resource);'
    'permit (principal, action in Action::"submit", resource);'
    'permit (principal, action in Action::"unapproved", resource);'
    '@id("own") permit (principal, action == Action::"job.get", resource)'
    " when { resource has owner && resource.owner == principal };"
)


def test_an_owner_is_known_long_after_the_job_ended(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await submit(node, ALICE)
        await node.call("job.get", ALICE, JobCall(job_id=job.job_id, wait_ms=5000))
        node.parts.book._outcomes.clear()
        assert isinstance(await node.call("job.get", ALICE, JobCall(job_id=job.job_id)), JobView)
        stranger = caller(STRANGER + 1)
        assert await refused(node.call("job.get", stranger, JobCall(job_id=job.job_id))) == "POLICY_DENIED"

    on_node(tmp_path, step, policy=OWN)
