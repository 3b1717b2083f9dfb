"""The authority's hold on networks: the order of the start, the records, what egressd's death costs. A real egressd
over a real link; the cells are doubles whose listener is a socket of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aether.backends.link import UnixLink, pair
from aether.contract.egresswire import EgressCall, EgressConnection, EgressPage
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.records import Record
from aether.egress.proxy import Outside
from aether.egress.secrets import Sources
from aether.egress.service import Egress
from aether.substrate.cells.drivers.memory import Run
from aether.substrate.egress import connection_detail, connection_of
from tests.support.egress import Names
from tests.support.onenode import OneNode, caller, command, running

NETWORK: dict[str, Any] = {"allow": ["a.test:80"]}


async def ask(run: Run) -> int:
    """One request to the proxy that the double's cell has; its port is found in the double's listener."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(PORTS[-1]))
    writer.write(b"GET http://b.test/ HTTP/1.1\r\nHost: b.test\r\n\r\n" * 3)
    await reader.read()
    writer.close()
    return 0


PORTS: list[int] = []


async def forever(run: Run) -> int:
    await run.terminated.wait()
    return 5


@contextlib.asynccontextmanager
async def connected(node: OneNode, egress: Egress) -> AsyncIterator[UnixLink]:
    """egressd's end of a link to the node's authority, while the block runs."""
    desk = node.parts.egress
    ours: list[UnixLink] = []
    theirs: list[UnixLink] = []
    theirs_made, ours_made = await pair(
        lambda side: UnixLink(side, egress.handlers(lambda: theirs[0]), egress.events(), on_close=egress.detach),
        lambda side: UnixLink(side, desk.verbs(lambda: ours[0]), desk.events(), on_close=desk.detach),
    )
    theirs.append(theirs_made)
    ours.append(ours_made)
    await egress.attach(theirs_made)
    try:
        yield theirs_made
    finally:
        theirs_made.close()
        await asyncio.sleep(0.01)


def egressd(directory: Path, node: OneNode) -> Egress:
    (directory / "secrets").mkdir(exist_ok=True)
    names = Names({"a.test": ["127.0.0.1"]})
    sources = Sources(node.layout.root, node.layout.secrets, {"AETHER_SECRET_X": "value-123"})
    import ssl

    outside = Outside(names.resolve, ssl.create_default_context())
    version = node.parts.gate.node.version
    return Egress(sources, outside, version, lambda: datetime.datetime.now(datetime.UTC))


Step = Callable[[OneNode, Egress], Awaitable[None]]


