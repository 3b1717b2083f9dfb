"""Two policies at once: the one in force, and one on trial for a share of the principals. Pure.

Who is in the share is a stable hash of tenant and name: the same principal is always on the same side, so that all
questions of a request are put to one policy. `enforced`: the policy on trial decides for the share. `shadow`: the one
in force decides for everybody, and what the other would have said is in the record.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from aether.contract.policycalls import Mode
from aether.substrate.access.identity import Principal
from aether.substrate.access.policy import Decision, Policy, Question


@dataclass(frozen=True, slots=True)
class PolicyTrial:
    """Decides like `Policy`."""

    current: Policy
    candidate: Policy
    share_percent: int
    mode: Mode

    def decide(self, principal: Principal, role: str, question: Question, now_ns: int) -> Decision:
        """The decision, with the shadow's where there is one; its digest names the policy that took it."""
        if not self.chosen(principal):
            return self.current.decide(principal, role, question, now_ns)
        tried = self.candidate.decide(principal, role, question, now_ns)
        if self.mode == "enforced":
            return tried
        return replace(self.current.decide(principal, role, question, now_ns), shadow=tried)

    def describes(self, operation: str, kind: str) -> bool:
        return self.current.describes(operation, kind) or self.candidate.describes(operation, kind)

    def chosen(self, principal: Principal) -> bool:
        """Whether the principal belongs to the share."""
        digest = hashlib.sha256(f"aether trial v1\0{principal.tenant_id}\0{principal.name}".encode()).digest()
        return int.from_bytes(digest[:8]) % 100 < self.share_percent
