"""Reading the log: what a search finds is what looking at every record finds; who sees what; cursors while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aether.contract import caveats, ids
from aether.contract.allocations import CellRequest
from aether.contract.auditcalls import AuditExport, AuditPage, AuditQuery, AuditTail
from aether.contract.calls import Caller, StreamReply
from aether.contract.cellcalls import AllocateCall
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.records import Record
from aether.substrate import auditreading
from aether.substrate.audit.export_rules import check_export
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import OWNER, STRANGER, OneNode, caller, command, running

ALICE, BOB = caller(STRANGER), caller(STRANGER + 1)


async def write(run: Run) -> int:
    run.files["out.txt"] = b"mine"
    return 0


PROGRAMS = {"write": write}


async def query(node: OneNode, by: Caller, **fields: Any) -> AuditPage:
    page = await node.call("audit.query", by, AuditQuery(**fields))
    assert isinstance(page, AuditPage)
    return page


async def every(node: OneNode, by: Caller, **fields: Any) -> list[Record]:
    """All pages."""
    found: list[Record] = []
    cursor = None
    while True:
        page = await query(node, by, cursor=cursor, **fields)
        found += page.records
        cursor = page.next_cursor
        if cursor is None:
            return found


async def lines(node: OneNode, operation: str, by: Caller, body: Any) -> list[bytes]:
    reply = await node.call(operation, by, body)
    assert isinstance(reply, StreamReply)
    return b"".join([chunk async for chunk in reply.chunks]).splitlines(keepends=True)


async def code_of(node: OneNode, by: Caller, operation: str, body: Any) -> str:
    with pytest.raises(AetherError) as caught:
        await node.call(operation, by, body)
    return caught.value.code


def on_a_node(tmp_path: Path, main: Callable[[OneNode], Any]) -> None:
    async def run() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            await query(node, caller())  # the operator's ticket is minted: one record
            await main(node)

    asyncio.run(run())


def fake(index: int, time: str, seed: int) -> Record:
    """A record of few values, so that filters meet."""
    return Record(
        type=TYPES[seed % 3],  # type: ignore[arg-type]
        log_index=index,
        time=time,
        node_id="node_0190f6a2-7b3c-7def-8123-456789abcdef",
        tenant_id=(None, "default", "uid-7")[seed // 3 % 3],
        principal=(None, "uid:7", 'uid:"8')[seed // 9 % 3],
        cell_id=(None, CELLS[0], CELLS[1])[seed // 27 % 3],
        detail={"says": f'"type":"policy.loaded","principal":"uid:7" {CELLS[seed % 2]}'},
    )


CELLS = [f"cell_0190f6a2-7b3c-7def-8123-45678900000{n}" for n in (1, 2)]
TYPES = ("policy.loaded", "document.stored", "access.denied")


def test_a_search_finds_what_looking_at_every_record_finds(tmp_path: Path) -> None:
    """Over 600 records: three bundles, the last of them not full."""
    filters = st.fixed_dictionaries(
        {},
        optional={
            "type": st.lists(st.sampled_from(TYPES), max_size=2, unique=True).map(tuple),
            "principal": st.sampled_from(["uid:7", 'uid:"8', "node"]),
            "tenant": st.sampled_from(["default", "uid-7"]),
            "cell": st.sampled_from(CELLS),
            "start": st.integers(0, 700),
            "end": st.integers(0, 700),
            "order": st.sampled_from(["newest", "oldest"]),
            "limit": st.integers(1, 500),
        },
    )

    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            await query(node, caller())  # the operator's ticket is minted: one record
            log = node.parts.book.log
            while log.size < 600:
                seed = log.size * 7919 % 81
                node.parts.book.write(
                    lambda index, now, seed=seed: fake(index, f"2026-11-21T02:10:00.{index:06d}Z", seed)
                )  # type: ignore[misc]
            records = await node.records()
            loop = asyncio.get_running_loop()

            def naive(wanted: dict[str, Any]) -> list[Record]:
                end = wanted.get("end", len(records))
                found = [
                    r
                    for r in records[wanted.get("start", 0) : end]
                    if (not wanted.get("type") or r.type in wanted["type"])
                    and wanted.get("principal") in (None, r.principal)
                    and wanted.get("tenant") in (None, r.tenant_id)
                    and wanted.get("cell") in (None, r.cell_id)
                ]
                return found if wanted.get("order") == "oldest" else found[::-1]

            @given(filters)
            @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
            def hold(wanted: dict[str, Any]) -> None:
                found = asyncio.run_coroutine_threadsafe(every(node, caller(), **wanted), loop).result(30)
                assert found == naive(wanted)

            await asyncio.to_thread(hold)

    asyncio.run(main())


def test_pages_are_bounded_and_say_where_to_go_on(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        log = node.parts.book.log
        while log.size < 900:
            node.parts.book.write(lambda index, now: fake(index, "2026-11-21T02:10:00.000000Z", index))
        await node.records()
        with mock.patch.object(auditreading, "AUDIT_SEARCH_RECORDS_MAX", 256):
            page = await query(node, caller(), principal="nobody")
            assert page.records == () and page.next_cursor is not None and 256 <= page.searched < 512
            assert await every(node, caller(), principal="nobody") == []
            assert len(await every(node, caller(), type=("access.denied",), limit=7)) > 200
        with mock.patch.object(auditreading, "AUDIT_PAGE_BYTES_MAX", 5_000):
            small = await query(node, caller(), limit=500)
            assert 1 < len(small.records) < 20 and small.next_cursor == small.records[-1].log_index
            assert len(await every(node, caller(), limit=500)) == 900

    on_a_node(tmp_path, main)


@pytest.mark.parametrize("order", ["newest", "oldest"])
def test_cursors_neither_skip_nor_repeat_while_the_log_grows(tmp_path: Path, order: str) -> None:
    async def main(node: OneNode) -> None:
        log = node.parts.book.log

        def grow(count: int) -> None:
            for _ in range(count):
                node.parts.book.write(lambda index, now: fake(index, "2026-11-21T02:10:00.000000Z", 0))

        grow(300)
        await node.records()
        size = log.durable_size
        seen: list[int] = []
        cursor = None
        for _ in range(1_000):
            page = await query(node, caller(), cursor=cursor, order=order, limit=13)
            seen += [record.log_index for record in page.records]
            cursor = page.next_cursor
            if cursor is None or cursor >= 600:
                break
            if log.size < 580:
                grow(17)
                await node.records()
        if order == "newest":
            assert seen == list(range(size))[::-1]
        else:
            assert seen == list(range(len(seen))) and len(seen) >= size

    on_a_node(tmp_path, main)


def test_a_job_is_found_between_its_intent_and_its_outcome(tmp_path: Path) -> None:
    """Few records are looked at, however long the log is."""

    async def main(node: OneNode) -> None:
        first = await node.submit(command("write"), ALICE, 5_000)
        assert first.state is JobState.SUCCEEDED
        for _ in range(40):
            await node.submit(command("write"), BOB, 5_000)
        for by in (ALICE, caller()):
            page = await query(node, by, job_id=first.job_id, order="oldest")
            assert [record.type for record in page.records] == ["job.intent", "job.started", "job.outcome"]
            assert page.searched < 10 and page.next_cursor is None
        assert (await query(node, BOB, job_id=first.job_id)).records == ()

    on_a_node(tmp_path, main)


def test_each_tenant_sees_its_own_and_the_operator_all(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        await node.submit(command("write"), ALICE, 5_000)
        await node.submit(command("write"), BOB, 5_000)
        with pytest.raises(AetherError):
            await node.submit(command("write", network={"allow": ["learn"]}), ALICE)
        all_records = await node.records()
        mine, theirs = await every(node, ALICE), await every(node, BOB)
        assert {record.principal for record in mine} == {f"uid:{STRANGER}"}
        assert {record.tenant_id for record in theirs} == {f"uid-{STRANGER + 1}"}
        assert [r.log_index for r in await every(node, caller())] == [r.log_index for r in all_records][::-1]
        for by, seen in ((ALICE, mine), (BOB, theirs)):
            tailed = await lines(node, "audit.tail", by, AuditTail(cursor=0))
            assert [msgspec.json.decode(line)["log_index"] for line in tailed] == [r.log_index for r in seen][::-1]
            exported = await lines(node, "audit.export", by, AuditExport())
            assert len([line for line in exported if line.startswith(b'{"entry"')]) == len(seen)
        assert await every(node, ALICE, tenant=f"uid-{STRANGER + 1}") == []
        assert await every(node, ALICE, principal="node") == []

    on_a_node(tmp_path, main)


def test_refusals_are_seen_by_who_caused_them_but_not_through_a_ticket(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        access = node.parts.gate._access
        for uid in (STRANGER, STRANGER + 1):
            with pytest.raises(AetherError):
                node.parts.gate.admit(caller(uid), "policy.load", auditreading.Resource(kind="policy"))
        await node.records()
        denied = await every(node, ALICE, type=("access.denied",))
        assert [record.principal for record in denied] == [f"uid:{STRANGER}"]
        principal = access._implicit.of(STRANGER).principal
        text, _ = access.mint(principal.tenant_id, b"n" * 16, (caveats.role("user"),), principal)
        assert await every(node, caller(STRANGER, ticket=text), type=("access.denied",)) == []
        assert await every(node, caller(STRANGER, ticket=text)) != []

    on_a_node(tmp_path, main)


def test_a_narrow_ticket_sees_less(tmp_path: Path) -> None:
    """Of the owner's uid: a ticket for some operations does not inspect, one for cells must name one."""

    async def main(node: OneNode) -> None:
        access = node.parts.gate._access
        principal = access._implicit.of(OWNER).principal
        await node.submit(command("write"), ALICE, 5_000)
        job = await node.submit(command("write"), caller(), 5_000)

        def ticket(*said: caveats.Caveat) -> Caller:
            return caller(
                ticket=access.mint(principal.tenant_id, b"n" * 16, (caveats.role("queen"), *said), principal)[0]
            )

        reader = ticket(caveats.operations("audit.query"))
        assert {record.tenant_id for record in await every(node, reader)} == {"default"}
        assert await code_of(node, reader, "audit.export", AuditExport()) == "TICKET_DENIED"
        celled = ticket(caveats.cells("agent*"))
        assert await code_of(node, celled, "audit.query", AuditQuery()) == "TICKET_DENIED"
        assert await code_of(node, celled, "audit.tail", AuditTail()) == "TICKET_DENIED"
        assert await code_of(node, celled, "audit.query", AuditQuery(cell="other")) == "NO_SUCH_CELL"
        assert await code_of(node, celled, "audit.query", AuditQuery(job_id=ids.new(ids.JOB))) == "NOT_FOUND"
        assert len((await query(node, celled, job_id=job.job_id)).records) == 3
        cell = await node.call("cell.allocate", caller(), AllocateCall(request=CellRequest(name="agent1")))
        for name in (cell.name, cell.cell_id):
            found = await every(node, celled, cell=name)
            assert {record.cell_id for record in found} == {cell.cell_id} and len(found) >= 2
        other = await node.call("cell.allocate", caller(), AllocateCall(request=CellRequest(name="other")))
        assert await code_of(node, celled, "audit.query", AuditQuery(cell=other.cell_id)) == "NO_SUCH_CELL"

    on_a_node(tmp_path, main)


