"""Every operation x every role x own and other tenant, through the real service, against reviewed expectations.

`permissions.json` says of each operation which roles may call it on what is their tenant's, and what a caller of
another tenant with the same role sees of it: `hidden` (as if it was not there), `own` (the call is about the caller's
tenant), `denied`. `python -m tests.security.test_permissions` writes it anew from what is: review the difference.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, get_origin, get_type_hints

import msgspec
import pytest

from aether.api.operation import Operation
from aether.api.operations import OPERATIONS
from aether.contract import caveats, ids
from aether.contract import cellcalls as cc
from aether.contract import ticketcalls as wire
from aether.contract.allocations import CellRequest
from aether.contract.budgetcalls import SetBudget, SetBudgetCall, SetQuota, SetQuotaCall, TopUp, TopUpCall
from aether.contract.calls import Caller, ExplainCall, SubmitCall
from aether.contract.errors import AetherError
from aether.contract.images import CommitCall
from aether.contract.jobs import CommandParams
from aether.substrate.access.identity import principal_of
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import OWNER, OneNode, caller, command, running

EXPECTED: Final = Path(__file__).with_name("permissions.json")
ROLES: Final = ("queen", "user", "node", "worker-heartbeat", "worker-gpu", "own-role", "nobody")
DENIED: Final = {"POLICY_DENIED", "TICKET_DENIED", "UNAUTHENTICATED", "BAD_TICKET"}
HIDDEN: Final = {"NOT_FOUND", "NO_SUCH_CELL"}
OTHER: Final = "elsewhere"
_SAMPLES: Final[dict[str, Any]] = {
    "signal": 15, "rows": 24, "columns": 80, "path": "f.txt", "media_type": "text/plain", "size_bytes": 0,
    "image": "none:1", "digest": "sha256:" + "0" * 64,
    "old_size": 1, "size": 1, "keep_ms": 366 * 24 * 3_600_000, "account": "0" * 32, "by": "kind",
    "subject": "tenant:default", "key_id": "0" * 16, "fingerprint": "0" * 64,
}  # fmt: skip


async def ok(run: Run) -> int:
    return 0


class World:
    """A node with a job, a cell and a ticket of the tenant `default`."""

    def __init__(self, node: OneNode) -> None:
        self.node = node
        self.subjects: dict[str, str] = {}

    async def prepare(self) -> None:
        job = await self.node.submit(command("ok"), caller(), 10_000)
        await self.node.call("cell.allocate", caller(), cc.AllocateCall(request=CellRequest(name="agent")))
        minted = await self.node.call("ticket.mint", caller(), wire.MintCall(request=wire.MintRequest(role="user")))
        self.subjects = {
            "job_id": job.job_id, "cell": "agent", "link_id": minted.link_id, "ticket": minted.ticket,
            "approval_id": ids.sibling(ids.APPROVAL, job.job_id),
        }  # fmt: skip

    def by(self, role: str, tenant: str) -> Caller:
        if role == "nobody":
            return Caller(uid=-1, gid=-1, pid=-1, credential=None, request_id=ids.new(ids.REQUEST))
        if (role, tenant) == ("queen", "default"):
            return caller()
        access = self.node.parts.gate._access
        text, _ = access.mint(tenant, os.urandom(16), (caveats.role(role),), principal_of(OWNER, tenant))
        return caller(ticket=text)

    def call(self, operation: Operation) -> Any:
        """A call with the least that its type asks for, about the subjects where it names one."""
        special = {
            "job.submit": lambda: SubmitCall(request=command("ok")),
            "cell.explain": lambda: ExplainCall(params=CommandParams(argv=("ok",))),
            "cell.allocate": lambda: cc.AllocateCall(request=CellRequest(name="another")),
            "cell.get": lambda: cc.FileCall(cell="agent", path="f.txt"),
            "image.commit": lambda: CommitCall(job_id=self.subjects["job_id"]),
            "budget.set": lambda: SetBudgetCall(request=SetBudget(tenant_id="default", limits={"ops": 1_000_000})),
            "budget.top-up": lambda: TopUpCall(request=TopUp(account="tenant:default", amounts={"ops": 1})),
            "quota.set": lambda: SetQuotaCall(request=SetQuota(subject="tenant:default", quotas={"open_jobs": 1_000})),
            "ticket.revoke": lambda: wire.RevokeCall(link_id=self.subjects["link_id"]),
        }
        return special[operation.name]() if operation.name in special else self._filled(operation.request)

    def _filled(self, kind: type) -> Any:
        types, fields = get_type_hints(kind), {}
        for name, parameter in inspect.signature(kind).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                continue
            if name == "fd":
                fields[name] = os.memfd_create("body")
            elif isinstance(types[name], type) and issubclass(types[name], msgspec.Struct):
                fields[name] = self._filled(types[name])
            else:
                empty = {tuple: (), dict: {}}.get(get_origin(types[name]), 1 if types[name] is int else "x")
                fields[name] = {**_SAMPLES, **self.subjects}.get(name, empty)
        return kind(**fields)

    async def outcome(self, operation: Operation, role: str, tenant: str) -> str:
        try:
            reply = await self.node.call(operation.name, self.by(role, tenant), self.call(operation))
        except AetherError as error:
            return error.code
        if hasattr(reply, "refuse"):
            reply.refuse()
        if hasattr(reply, "fd"):
            os.close(reply.fd)
        return "OK"


async def observed(directory: Path) -> dict[str, dict[str, Any]]:
    async with running(directory, {"ok": ok}) as node:
        world = World(node)
        await world.prepare()
        elsewhere = {o.name: {role: await world.outcome(o, role, OTHER) for role in ROLES} for o in OPERATIONS}
        here = {o.name: {role: await world.outcome(o, role, "default") for role in ROLES} for o in OPERATIONS}
    found = {}
    for name, outcomes in here.items():
        seen = {_seen(code) for code in elsewhere[name].values() if code not in DENIED} or {"denied"}
        allowed = [role for role in ROLES if outcomes[role] not in DENIED]
        found[name] = {"allowed": allowed, "other tenant": " ".join(sorted(seen))}
    return found


def _seen(code: str) -> str:
    return "hidden" if code in HIDDEN else "own"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return asyncio.run(observed(tmp_path_factory.mktemp("matrix")))


def test_the_reviewed_file_names_every_operation_and_no_other() -> None:
    assert set(json.loads(EXPECTED.read_text())) == {operation.name for operation in OPERATIONS}


@pytest.mark.parametrize("operation", [operation.name for operation in OPERATIONS])
def test_who_may(operation: str, matrix: dict[str, dict[str, Any]]) -> None:
    assert matrix[operation] == json.loads(EXPECTED.read_text())[operation]


def test_what_the_file_must_say() -> None:
    expected = json.loads(EXPECTED.read_text())
    subjects = ("{job_id}", "{cell}", "{link_id}", "{approval_id}")
    for operation in OPERATIONS:
        said = expected[operation.name]
        assert "nobody" not in said["allowed"], operation.name
        if operation.access == "open":
            assert set(said["allowed"]) == set(ROLES) - {"nobody"}, operation.name
        elif operation.effect != "read":
            assert not {"worker-heartbeat", "own-role"} & set(said["allowed"]), operation.name
        if any(subject in operation.path for subject in subjects):
            assert said["other tenant"] in ("hidden", "denied"), operation.name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        rows = asyncio.run(observed(Path(directory)))
    EXPECTED.write_text(
        "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()) + "\n}\n"
    )
    sys.stdout.write(f"wrote {EXPECTED.name}: {len(rows)} operations\n")
