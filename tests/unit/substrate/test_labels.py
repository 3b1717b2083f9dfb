"""Labels: they flow from inputs into jobs, cells and what those leave, before the policy is asked; nobody drops one."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract import limits
from aether.contract.allocations import CellRequest
from aether.contract.calls import Caller, ListArtifactsCall, UploadCall
from aether.contract.cellcalls import AllocateCall, CellCall, PutCall
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.labels import LOCAL_ONLY, check_stays, union
from aether.contract.ticketcalls import MintCall, MintRequest
from aether.contract.wire import ArtifactInfo, CellLaunch
from aether.substrate.cells.drivers.memory import Program, Run
from aether.substrate.execution import check_labels_of
from tests.support.onenode import OneNode, caller, command, running

SEEN: list[tuple[str, ...]] = []
NETWORK = {"allow": ["pypi.org:443"]}


async def copy(run: Run) -> int:
    SEEN.append(run.spec.labels)
    run.files["out.txt"] = b"derived of " + run.files.get("in.txt", b"nothing")
    return 0


PROGRAMS: dict[str, Program] = {"copy": copy}


def on_node(directory: Path, step: Callable[[OneNode], Awaitable[None]]) -> None:
    SEEN.clear()

    async def main() -> None:
        async with running(directory, PROGRAMS) as node:
            await step(node)

    asyncio.run(main())


def spooled(data: bytes) -> int:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        return os.dup(file.fileno())


async def put(node: OneNode, data: bytes, *labels: str, by: Caller | None = None) -> str:
    call = UploadCall(fd=spooled(data), size_bytes=len(data), media_type="text/plain", labels=labels)
    info: ArtifactInfo = await node.call("artifact.put", by or caller(), call)
    return info.digest


def reads(*digests: str, labels: tuple[str, ...] = (), **params: Any) -> JobRequest:
    names = ["in.txt", *(f"in{n}.txt" for n in range(len(digests)))]
    files = [{"path": name, "artifact": digest} for name, digest in zip(names, digests, strict=False)]
    params = {"argv": ["copy"], "outputs": ["out.txt"], **params}
    return JobRequest(kind="command", op="run", params=params, inputs={"files": files}, labels=labels)


async def done(node: OneNode, request: JobRequest, by: Caller | None = None) -> JobView:
    view = await node.submit(request, by or caller(), 5_000)
    assert view.state is JobState.SUCCEEDED, view.error
    return view


async def refused(work: Awaitable[Any]) -> AetherError:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value


async def labels_of(node: OneNode, job: JobView) -> tuple[str, ...]:
    page = await node.call("artifact.list", caller(), ListArtifactsCall(job_id=job.job_id))
    (info,) = page.artifacts
    labels: tuple[str, ...] = info.labels
    return labels


def test_what_a_job_leaves_carries_its_labels_and_those_of_all_its_inputs(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        one, two = await put(node, b"one", "customer"), await put(node, b"two", "q3", "raw")
        job = await done(node, reads(one, two, labels=("mine",)))
        assert job.labels == ("customer", "mine", "q3", "raw") and [job.labels] == SEEN
        assert await labels_of(node, job) == job.labels
        (intent,) = (r for r in await node.records("job.intent") if r.job_id == job.job_id)
        assert intent.labels == job.labels
        further = await done(node, reads(job.artifacts[0].digest))
        assert await labels_of(node, further) == job.labels, "through any number of jobs"

    on_node(tmp_path, step)


def test_a_labelled_input_goes_to_no_network(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        secret = await put(node, b"secret", LOCAL_ONLY)
        error = await refused(node.submit(reads(secret, network=NETWORK), caller()))
        assert error.code == "POLICY_DENIED" and "local-only-has-no-network" in error.message
        assert secret in error.message, "it says which input"
        derived = (await done(node, reads(secret))).artifacts[0].digest
        assert (await refused(node.submit(reads(derived, network=NETWORK), caller()))).code == "POLICY_DENIED"
        plain = reads(labels=(LOCAL_ONLY,), network=NETWORK)
        assert (await refused(node.submit(plain, caller()))).code == "POLICY_DENIED"

    on_node(tmp_path, step)


def test_whatever_a_policy_permits(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        access = node.parts.gate._access
        text = "permit (principal, action, resource);"
        access.policy = type(access.policy).load(text)
        secret = await put(node, b"secret", LOCAL_ONLY)
        error = await refused(node.submit(reads(secret, network=NETWORK), caller()))
        assert error.code == "LABEL_REFUSED" and secret in error.message
        shared = CellRequest(name="shared", isolate_network=False)
        local = CellRequest(name="local", isolate_network=False, labels=(LOCAL_ONLY,))
        error = await refused(node.call("cell.allocate", caller(), AllocateCall(request=local)))
        assert error.code == "LABEL_REFUSED"
        await node.call("cell.allocate", caller(), AllocateCall(request=shared))
        assert (await refused(node.submit(reads(secret, cell="shared"), caller()))).code == "LABEL_REFUSED"
        assert (await refused(into(node, "shared", b"x", LOCAL_ONLY))).code == "LABEL_REFUSED"

    on_node(tmp_path, step)


async def into(node: OneNode, cell: str, data: bytes, *labels: str, by: Caller | None = None) -> None:
    call = PutCall(cell=cell, path="f", fd=spooled(data), size_bytes=len(data), media_type="text/plain", labels=labels)
    await node.call("cell.put", by or caller(), call)


async def cell_labels(node: OneNode, name: str) -> tuple[str, ...]:
    labels: tuple[str, ...] = (await node.call("cell.show", caller(), CellCall(cell=name))).labels
    return labels


def test_a_cell_keeps_what_went_into_it(tmp_path: Path) -> None:
    """Not laundered through a cell: what anybody brings in marks what anybody takes out."""

    async def step(node: OneNode) -> None:
        await node.call("cell.allocate", caller(), AllocateCall(request=CellRequest(name="a", labels=("first",))))
        await into(node, "a", b"x", "second")
        third = await put(node, b"data", "third")
        await done(node, reads(third, cell="a", outputs=()))
        assert await cell_labels(node, "a") == ("first", "second", "third")
        plain = await done(node, command("copy", cell="a", outputs=["out.txt"]))
        assert plain.labels == ("first", "second", "third") == await labels_of(node, plain)
        node.parts.book.snapshot()
        await node.kill_aetherd()
        await node.start_aetherd()
        await node.connected()
        assert await cell_labels(node, "a") == ("first", "second", "third"), "also over a restart"

    on_node(tmp_path, step)


def test_a_ticket_that_marks_marks_what_is_uploaded_by_it(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        request = MintRequest(expires_ms=60_000, labels=(LOCAL_ONLY,))
        by = caller(ticket=(await node.call("ticket.mint", caller(), MintCall(request=request))).ticket)
        secret = await put(node, b"secret", by=by)
        assert (await refused(node.submit(reads(secret, network=NETWORK), caller()))).code == "POLICY_DENIED"
        assert (await refused(node.submit(reads(secret), by))).code == "TICKET_DENIED"
        assert (await done(node, reads(secret, labels=(LOCAL_ONLY,)), by)).labels == (LOCAL_ONLY,)
        await node.call("cell.allocate", caller(), AllocateCall(request=CellRequest(name="a")))
        await into(node, "a", b"x", by=by)
        assert await cell_labels(node, "a") == (LOCAL_ONLY,)

    on_node(tmp_path, step)


def test_labels_of_the_same_bytes_add_up(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        digest = await put(node, b"same")
        assert await put(node, b"same", LOCAL_ONLY) == digest == await put(node, b"same")
        assert (await refused(node.submit(reads(digest, network=NETWORK), caller()))).code == "POLICY_DENIED"

    on_node(tmp_path, step)


def test_an_input_that_is_labelled_after_the_admission_is_not_taken(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        job = await node.submit(reads(await put(node, b"data", "known")), caller())
        held = node.parts.book.ledger.open[job.job_id]
        check_labels_of(held, CellLaunch(grant=held.grant, request=reads(), labels=("known",)))
        with pytest.raises(AetherError) as caught:
            check_labels_of(held, CellLaunch(grant=held.grant, request=reads(), labels=("known", LOCAL_ONLY)))
        assert caught.value.code == "LABEL_REFUSED"
        await node.view(job.job_id, wait_ms=5_000)

    on_node(tmp_path, step)


LABELS = st.text("abc-", min_size=1, max_size=4)


@given(st.lists(st.lists(LABELS, max_size=6), max_size=6))
def test_a_union_only_adds(groups: list[list[str]]) -> None:
    found = union(*groups)
    assert list(found) == sorted(set(found)) and all(set(group) <= set(found) for group in groups)
    assert union(found, *groups) == found == union(*reversed(groups))


def test_a_union_has_a_bound() -> None:
    with pytest.raises(AetherError) as caught:
        union(str(n) for n in range(limits.LABELS_CARRIED_MAX + 1))
    assert caught.value.code == "BAD_FIELD"


WAYS = [(False, True, True), (True, True, False), (False, False, False)]


@pytest.mark.parametrize(("reaches", "isolated", "stays"), WAYS)
def test_local_only_stays(reaches: bool, isolated: bool, stays: bool) -> None:
    check_stays(("other",), reaches=reaches, isolated=isolated, what="run")
    if stays:
        check_stays((LOCAL_ONLY,), reaches=reaches, isolated=isolated, what="run")
        return
    with pytest.raises(AetherError) as caught:
        check_stays((LOCAL_ONLY,), reaches=reaches, isolated=isolated, what="run")
    assert caught.value.code == "LABEL_REFUSED"