def test_tail_follows_filters_and_ends_with_the_ticket(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        access = node.parts.gate._access
        principal = access._implicit.of(STRANGER).principal
        text, minted = access.mint(principal.tenant_id, b"n" * 16, (caveats.role("user"),), principal)
        held = caller(STRANGER, ticket=text)
        reply = await node.call("audit.tail", held, AuditTail(type=("job.outcome",), follow=True))
        received: list[bytes] = []

        async def read() -> None:
            async for chunk in reply.chunks:
                received.append(chunk)

        reading = asyncio.ensure_future(read())
        jobs = [await node.submit(command("write"), ALICE, 5_000) for _ in range(3)]
        await node.submit(command("write"), BOB, 5_000)
        async with asyncio.timeout(5):
            while b"".join(received).count(b"\n") < 3:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        rows = [msgspec.json.decode(line, type=Record) for line in b"".join(received).splitlines()]
        assert [(row.type, row.job_id) for row in rows] == [("job.outcome", job.job_id) for job in jobs]
        assert b"".join(received).splitlines()[0] == node.parts.book.log.entry(rows[0].log_index)
        node.parts.book.ledger.tickets.revoked.add(minted.ticket.link_ids[0])
        await node.submit(command("write"), ALICE, 5_000)
        async with asyncio.timeout(5):
            with pytest.raises(AetherError) as ended:
                await reading
        assert ended.value.code == "TICKET_REVOKED"
        assert b"".join(received).count(b"\n") == 3
        assert await code_of(node, ALICE, "audit.tail", AuditTail(cursor=1 << 40)) == "BAD_FIELD"

    on_a_node(tmp_path, main)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"since": "yesterday"}, "BAD_FIELD"),
        ({"until": "2026-13-41T00:00:00.000000Z"}, "BAD_FIELD"),
        ({"ticket": "../../etc"}, "BAD_FIELD"),
        ({"start": -1}, "BAD_FIELD"),
        ({"end": -1}, "BAD_FIELD"),
        ({"job_id": "job_1"}, "BAD_ID"),
        ({"cell": "cell_1"}, "BAD_ID"),
        ({"cell": "nowhere"}, "NO_SUCH_CELL"),
    ],
)
def test_bad_filters_are_refused(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    async def main(node: OneNode) -> None:
        assert await code_of(node, caller(), "audit.query", AuditQuery(**fields)) == code

    on_a_node(tmp_path, main)


def test_times_and_links(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        jobs = [await node.submit(command("write"), ALICE, 5_000) for _ in range(3)]
        records = await node.records("job.intent")
        since, until = records[1].time, records[2].time
        found = await every(node, caller(), since=since, until=until, type=("job.intent",))
        assert [record.job_id for record in found] == [jobs[1].job_id]
        assert records[0].ticket is not None
        linked = await every(node, caller(), ticket=records[0].ticket.link_ids[-1], order="oldest")
        assert {record.type for record in linked} == {"ticket.minted", "job.intent"} and len(linked) == 4
        assert await every(node, caller(), ticket="0" * 32) == []

    on_a_node(tmp_path, main)


def test_exports_verify_and_every_change_shows(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        job = await node.submit(command("write"), ALICE, 5_000)
        key = (node.layout.audit_public_key).read_text()
        await node.records()
        whole = await lines(node, "audit.export", caller(), AuditExport())
        report = check_export(whole, key)
        assert report.ok and report.facts["complete"] == "yes", report.problems
        part = await lines(node, "audit.export", ALICE, AuditExport(job_id=job.job_id))
        report = check_export(part, key)
        assert report.ok and report.facts["complete"] == "no" and report.facts["entries"] == 3
        assert report.facts["documents"] == 3
        assert not check_export(whole[:-1], key).ok
        assert not check_export(whole[1:], key).ok
        for number, line in enumerate(whole):
            without = whole[:number] + whole[number + 1 :]
            assert not check_export(without, key).ok, line[:60]
            assert not check_export([*whole[: number + 1], *whole[number:]], key).ok, line[:60]
            for at in range(2, len(line) - 2, max(1, len(line) // 9)):
                changed = bytearray(line)
                changed[at] ^= 1
                assert not check_export([*whole[:number], bytes(changed), *whole[number + 1 :]], key).ok, (
                    line[:60],
                    at,
                )

    on_a_node(tmp_path, main)


def test_a_changed_bundle_is_noticed(tmp_path: Path) -> None:
    async def main(node: OneNode) -> None:
        log = node.parts.book.log
        while log.size < 300:
            node.parts.book.write(lambda index, now: fake(index, "2026-11-21T02:10:00.000000Z", 1))
        await node.records()
        path = node.layout.audit / "tile/entries/000"
        async with asyncio.timeout(5):
            while not path.exists():  # noqa: ASYNC110 - the writer tells nobody
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        path.chmod(0o600)
        path.write_bytes(path.read_bytes().replace(b"document.stored", b"document.Stored"))
        assert await code_of(node, caller(), "audit.query", AuditQuery(end=200)) == "LOG_CORRUPT"

    on_a_node(tmp_path, main)
