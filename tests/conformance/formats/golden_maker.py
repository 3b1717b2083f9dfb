"""Writes what docs/formats.md describes, from fixed keys and times: the same bytes every time.

`python -m tests.conformance.formats.golden_maker` writes `schema/v1/` again: only after a deliberate change of the
formats.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from aether.contract import caveats
from aether.contract.canonical import canonical_record, digest_bytes
from aether.contract.cells import ExitStatus, SandboxReport, Usage
from aether.contract.clock import rfc3339
from aether.contract.errors import AetherError
from aether.contract.jobs import ArtifactRef
from aether.contract.limits import RECORD_BYTES_MAX
from aether.contract.records import BudgetRef, CodeRef, PolicyRef, Receipt, Record, TicketRef
from aether.contract.tickets import attenuate
from aether.substrate.access import tickets
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.note import Signer
from aether.substrate.audit.receipts import Receipts
from aether.substrate.audit.room import Bounds
from tests.conformance.formats import format_schemas

ROOT = Path(__file__).parents[3]
SCHEMA = ROOT / "schema/v1"
ORIGIN = "aether/node_01900000-0000-7000-8000-000000000001/1"
SIGNER = Signer(ORIGIN, bytes(range(32)))
SECRET = bytes(range(32, 64))
NODE = "node_01900000-0000-7000-8000-000000000001"
LINKS = ("00112233445566778899aabbccddeeff", "ffeeddccbbaa99887766554433221100")
POLICY_TEXT = b'@id("operator")\npermit (principal in Role::"queen", action, resource);\n'
OUTPUT = ArtifactRef(name="out/ü.txt", digest=digest_bytes(b"out"), size_bytes=3)
START_NS = 1_790_000_000_123_456_000
ENTRIES = 300
BOUNDS = Bounds(
    segment_bytes=4 * RECORD_BYTES_MAX, frame_bytes=2 * RECORD_BYTES_MAX, headroom_bytes=65_536, step_bytes=65_536
)


def time_of(index: int) -> str:
    return rfc3339(START_NS + index * 1_000_003_000)


def job_id(number: int) -> str:
    return f"job_01900000-0000-7000-8000-{number:012d}"


def base(record_type: str, index: int, **fields: Any) -> Record:
    return Record(type=record_type, log_index=index, time=time_of(index), node_id=NODE, **fields)  # type: ignore[arg-type]


def report(number: int) -> bytes:
    return canonical_record(
        SandboxReport(
            level="cell",
            executor="native",
            enforced={"pidns": "yes", "seccomp": "filter", "uid": 1_879_048_192 + number % 2},
            missing={"landlock": "the kernel has none"},
            uid=1_879_048_192 + number % 2,
        )
    )


def plan(number: int) -> bytes:
    return json.dumps({"operations": ["unshare", "mount", "exec"], "slot": number % 2}, separators=(",", ":")).encode()


def job_records(number: int, index: int) -> list[Record]:
    """A command job (intent, started, outcome) or, every third, a model job (intent, outcome)."""
    policy = PolicyRef(digest=digest_bytes(POLICY_TEXT), decision="allow", determining=("operator",))
    budget = BudgetRef(
        reservation_id=f"rsv_01900000-0000-7000-8000-{number:012d}", accounts=LINKS, ops=1, cpu_ms=0, settled=False
    )
    is_model = number % 3 == 0
    shared = {
        "tenant_id": "default",
        "principal": "uid:1000",
        "request_id": f"req-{number}",
        "job_id": job_id(number),
        "attempt": 1,
        "kind": "model" if is_model else "command",
        "op": "predict_next_state" if is_model else "run",
        "effect": "pure" if is_model else "cell",
        "model_id": "kinematics" if is_model else None,
        "model_version": "1.0.0" if is_model else None,
        "input_hash": digest_bytes(b"input %d" % number),
        "labels": ("local-only",) if number % 2 else (),
        "created_at": time_of(index),
    }
    intent = base(
        "job.intent",
        index,
        operation="job.submit",
        ticket=TicketRef(kid="e1", role="user", link_ids=LINKS, implicit=False),
        policy=policy,
        budget=budget,
        **shared,
    )
    code = CodeRef(
        plan_digest=digest_bytes(plan(number)), sandbox_digest=digest_bytes(report(number)), route="local", rung="cell"
    )
    detail = {"intent_index": str(index)}
    records = [intent]
    if is_model:
        code = CodeRef(model_digest=digest_bytes(b"model"), route="local", engine="cfcd")
    else:
        records.append(base("job.started", index + 1, code=code, cell_id=f"cell-{number}", **shared))
        detail["started_index"] = str(index + 1)
    failed = number % 5 == 0
    result = b'{"exit_code": %d}' % failed
    error = AetherError("JOB_FAILED", "cannot run näpfchen: exit 1\n\u2028", details={"exit_code": 1}).body()
    outcome = base(
        "job.outcome",
        index + len(records),
        code=code,
        budget=msgspec.structs.replace(budget, cpu_ms=12 + number, settled=True),
        state="failed" if failed else "succeeded",
        exit=ExitStatus(code=int(failed)),
        error=error if failed else None,
        usage=Usage(wall_us=15_000 + number, cpu_user_us=9_000, basis={"cpu_user_us": "measured"}),
        result_digest=digest_bytes(result),
        result_bytes=len(result),
        artifacts=(ArtifactRef(name="out/ü.txt", digest=digest_bytes(b"out"), size_bytes=3),)
        if number % 4 == 0
        else (),
        finished_at=time_of(index + len(records)),
        timings_us={"queue": 120, "run": 15_000},
        detail=detail,
        **shared,
    )
    return [*records, outcome]


def other_records() -> list[Record]:
    """One record of each type that jobs of the golden log do not have."""
    denied = AetherError("TICKET_DENIED", "cannot job.submit: the ticket's caveat kinds does not allow it")
    ticket = TicketRef(kid="e1", role="queen", link_ids=LINKS[:1], implicit=True)
    return [
        base("node.started", 0, detail={"origin": ORIGIN, "version": "0.1.0"}),
        base("policy.loaded", 1, policy=PolicyRef(digest=digest_bytes(POLICY_TEXT), decision="allow", determining=())),
        base("ticket.minted", 2, principal="uid:0", ticket=ticket, detail={"caveats": "role=queen"}),
        base("access.denied", 3, principal="uid:1001", operation="job.submit", kind="command", error=denied.body()),
        base("document.stored", 4, detail={"digest": digest_bytes(POLICY_TEXT)}),
        base("job.stop", 5, principal="uid:1000", operation="job.stop", effect="control", job_id=job_id(1), attempt=1),
        base("node.stopped", 6, detail={"reason": "asked"}),
    ]


CELL = "cell_01900000-0000-7000-8000-000000000001"


def added_records() -> list[Record]:
    """One record of each type that came after the golden log was written; the log itself stays as it is."""
    shared: dict[str, Any] = {"tenant_id": "default", "principal": "uid:1000", "cell_id": CELL}
    spec = {"name": "agent", "spec": digest_bytes(b"{}")}
    named = {"name": "agent"}
    talk: dict[str, Any] = {**shared, "job_id": job_id(1), "attempt": 1, "kind": "command", "op": "run"}
    code = CodeRef(
        plan_digest=digest_bytes(plan(1)), sandbox_digest=digest_bytes(report(1)), engine="cell", rung="cell"
    )
    put = {**named, "path": "in/ü.txt", "digest": digest_bytes(b"in"), "size_bytes": "2"}
    return [
        base("cell.allocated", 300, operation="cell.allocate", effect="cell", detail=spec, **shared),
        base("cell.started", 301, effect="cell", code=code, detail={**named, "host_uid": "1879049192"}, **shared),
        base("cell.put", 302, operation="cell.put", effect="control", detail=put, **shared),
        base("cell.frozen", 303, operation="cell.freeze", effect="control", detail=named, **shared),
        base("cell.thawed", 304, operation="cell.thaw", effect="control", detail=named, **shared),
        base("cell.resized", 305, operation="cell.resize", effect="control", detail=spec, **shared),
        base("job.signal", 306, operation="job.signal", effect="control", detail={"signal": "15"}, **talk),
        base("job.attach", 307, operation="job.attach", effect="control", detail={"stdio": "tty"}, **talk),
        base("cell.freed", 308, operation="cell.free", effect="control", detail={**named, "reason": "freed"}, **shared),
        base("cell.lost", 309, effect="control", detail={**named, "reason": "cell-died"}, **shared),
        *egress_records(talk),
        *image_records(),
        base("job.trace", 313, operation="job.trace", effect="control", detail={"duration_ms": "5000"}, **talk),
        base(
            "cell.trace", 314, operation="cell.trace", effect="control", detail={**named, "duration_ms": "50"}, **shared
        ),
        ticket_revoked(),
        *audit_records(),
        key_rotated(),
        *budget_records(talk),
        *approval_records(),
        *identity_records(),
    ]


def budget_records(talk: dict[str, Any]) -> list[Record]:
    """A tenant gets a budget and a quota, a link more than it had; a job comes to an end by its budget."""
    by: dict[str, Any] = {"tenant_id": "default", "principal": "uid:0", "effect": "control"}
    link = {"account": LINKS[0], "unit": "micro_usd"}
    raised = link | {"amount": "250000", "root_id": LINKS[0]}
    tenant = {"account": "tenant:default", "unit": "ops", "amount": "none"}
    quota = {"subject": "tenant:default", "quota": "open_jobs", "amount": "100"}
    charge = BudgetRef(
        reservation_id="rsv_1", accounts=LINKS, ops=1, cpu_ms=0, settled=True, amounts={"bytes_out": 9},
        limits={LINKS[0]: {"ops": 5}}, grants={"cpu_millis": 1000, "memory_bytes": 1 << 29}, expires_ms=1_790_000_000,
    )  # fmt: skip
    return [
        base("budget.set", 330, operation="budget.set", detail=tenant, **by),
        base("budget.raised", 331, operation="budget.top-up", budget=charge, detail=raised, **by),
        base("budget.exhausted", 332, detail=link | {"limit": "250000", "used": "250001"}, **talk),
        base("quota.set", 333, operation="quota.set", detail=quota, **by),
    ]


def audit_records() -> list[Record]:
    """What happens to the log itself."""
    shared: dict[str, Any] = {"tenant_id": "default", "principal": "uid:0", "effect": "control"}
    key = "aether/node_0190f6a2-7b3c-7def-8123-456789abcdef/2+00000000+" + "A" * 44
    before = {"digest": digest_bytes(b"note"), "previous_key": key, "previous_size": "320", "previous_root": "A" * 44}
    pruned = {"end": "256", "before": time_of(0)}
    return [
        base("audit.pruned", 321, operation="audit.retain", detail=pruned, **shared),
        base("audit.key-rotated", 323, operation="audit.rotate-key", detail={"key": key}, **shared),
        base("audit.epoch", 324, detail=before),
    ]


def identity_records() -> list[Record]:
    """An API key, an authority and its successor, a certificate, the file of issuers."""
    by: dict[str, Any] = {"tenant_id": "default", "principal": "uid:0", "effect": "control"}
    asked = TicketRef(kid="e1", role="queen", link_ids=LINKS[1:], implicit=True)
    kept = TicketRef(kid="kept", role="user", link_ids=LINKS[:1], implicit=False)
    said = {"block": "CgA", "by": LINKS[1], "caveats": "role=user; expires=1790000000000"}
    key = said | {"credential": "key:0123456789abcdef", "holder": "key:0123456789abcdef", "hash": "ab" * 32, "name": ""}
    authority = {"authority": "00112233445566aa", "trust_domain": "aether.internal", "certificate": "PEM"}
    leaf = {"authority": "00112233445566aa", "serial": "7f" * 16, "certificate": "MIIB"}
    leaf |= {"credential": "certificate:" + "cd" * 32, "holder": "spiffe://aether.internal/default/agent"}
    until = {"replaces": "00112233445566bb", "retires_at": time_of(340)}
    return [
        base("key.created", 340, operation="key.create", ticket=kept, detail=key, **by),
        base("pki.created", 341, operation="pki.init", ticket=asked, detail=authority, **by),
        base("pki.rotated", 342, operation="pki.rotate", ticket=asked, detail=authority | until, **by),
        base("pki.issued", 343, operation="pki.issue", ticket=kept, detail=said | leaf, **by),
        base("issuers.loaded", 344, detail={"digest": digest_bytes(b"{}")}),
    ]


def ticket_revoked() -> Record:
    """A link that its minter revoked."""
    detail = {"link_id": LINKS[1], "root_id": LINKS[1]}
    ticket = TicketRef(kid="e1", role="user", link_ids=LINKS[:1], implicit=True)
    shared: dict[str, Any] = {"tenant_id": "default", "principal": "uid:1000", "effect": "control", "detail": detail}
    return base("ticket.revoked", 317, operation="ticket.revoke", ticket=ticket, **shared)


def approval_records() -> list[Record]:
    """A job that waited: asked for by an agent, approved by the operator; others were denied, or nobody decided."""
    said = {"approval": job_id(9).replace("job", "approval")}
    ticket = TicketRef(kid="e1", role="agent", link_ids=LINKS, implicit=False)
    demand = PolicyRef(digest=digest_bytes(POLICY_TEXT), decision="deny", determining=("agents-ask",))
    job: dict[str, Any] = {"tenant_id": "default", "job_id": job_id(9), "attempt": 1, "kind": "command", "op": "run"}
    job |= {"effect": "control", "input_hash": digest_bytes(b"input 9"), "created_at": time_of(319)}
    asked: dict[str, Any] = {"principal": "uid:1001", "operation": "job.submit", "ticket": ticket, "policy": demand}
    until = {"expires_at": time_of(3_919), "hosts": "pypi.org:443"}
    queen = TicketRef(kid="e1", role="queen", link_ids=LINKS[:1], implicit=True)
    leave = PolicyRef(digest=digest_bytes(POLICY_TEXT), decision="allow", determining=("operator",))
    by: dict[str, Any] = {"principal": "uid:1000", "ticket": queen, "policy": leave}
    decided = {**said, "requested_index": "319", "reason": "seen"}
    return [
        base("approval.requested", 319, **job, **asked, detail={**said, **until}),
        base("approval.granted", 320, **job, **by, operation="approval.approve", detail=decided),
        base("approval.denied", 321, **job, **by, operation="approval.deny", detail=decided),
        base("approval.expired", 322, **job, detail={**said, "requested_index": "319"}),
    ]


def key_rotated() -> Record:
    """Another key to mint tickets with."""
    ticket = TicketRef(kid="implicit", role="queen", link_ids=LINKS[:1], implicit=True)
    shared: dict[str, Any] = {"tenant_id": "default", "principal": "uid:1000", "effect": "control"}
    detail = {"epoch": "2", "kid": "e2"}
    return base("ticket.key-rotated", 318, operation="ticket.rotate-key", ticket=ticket, detail=detail, **shared)


def image_records() -> list[Record]:
    """An image that came under a name, and went."""
    detail = {"image": digest_bytes(b"manifest"), "name": "tools:1", "size_bytes": "9007199254740993"}
    shared: dict[str, Any] = {"tenant_id": "default", "principal": "uid:1000", "effect": "control", "detail": detail}
    return [
        base("image.imported", 315, operation="image.import", **shared),
        base("image.removed", 316, operation="image.remove", **shared),
    ]


def egress_records(job: dict[str, Any]) -> list[Record]:
    """What a job's network leaves behind, each naming the one before."""
    network = {"network": digest_bytes(b'{"allow":["*.example.org:443"]}')}
    row = {
        "host": "api.example.org", "port": "443", "address": "192.0.2.7", "rule": "*.example.org:443",
        "verdict": "allowed", "credential": "api", "sent_bytes": "517", "received_bytes": "9007199254740993",
        "ms": "12", "count": "2", "previous": "310",
    }  # fmt: skip
    sums = {"connections": "2", "refused": "0", "sent_bytes": "517", "received_bytes": "9007199254740993"}
    return [
        base("egress.opened", 310, effect="cell", detail=network, **job),
        base("egress.connection", 311, effect="cell", detail=row, **job),
        base("egress.closed", 312, effect="cell", detail={**sums, "unlisted": "0", "previous": "311"}, **job),
    ]


