"""The network of allocated cells through the authority: the order of the records, and who may enter. The cells are
doubles, egressd is real."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aether.contract import caveats
from aether.contract import cellcalls as cc
from aether.contract.egresswire import CellEgressCall
from aether.contract.errors import AetherError
from aether.contract.network import Credential, Network
from aether.egress.service import Egress
from aether.substrate.access.access import Resource
from tests.support.onenode import OWNER, OneNode, caller, command
from tests.unit.substrate.test_cellhouse import allocate, refused
from tests.unit.substrate.test_egress import ask, connected, with_node

NETWORK = Network(allow=("a.test:80", "b.test:80"))


def narrow(node: OneNode, *said: caveats.Caveat) -> Any:
    principal = node.parts.gate.admit(caller(), "health", Resource(kind="node")).principal
    ticket, _ = node.parts.gate._access.mint("default", os.urandom(16), (caveats.role("user"), *said), principal)
    return caller(OWNER, ticket=ticket)


async def told(node: OneNode) -> list[str]:
    return [record.type for record in await node.records() if record.cell_id is not None and record.job_id is None]


def test_the_records_name_the_cell_and_end_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            cell = await allocate(node, "agent", network=NETWORK)
            await ask(None)  # type: ignore[arg-type]
            await node.call("cell.free", caller(), cc.FreeCall(cell="agent", grace_ms=0))
            kinds = await told(node)
            assert kinds[:3] == ["cell.allocated", "egress.opened", "cell.started"]
            assert kinds[-1] == "egress.closed" and kinds.count("cell.freed") == 1
            (opened,) = await node.records("egress.opened")
            assert (opened.cell_id, opened.job_id) == (cell.cell_id, None)
            assert opened.detail["allocated"] == str(cell.allocated_index)
            page = await node.call("cell.egress", caller(), CellEgressCall(cell=cell.cell_id))
            assert page.closed is not None and page.closed.connections == 1
            assert (await node.call("health", caller(), None)).roles[-1].facts["cells"] == 0

    with_node(tmp_path, step, monkeypatch)


def test_a_narrow_ticket_gains_nothing_by_entering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        async with connected(node, egress):
            few, enough = narrow(node, caveats.hosts("a.test")), narrow(node, caveats.hosts("a.test", "b.test"))
            assert await refused(allocate(node, "agent", few, network=NETWORK)) == "TICKET_DENIED"
            await allocate(node, "agent", enough, network=NETWORK)
            assert await refused(node.submit(command("ask", cell="agent"), few)) == "TICKET_DENIED"
            await node.submit(command("ask", cell="agent"), enough)

    with_node(tmp_path, step, monkeypatch)


def test_what_cannot_be_served_leaves_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def step(node: OneNode, egress: Egress) -> None:
        assert await refused(allocate(node, "agent", network=NETWORK)) == "UNAVAILABLE"
        async with connected(node, egress):
            asked = Credential(name="x", host="a.test:443", header="X-Key", source="env:AETHER_SECRET_NONE")
            with pytest.raises(AetherError, match="cannot use credential x"):
                await allocate(node, "agent", network=Network(credentials=(asked,)))
        assert await told(node) == ["cell.allocated", "cell.freed"] * 2

    with_node(tmp_path, step, monkeypatch)
