"""One effect per Idempotency-Key, over every row of the operations table that changes something."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aether.api.operations import OPERATIONS
from aether.client.tickets import attenuate
from aether.contract import cellcalls as cc
from aether.contract import ticketcalls as wire
from aether.contract.allocations import CellRequest
from aether.contract.calls import Caller, Nothing, StopCall, UploadCall
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.images import ImportCall
from aether.contract.limits import IDEMPOTENCY_WINDOW_S, MIB
from aether.contract.records import Record
from aether.daemons.aetherd import KEYED
from aether.substrate.cells.drivers.memory import Run
from aether.substrate.repeats import OWN_WAY
from tests.support.onenode import STRANGER, OneNode, caller, command, running

CHANGING = sorted(operation.name for operation in OPERATIONS if operation.effect != "read")
Step = Callable[[OneNode], Awaitable[None]]


async def forever(run: Run) -> int:
    await asyncio.sleep(600)
    return 0


async def ok(run: Run) -> int:
    return 0


def on_node(directory: Path, step: Step) -> None:
    async def main() -> None:
        async with running(directory, {"forever": forever, "ok": ok}) as node:
            await step(node)

    asyncio.run(main())


class Said(msgspec.Struct, frozen=True):
    """What a stand-in answers."""

    number: int


class Asked(msgspec.Struct, frozen=True):
    """What it is asked."""

    what: str = "this"


THIS = Asked()


class Effect:
    """A handler that leaves a record of its operation and counts how often it was run."""

    def __init__(self, node: OneNode, operation: str) -> None:
        self.node, self.operation, self.runs = node, operation, 0
        self.fails: AetherError | None = None

    async def __call__(self, by: Caller, call: Any) -> Said:
        self.runs += 1
        number, book = self.runs, self.node.parts.book
        record = book.write(
            lambda index, now: Record(
                type="cell.put", log_index=index, time=now, node_id="node_x", operation=self.operation
            )
        )
        await book.durable(record)
        if self.fails is not None:
            raise self.fails
        return Said(number)

    async def by(self, who: Caller, call: Asked = THIS) -> Any:
        return await self.node.parts.repeats.once(self.operation, self, who, call)


async def code(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


def test_every_row_that_changes_something_takes_a_key_but_one_and_its_reason() -> None:
    assert sorted(KEYED.names) == [name for name in CHANGING if name != "job.attach"]


def test_a_row_that_tells_a_secret_says_so() -> None:
    secret = {"ticket", "private_key", "api_key"}
    for operation in OPERATIONS:
        told = secret & set(getattr(operation.reply, "__struct_fields__", ()))
        assert not (operation.keyed and told) or operation.tells_secret, (operation.name, told)


def test_repeated_calls_of_every_operation_are_done_once(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        for operation in sorted(KEYED.names - {OWN_WAY} - KEYED.secret):
            effect = Effect(node, operation)
            first = await effect.by(caller(key="k"))
            assert await effect.by(caller(key="k")) == first and effect.runs == 1, operation
            assert await code(effect.by(caller(key="k"), Asked("that"))) == "IDEMPOTENCY_CONFLICT", operation
            for other in (caller(key="other"), caller(STRANGER, key="k"), caller()):
                assert (await effect.by(other)).number == effect.runs, operation
            assert effect.runs == 4, operation

    on_node(tmp_path, step)


def test_after_a_restart_what_was_recorded_is_not_done_again(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        names = sorted(KEYED.names - {OWN_WAY})
        for operation in names:
            await Effect(node, operation).by(caller(key="k"))
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        for operation in names:
            effect = Effect(node, operation)
            refused = await code(effect.by(caller(key="k")))
            if operation not in node.parts.repeats._again:
                assert refused == "ANSWER_NOT_KEPT", operation
            assert effect.runs == 0, operation
            assert await code(effect.by(caller(key="k"), Asked("that"))) == "IDEMPOTENCY_CONFLICT", operation

    on_node(tmp_path, step)


def test_a_secret_answer_is_kept_nowhere(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        for operation in sorted(KEYED.secret):
            await Effect(node, operation).by(caller(key="k"))
        assert not node.parts.repeats._answers

    on_node(tmp_path, step)


def test_calls_at_once_are_one_call_and_a_refusal_leaves_no_key(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        effect = Effect(node, "cell.put")
        answers = await asyncio.gather(*(effect.by(caller(key="k")) for _ in range(20)))
        assert effect.runs == 1 and set(answers) == {Said(1)}
        wrong = caller(key="refused", ticket="aetk1_x")
        assert (await effect.by(wrong)).number == 2, "who cannot be told apart is the handler's to refuse"
        minted = await mint(node, caller())
        wide, narrow = (caller(key="t", ticket=text) for text in (minted, attenuate(minted, budget={"ops": 9})))
        assert (await effect.by(wide)) != (await effect.by(narrow)), "a key counts for one ticket"

    on_node(tmp_path, step)


def test_what_failed_after_its_record_is_done_again_only_where_that_is_harmless(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        harmless, other = Effect(node, "job.stop"), Effect(node, "job.signal")
        for effect in (harmless, other):
            effect.fails = AetherError("UNAVAILABLE", "cannot reach it")
            assert await code(effect.by(caller(key="k"))) == "UNAVAILABLE"
            effect.fails = None
        assert (await harmless.by(caller(key="k"))).number == 2
        assert (await harmless.by(caller(key="k"))).number == 2
        assert await code(other.by(caller(key="k"))) in ("BAD_ID", "NOT_FOUND") and other.runs == 1
        assert sum(record.idempotency_hash is not None for record in await node.records("cell.put")) == 2

    on_node(tmp_path, step)


def test_a_key_is_forgotten_after_its_window(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        effect, book = Effect(node, "cell.put"), node.parts.book
        await effect.by(caller(key="k"))
        real = book.now_ns
        book.now_ns = lambda: real() + (IDEMPOTENCY_WINDOW_S + 1) * 1_000_000_000
        assert (await effect.by(caller(key="k"))).number == 2

    on_node(tmp_path, step)


# ---- the real handlers


def body(data: bytes) -> dict[str, Any]:
    fd = os.memfd_create("body")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return {"fd": fd, "size_bytes": len(data), "media_type": "text/plain"}


async def mint(node: OneNode, by: Caller) -> str:
    minted = await node.call("ticket.mint", by, wire.MintCall(request=wire.MintRequest(role="user")))
    return str(minted.ticket)


async def running_job(node: OneNode) -> str:
    job_id = (await node.submit(command("forever", cell="agent"), caller())).job_id
    async with asyncio.timeout(5):
        while node.parts.book.ledger.open[job_id].started is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)
    return job_id


def test_the_real_handlers(tmp_path: Path) -> None:
    """Each is called three times under one key (the last after a restart), costs once, and records once."""

    async def step(node: OneNode) -> None:
        await node.call("cell.allocate", caller(), cc.AllocateCall(request=CellRequest(name="agent")))
        await node.call("cell.allocate", caller(), cc.AllocateCall(request=CellRequest(name="gone")))
        job_id, revoked = await running_job(node), await mint(node, caller())
        calls: dict[str, Callable[[str], Any]] = {
            "cell.allocate": lambda x: cc.AllocateCall(request=CellRequest(name=f"new{x}")),
            "cell.freeze": lambda x: cc.CellCall(cell=f"agent{x}"),
            "cell.thaw": lambda x: cc.CellCall(cell=f"agent{x}"),
            "cell.resize": lambda x: cc.ResizeCall(cell=f"agent{x}", limits=Limits(memory_bytes=64 * MIB)),
            "cell.put": lambda x: cc.PutCall(cell="agent", path="f", **body(b"data" + x.encode())),
            "cell.free": lambda x: cc.FreeCall(cell=f"gone{x}"),
            "job.signal": lambda x: cc.SignalCall(job_id=job_id, signal=10 + len(x)),
            "job.stop": lambda x: StopCall(job_id=job_id, grace_ms=len(x)),
            "ticket.mint": lambda x: wire.MintCall(request=wire.MintRequest(role=f"user{x}")),
            "ticket.revoke": lambda x: wire.RevokeCall(ticket=revoked + x),
            "ticket.rotate-key": lambda x: Nothing(),
            "artifact.put": lambda x: UploadCall(**body(b"data" + x.encode())),
        }
        answers: dict[str, Any] = {}
        for name, make in calls.items():
            answers[name] = await node.call(name, caller(key="k"), make(""))
            assert await node.call(name, caller(key="k"), make("")) == answers[name], name
            if name != "ticket.rotate-key":
                assert await code(node.call(name, caller(key="k"), make("x"))) == "IDEMPOTENCY_CONFLICT", name
        await node.view(job_id, wait_ms=5_000)
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        for name in sorted(calls.keys() - {"artifact.put"}):
            again = node.call(name, caller(key="k"), calls[name](""))
            if name in ("ticket.revoke", "ticket.rotate-key", "cell.put"):
                assert await code(again) == "ANSWER_NOT_KEPT", name
            else:
                same = ("cell_id", "job_id", "ticket")
                view = await again
                assert [getattr(view, field, None) for field in same] == [
                    getattr(answers[name], field, None) for field in same
                ], name
        for name in calls.keys() - {"artifact.put"}:
            written = [r for r in await node.records() if r.operation == name and r.idempotency_hash is not None]
            charged = [r.budget.ops for r in written if r.budget is not None]
            assert len(written) == 1 and sum(charged) <= 1, name

    on_node(tmp_path, step)


def test_a_refused_upload_leaves_nothing_open(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(3):
            assert await code(node.call("image.import", caller(key="k"), ImportCall(**body(b"no tar")))) == "BAD_IMAGE"
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208

    on_node(tmp_path, step)
