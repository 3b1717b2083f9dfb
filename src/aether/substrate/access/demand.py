"""Whether a policy demands an approval. Pure.

The policy is asked a second time whether an operation may go ahead without anybody's approval: as `job.unapproved` for
`job.submit`, as `cell.unapproved` for `cell.allocate`, with what the request wants to reach in `context.hosts`. A
refusal, also because nothing permits it, is a demand; an error in the evaluation refuses the operation itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from aether.contract.errors import AetherError
from aether.contract.records import PolicyRef
from aether.substrate.access.identity import Principal
from aether.substrate.access.policy import Decides, Question

UNAPPROVED: Final[Mapping[str, str]] = {"job.submit": "job.unapproved", "cell.allocate": "cell.unapproved"}


def demanded(
    policy: Decides,
    principal: Principal,
    roles: Iterable[str],
    question: Question,
    hosts: tuple[str, ...],
    now_ns: int,
) -> PolicyRef | None:
    """The policy's refusal to let the operation go ahead unapproved; None when it may, or none can be demanded for it.
    Every role of a ticket must be let. Raises POLICY_DENIED when the policy could not be evaluated."""
    action = UNAPPROVED.get(question.operation)
    if action is None:
        return None
    second = replace(question, operation=action, hosts=hosts)
    refusals = []
    for role in roles:
        decision = policy.decide(principal, role, second, now_ns)
        if decision.errors:
            why = "the policy could not be evaluated"
            raise AetherError(
                "POLICY_DENIED", f"cannot {action}: {why}", details={"policies": "", "policy_digest": decision.digest}
            )
        if not decision.allow:
            refusals.append(decision)
    if not refusals:
        return None
    determining = sorted({name for refusal in refusals for name in refusal.determining})
    return PolicyRef(digest=refusals[0].digest, decision="deny", determining=tuple(determining))
