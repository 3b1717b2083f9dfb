"""What leave costs: a ticket verified, a policy asked, the whole check before an operation; microseconds each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from aether.contract import caveats
from aether.contract.calls import Caller
from aether.substrate.access.access import Access, Resource
from aether.substrate.access.identity import principal_of
from aether.substrate.access.policy import Policy, Question
from aether.substrate.access.tickets import Tickets
from bench.harness import percentile, report

ROUNDS = 40
CALLS = 250
NOW_NS = 1_800_000_000_000_000_000
SECRET = bytes(range(32))
RULES = (10, 100, 1000)


def timed(call: Callable[[int], Any]) -> list[float]:
    """Microseconds per call of each round; the argument counts the calls."""
    figures = []
    for at in range(ROUNDS):
        start = time.perf_counter()
        for number in range(at * CALLS, at * CALLS + CALLS):
            call(number)
        figures.append((time.perf_counter() - start) / CALLS * 1e6)
    return figures


def rules(count: int) -> Policy:
    """A set of that many policies, of which two look at labels and time and apply to what is asked."""
    others = [
        f'@id("role-{n}") permit (principal in Role::"role-{n}", action in Action::"read", resource);'
        for n in range(count - 3)
    ]
    return Policy.load(
        """@id("users") permit (principal in Role::"user", action, resource);
        @id("marked") forbid (principal, action in Action::"submit", resource) when { context.labels.contains("x") };
        @id("late") forbid (principal, action in Action::"submit", resource) when { context.time.hour > 23 };
        """
        + "\n".join(others)
    )


def main() -> None:
    rows: list[dict[str, Any]] = []

    def row(what: str, target_us: float | None, call: Callable[[int], Any]) -> None:
        figures = timed(call)
        rows.append(
            {
                "what": what, "p50_us": percentile(figures, 0.5), "p90_us": percentile(figures, 0.9),
                "target_us": target_us or "", "load_1m": os.getloadavg()[0],
            }
        )  # fmt: skip

    authority = Tickets({"e1": SECRET}, "e1")
    said = (caveats.role("user"), caveats.operations("job.*"), caveats.budget("ops", 1 << 40))
    texts = [authority.mint("default", number.to_bytes(16, "big"), said) for number in range(ROUNDS * CALLS)]
    row("ticket verify, 3 caveats, not seen before", 10, lambda n: authority.verify(texts[n]))
    row("ticket verify, remembered", None, lambda n: authority.verify(texts[0]))

    user, question = principal_of(1000, "default"), Question("job.submit", "command", "run", labels=("a",))
    for count in RULES:
        policy = rules(count)
        target = 35 if count == 10 else None
        row(f"decision, {count} rules", target, lambda n, p=policy: p.decide(user, "user", question, NOW_NS))  # type: ignore[misc]
    policy, read = rules(10), Question("job.get", "job", id="job_1")
    row("decision, 10 rules, remembered", 3, lambda n: policy.decide(user, "user", read, NOW_NS))

    access = Access(authority, None, policy, None)  # type: ignore[arg-type]
    submit = Resource(kind="command", op="run", labels=("a",))

    def admit(number: int) -> None:
        caller = Caller(1000, 1000, 1, texts[number], "req_1")
        access.admit(caller, "job.submit", submit, NOW_NS)

    row("whole check of job.submit by ticket", 100, admit)
    report("access", rows)


if __name__ == "__main__":
    main()
