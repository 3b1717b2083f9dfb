"""`client.approvals`: what waits for somebody's leave, and deciding on it. All methods raise AetherError."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import msgspec

from aether.contract import approvals as wire

T = TypeVar("T")


def approval_query(approval_ms: int | None) -> list[tuple[str, str]]:
    """The query parameter that says how long an approval is waited for."""
    if approval_ms is None:
        return []
    return [("approval", f"{approval_ms}ms" if approval_ms < 1_000_000 else f"{approval_ms // 1000}s")]


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...


class Approvals:
    """The operations. An approval is named by its own id or by that of its job."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def list(self, states: Iterable[wire.ApprovalState] = ()) -> tuple[wire.ApprovalView, ...]:
        """Newest first; without `states` those that wait."""
        query = [("state", wire.ApprovalState(state).value) for state in states]
        return self._calls.call_json("approval.list", wire.ApprovalList, query=query).approvals

    def show(self, approval: str) -> wire.ApprovalDetail:
        """One approval with the request that it is for."""
        return self._calls.call_json("approval.show", wire.ApprovalDetail, wire.approval_id(approval))

    def approve(self, approval: str, *, reason: str | None = None) -> wire.ApprovalView:
        """Lets the request go ahead, once. Raises APPROVAL_DECIDED when it does not wait any more."""
        return self._decide("approval.approve", approval, reason)

    def deny(self, approval: str, *, reason: str | None = None) -> wire.ApprovalView:
        return self._decide("approval.deny", approval, reason)

    def _decide(self, name: str, approval: str, reason: str | None) -> wire.ApprovalView:
        body, headers = msgspec.json.encode({"reason": reason}), {"Content-Type": "application/json"}
        return self._calls.call_json(name, wire.ApprovalView, wire.approval_id(approval), body=body, headers=headers)