def with_node(directory: Path, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node and an egressd that is not connected yet; the port of each served listener is in PORTS."""
    from aether.egress.proxy import CellProxy

    attach = CellProxy.attach

    def noted(proxy: CellProxy, listener: Any) -> None:
        PORTS.append(listener.getsockname()[1])
        attach(proxy, listener)

    monkeypatch.setattr(CellProxy, "attach", noted)

    async def main() -> None:
        async with running(directory, {"ask": ask, "forever": forever}) as node:
            egress = egressd(directory, node)
            try:
                await step(node, egress)
            finally:
                await egress.close()

    asyncio.run(main())


async def kinds(node: OneNode) -> list[str]:
    return [record.type for record in await node.records() if record.job_id is not None]


def test_the_records_of_a_network_lie_between_start_and_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            job = await node.submit(command("ask", network=NETWORK), caller(), wait_ms=10_000)
            assert job.state is JobState.SUCCEEDED
            told = await kinds(node)
            wanted = ["job.intent", "egress.opened", "job.started", "egress.connection", "egress.closed", "job.outcome"]
            assert told == wanted
            outcome = (await node.records("job.outcome"))[0]
            closed = (await node.records("egress.closed"))[0]
            assert outcome.detail["egress_index"] == str(closed.log_index)
            page = await node.call("job.egress", caller(), EgressCall(job_id=job.job_id))
            assert isinstance(page, EgressPage) and page.next_cursor is None
            (row,) = page.connections
            assert (row.host, row.verdict, row.reason, row.count) == ("b.test", "refused", "not-allowed", 1)
            assert page.closed is not None and page.closed.refused == 1
            opened = (await node.records("egress.opened"))[0]
            assert b"a.test:80" in node.parts.book.log.document(opened.detail["network"])
            assert (await node.call("health", caller(), None)).roles[-1].facts["cells"] == 0

    with_node(tmp_path, step, monkeypatch)


def test_without_egressd_jobs_with_a_network_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        job = await node.submit(command("ask", network=NETWORK), caller(), wait_ms=500)
        assert job.state is JobState.QUEUED
        assert await kinds(node) == ["job.intent"]
        async with connected(node, egress):
            assert (await node.view(job.job_id, wait_ms=10_000)).state is JobState.SUCCEEDED

    with_node(tmp_path, step, monkeypatch)


def test_a_secret_that_cannot_be_had_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            asked = {"name": "x", "host": "a.test:443", "header": "X-Key", "source": "env:AETHER_SECRET_NONE"}
            network = {"credentials": [asked]}
            job = await node.submit(command("ask", network=network), caller(), wait_ms=10_000)
            assert job.error is not None and "cannot use credential x" in job.error.message
            assert await kinds(node) == ["job.intent", "job.outcome"]

    with_node(tmp_path, step, monkeypatch)


def test_a_new_egressd_serves_the_cells_of_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            job = await node.submit(command("forever", network=NETWORK), caller())
            async with asyncio.timeout(5):
                while node.parts.book.ledger.open[job.job_id].started is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        await egress.close()
        other = egressd(tmp_path, node)
        served = len(PORTS)
        async with connected(node, other):
            async with asyncio.timeout(5):
                while len(PORTS) == served:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert PORTS[-1] == PORTS[-2]
            await ask(None)  # type: ignore[arg-type]
            await node.parts.execution.abandon(node.parts.book.ledger.open[job.job_id], "the test is over")
            closed = (await node.records("egress.closed"))[0]
            assert closed.detail["connections"] == "1"
        await other.close()

    with_node(tmp_path, step, monkeypatch)


def test_cells_that_ended_meanwhile_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            job = await node.submit(command("forever", network=NETWORK), caller())
            async with asyncio.timeout(5):
                while node.parts.book.ledger.open[job.job_id].started is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        await node.parts.execution.abandon(node.parts.book.ledger.open[job.job_id], "the test is over")
        assert "unknown" in (await node.records("egress.closed"))[0].detail
        async with connected(node, egress):
            assert repr(egress) == "<Egress cells=0>"

    with_node(tmp_path, step, monkeypatch)


def test_local_only_inputs_keep_a_cell_off_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            with pytest.raises(AetherError) as caught:
                request = command("ask", network=NETWORK)
                labelled = type(request)(kind="command", op="run", params=request.params, labels=("local-only",))
                await node.submit(labelled, caller())
            assert caught.value.code == "POLICY_DENIED"

    with_node(tmp_path, step, monkeypatch)


def test_rows_and_records_say_the_same() -> None:
    row = EgressConnection(
        cell_id="cell_1", job_id="job_1", host="a.test", port=443, address="192.0.2.1", rule="*.test:443",
        verdict="failed", reason="tls", credential=None, sent_bytes=1 << 60, received_bytes=0, ms=7, count=3,
    )  # fmt: skip
    detail = connection_detail(row)
    assert "credential" not in detail and all(isinstance(value, str) for value in detail.values())
    record = Record(
        type="egress.connection", log_index=9, time="t", node_id="n", job_id="job_1", cell_id="cell_1", detail=detail
    )
    assert connection_of(record) == row


def test_descriptors_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            await node.submit(command("ask", network=NETWORK), caller(), wait_ms=10_000)
            await node.parts.execution.drain()
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(3):
                await node.submit(command("ask", network=NETWORK), caller(), wait_ms=10_000)
            await node.parts.execution.drain()
            await asyncio.sleep(0.05)
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1

    with_node(tmp_path, step, monkeypatch)