def make_records() -> list[Record]:
    """The golden log's records in order."""
    records = other_records()
    number = 1
    while len(records) < ENTRIES:
        records += job_records(number, len(records))
        number += 1
    return records


async def write_log(directory: Path, records: list[Record]) -> Receipt:
    """Writes a log of `records` and returns the receipt of its first job."""
    errors: list[BaseException] = []
    log = AuditLog.open(directory, SIGNER, ORIGIN, now_ns=lambda: 0, on_fatal=errors.append, bounds=BOUNDS)
    log.store_document(POLICY_TEXT)
    for number in (0, 1):
        log.store_document(plan(number))
        log.store_document(report(number))
    for record in records:
        # one frame each, whatever the machine's timing
        await log.durable(log.append(lambda index, record=record: record))  # type: ignore[misc]
    outcome = next(record for record in records if record.type == "job.outcome")
    receipt = Receipts(log, SIGNER).build(outcome.job_id or "", outcome)
    log.close()
    assert not errors
    for path in (directory / "segments").glob("spare-*"):
        path.unlink()
    (directory / "lock").unlink()
    return receipt


def make_ticket() -> dict[str, Any]:
    """A ticket with its key and one narrowed by its holder."""
    authority = tickets.Tickets({"e1": SECRET}, "e1")
    minted = authority.mint("default", bytes(16), (caveats.role("user"), caveats.budget("ops", 10)))
    said = (caveats.operations("job.*"), caveats.kinds("command"), caveats.expires(1_800_000_000_000))
    narrowed = attenuate(minted, said)
    verified = authority.verify(narrowed)
    return {
        "secret_hex": SECRET.hex(),
        "kid": verified.kid,
        "tenant": verified.tenant,
        "minted": minted,
        "narrowed": narrowed,
        "link_ids": list(verified.link_ids),
        "caveats": [[str(caveat) for caveat in link] for link in verified.links],
    }


