"""The policy for programs.

from aether.client import Client

with Client() as client:
    print(client.policy.show().text)
    for change in client.policy.diff(candidate).decisions:
        print(change.role, change.operation, change.before, change.after)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from aether.contract import policycalls as wire

T = TypeVar("T")


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...


class PolicyClient:
    """`client.policy`: the operations. All methods raise AetherError."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def show(self, digest: str | None = None) -> wire.PolicyView:
        """The policy in force, or the version of that digest (6 or more of its hex digits)."""
        return self._calls.call_json("policy.show", wire.PolicyView, query=[("digest", digest)])

    def versions(self) -> wire.Versions:
        """What was loaded, newest first, and the policy on trial."""
        return self._calls.call_json("policy.list", wire.Versions)

    def explain(self, asking: wire.Asking | None = None, *, job_id: str | None = None) -> wire.Decided:
        """A decision and how every policy stood to it: on a question, or on the job that was admitted."""
        return self._send("policy.explain", wire.Decided, wire.ExplainPolicyCall(asking=asking, job_id=job_id))

    def check(self, policy: str) -> wire.Checked:
        """What is wrong with a policy's text."""
        return self._send("policy.check", wire.Checked, wire.PolicyText(policy=policy))

    def test(self, cases: Sequence[wire.Case], policy: str | None = None) -> wire.Tested:
        """Whether questions are decided as expected, by a policy or by the one in force."""
        return self._send("policy.test", wire.Tested, wire.TestCall(cases=tuple(cases), policy=policy))

    def diff(self, policy: str) -> wire.Difference:
        """What the policy would change."""
        return self._send("policy.diff", wire.Difference, wire.PolicyText(policy=policy))

    def counterfactual(
        self, policy: str, *, since: str | None = None, until: str | None = None
    ) -> Iterator[wire.Counterfactual]:
        """The recorded decisions of a period taken again, piece by piece of the log."""
        start: int | None = 0
        while start is not None:
            call = wire.CounterfactualCall(policy=policy, since=since, until=until, start=start)
            piece = self._send("policy.counterfactual", wire.Counterfactual, call)
            yield piece
            start = piece.next_start

    def load(self, policy: str, *, force: bool = False) -> wire.Version:
        """Puts the policy in force; returns its version."""
        return self._send("policy.load", wire.Version, wire.LoadCall(policy=policy, force=force))

    def rollback(self, digest: str, *, force: bool = False) -> wire.Version:
        """Puts the version of that digest in force again."""
        return self._send("policy.rollback", wire.Version, wire.RollbackCall(digest=digest, force=force))

    def trial(
        self, policy: str | None, *, share_percent: int = 10, mode: wire.Mode = "shadow", force: bool = False
    ) -> wire.Versions:
        """Tries a policy on a share of the principals; None ends the trial."""
        call = wire.TrialCall(policy=policy, share_percent=share_percent, mode=mode, force=force)
        return self._send("policy.trial", wire.Versions, call)

    def _send(self, name: str, reply: type[T], call: msgspec.Struct) -> T:
        headers = {"Content-Type": "application/json"}
        return self._calls.call_json(name, reply, body=msgspec.json.encode(call), headers=headers)
