"""The page that `aether why` prints, pure: from a job's receipt, and what else the node says of it, to sections.

A receipt alone is enough for all but the caveats of the ticket, the connections and the activity of the job's cell:
those are records and files of the node (`More`), and null where nobody could be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from aether.contract.cellplan import DRIVERS
from aether.contract.cells import SandboxReport, Usage
from aether.contract.egresswire import EgressConnection
from aether.contract.labels import LOCAL_ONLY
from aether.contract.records import Receipt, Record
from aether.contract.units import told

Section = dict[str, Any]


class More(msgspec.Struct, frozen=True, kw_only=True):
    """What a receipt does not hold. `caveats` are those of each link of the ticket, by its id."""

    caveats: dict[str, str] | None = None
    connections: tuple[EgressConnection, ...] | None = None
    activity: dict[str, int] | None = None


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """Each section answers one question; facts that do not apply are null."""

    job_id: str
    asked: Section
    authority: Section
    rules: Section
    place: Section
    enforced: Section
    used: Section
    touched: Section
    end: Section
    proof: Section


def page(receipt: Receipt, more: More) -> Why:
    """Raises msgspec.DecodeError, or ValueError when the receipt lacks intent or outcome."""
    records = [msgspec.json.decode(item.entry, type=Record) for item in receipt.entries]
    by_type = {record.type: record for record in records}
    intent, outcome = by_type.get("job.intent"), by_type.get("job.outcome")
    if intent is None or outcome is None:
        raise ValueError("it has no intent or no outcome")
    started = by_type.get("job.started")
    return Why(
        job_id=receipt.job_id,
        asked=_asked(intent, by_type.get("job.stop")),
        authority=_authority(intent, more),
        rules=_rules(intent, by_type.get("approval.requested"), _decision(records)),
        place=_place(intent, started, outcome, _report(receipt, started)),
        enforced=_enforced(intent, started, outcome, _report(receipt, started)),
        used=_used(intent, outcome),
        touched=_touched(intent, outcome, more),
        end=_end(outcome),
        proof=_proof(receipt, records),
    )


def _asked(intent: Record, stop: Record | None) -> Section:
    return {
        "principal": intent.principal,
        "tenant": intent.tenant_id,
        "time": intent.created_at or intent.time,
        "request": intent.request_id,
        "operation": intent.operation,
        "job": f"{intent.kind} {intent.op}",
        "replay_of": intent.detail.get("replay_of"),
        "stop_asked_by": f"{stop.principal} at {stop.time}" if stop is not None else None,
    }


def _authority(intent: Record, more: More) -> Section:
    ticket = intent.ticket
    if ticket is None:
        return {"ticket": None}
    return {
        "ticket": "the uid's own" if ticket.implicit else "shown by the caller",
        "role": ticket.role,
        "key": ticket.kid,
        "links": ticket.link_ids,
        "caveats": more.caveats,
    }


def _rules(intent: Record, asked: Record | None, decision: Record | None) -> Section:
    policy = intent.policy
    return {
        "decision": policy.decision if policy else None,
        "decided_by": policy.determining if policy else None,
        "policy": policy.digest if policy else None,
        "approval_demanded_by": asked.policy.determining if asked is not None and asked.policy is not None else None,
        "approval": _decided(decision) if decision is not None or asked is None else "nobody decided",
        "labels": intent.labels,
    }


def _decision(records: Sequence[Record]) -> Record | None:
    return next((r for r in records if r.type in ("approval.granted", "approval.denied", "approval.expired")), None)


def _decided(decision: Record | None) -> str | None:
    if decision is None:
        return None
    word = decision.type.removeprefix("approval.")
    by = f" by {decision.principal} as {decision.ticket.role}" if decision.ticket is not None else ""
    reason = decision.detail.get("reason")
    return f"{word}{by} at {decision.time}" + (f": {reason}" if reason else "")


def _place(intent: Record, started: Record | None, outcome: Record, report: SandboxReport | None) -> Section:
    code = outcome.code or (started.code if started else None)
    return {
        "node": outcome.node_id,
        "cell": outcome.cell_id,
        "allocated_cell": intent.detail.get("cell") if intent.cell_id else None,
        "host_uid": started.detail.get("host_uid") if started else None,
        "route": code.route if code else None,
        "engine": code.engine if code else None,
        "rung": code.rung if code else None,
        "driver": next((name for name in DRIVERS if name in report.enforced), None) if report else None,
        "plan": code.plan_digest if code else None,
        "model": f"{outcome.model_id}@{outcome.model_version}" if outcome.model_id else None,
        "model_package": code.model_digest if code else None,
    }


def _report(receipt: Receipt, started: Record | None) -> SandboxReport | None:
    """The sandbox as the kernel enforced it."""
    digest = started.code.sandbox_digest if started is not None and started.code is not None else None
    text = receipt.documents.get(digest) if digest is not None else None
    return None if text is None else msgspec.json.decode(text, type=SandboxReport)


def _enforced(intent: Record, started: Record | None, outcome: Record, report: SandboxReport | None) -> Section:
    if report is None or started is None or started.code is None:
        return {"level": None}
    return {
        "level": report.level,
        "by": report.executor,
        "report": started.code.sandbox_digest,
        "network": _network(intent, outcome, report),
        "mechanisms": tuple(name for name, seen in sorted(report.enforced.items()) if seen),
        "missing": report.missing,
    }


def _network(intent: Record, outcome: Record, report: SandboxReport) -> str:
    """`none` only where the kernel showed a network namespace of its own, out of which nothing was opened."""
    if "netns" not in report.enforced:
        return "the host's"
    if outcome.detail.get("egress_index") is not None:
        return "through egressd"
    return "none" if intent.cell_id is None or LOCAL_ONLY in intent.labels else "that of its cell"


def _used(intent: Record, outcome: Record) -> Section:
    usage = outcome.usage or Usage()
    measured = {name: getattr(usage, name) for name in msgspec.structs.asdict(usage) if name != "basis"}
    return {
        **{name: value for name, value in measured.items() if value is not None},
        "apportioned": tuple(sorted(name for name, basis in usage.basis.items() if basis == "apportioned")),
        "limits": _limits(intent),
        "reserved": _budget(intent),
        "settled": _budget(outcome),
    }


def _budget(record: Record) -> str | None:
    budget = record.budget
    if budget is None:
        return None
    more = "".join(f", {told(unit, amount)}" for unit, amount in budget.amounts.items())
    return f"{budget.ops} ops, {budget.cpu_ms} ms of CPU{more}"


def _limits(intent: Record) -> tuple[str, ...]:
    """What bound it: each account that it was charged on."""
    limits = intent.budget.limits if intent.budget is not None else {}
    return tuple(
        f"{account}: {', '.join(told(unit, amount) for unit, amount in units.items())}"
        for account, units in limits.items()
    )


def _touched(intent: Record, outcome: Record, more: More) -> Section:
    return {
        "input": intent.input_hash,
        "artifacts": tuple(f"{ref.name} {ref.size_bytes} bytes {ref.digest}" for ref in outcome.artifacts),
        "result": outcome.result_digest,
        "network": outcome.detail.get("egress_index") is not None,
        "connections": _connections(more.connections),
        "activity": more.activity,
    }


def _connections(rows: Sequence[EgressConnection] | None) -> tuple[str, ...] | None:
    if rows is None:
        return None
    return tuple(
        f"{row.verdict} {row.host}:{row.port}"
        + (f" x{row.count}" if row.count > 1 else "")
        + (f" ({row.reason})" if row.reason else f", {row.sent_bytes} bytes out, {row.received_bytes} in")
        for row in rows
    )


def _end(outcome: Record) -> Section:
    ended = outcome.exit
    return {
        "state": outcome.state,
        "exit_code": ended.code if ended else None,
        "signal": ended.signal if ended else None,
        "reason": ended.reason if ended else None,
        "error": f"{outcome.error.message} [{outcome.error.code}]" if outcome.error else None,
        "started": outcome.started_at,
        "finished": outcome.finished_at,
    }


def _proof(receipt: Receipt, records: Sequence[Record]) -> Section:
    return {
        "log": receipt.origin,
        "records": tuple(record.log_index for record in records),
        "checkpoint_size": int(receipt.checkpoint.split("\n")[1]),
        "verify": f"aether receipt show {receipt.job_id} --json > receipt.json && "
        "aether verify receipt.json --key audit.pub",
    }