def write_samples(target: Path, records: list[Record], receipt: Receipt) -> None:
    """Records and receipts that the schemas accept (`ok-`) and refuse (`bad-`)."""
    record = msgspec.to_builtins(next(record for record in records if record.type == "job.outcome"))
    whole = msgspec.json.decode(msgspec.json.encode(receipt))
    budget = {"type": "budget", "items": ["ops"], "number": 10}
    good = {"record/ok-outcome": record, "receipt/ok": whole, "caveat/ok-budget": budget}
    moved = {"amounts": {"bytes_in": 7, "micro_usd": 1}, "limits": {LINKS[0]: {"ops": 5}}, "grants": {"cpu_millis": 1}}
    good["record/ok-budget"] = record | {"budget": record["budget"] | moved | {"expires_ms": 1}}
    policy = {"decision": "allow", "determining": ["operator"], "digest": digest_bytes(POLICY_TEXT)}
    question = {"operation": "job.submit", "roles": ["user"], "principal_kind": "user", "kind": "command"}
    question |= {"principal_tenant": "default", "op": "run"}
    asked = policy | {"question": question | {"hosts": ["a.test:443"], "raises": True}, "shadow": policy}
    good["record/ok-policy"] = record | {"policy": asked}
    bad = {
        "record/bad-question": record | {"policy": asked | {"question": question | {"hosts": "a.test"}}},
        "record/bad-missing-field": {name: value for name, value in record.items() if name != "policy"},
        "record/bad-unknown-field": record | {"colour": "red"},
        "record/bad-type": record | {"type": "job.dreamt"},
        "record/bad-index-text": record | {"log_index": "7"},
        "record/bad-float": record | {"result_bytes": 1.5},
        "record/bad-null-labels": record | {"labels": None},
        "record/bad-nested-field": record | {"budget": record["budget"] | {"usd": 1}},
        "record/bad-budget-amount": record | {"budget": record["budget"] | {"amounts": {"tokens": 0.5}}},
        "receipt/bad-missing-checkpoint": {name: value for name, value in whole.items() if name != "checkpoint"},
        "receipt/bad-entry-object": whole | {"entries": [whole["entries"][0] | {"entry": {}}]},
        "receipt/bad-unknown-field": whole | {"comment": ""},
        "caveat/bad-type": budget | {"type": "mercy"},
        "caveat/bad-items": budget | {"items": "ops"},
        "caveat/bad-field": budget | {"unit": "ops"},
    }
    for name, value in (good | bad).items():
        path = target / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_golden(target: Path) -> None:
    """Writes all golden files below `target`."""
    records = make_records()
    (target / "records").mkdir(parents=True)
    for record in (*records, *added_records()):
        path = target / f"records/{record.type}.json"
        if not path.exists():
            path.write_bytes(canonical_record(record))
    receipt = asyncio.run(write_log(target / "log", records))
    (target / "receipt.json").write_bytes(canonical_record(receipt))
    write_samples(target / "samples", records, receipt)
    (target / "audit.pub").write_text(f"{SIGNER.verifier}\n")
    (target / "ticket.json").write_text(json.dumps(make_ticket(), indent=1) + "\n")


def write_all(target: Path) -> None:
    """Replaces the golden files and the JSON Schemas in `target`."""
    with tempfile.TemporaryDirectory(prefix="aether-golden-") as scratch:
        write_golden(Path(scratch) / "golden")
        shutil.rmtree(target / "golden", ignore_errors=True)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path(scratch) / "golden", target / "golden")
    for path in (target / "golden").rglob("*"):
        # the log's own modes keep others out; these files are for everybody
        path.chmod(0o755 if path.is_dir() else 0o644)
    for name, text in format_schemas.texts().items():
        (target / name).write_text(text)


if __name__ == "__main__":
    write_all(SCHEMA)
