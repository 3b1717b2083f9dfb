"""Replay: the same input as a new job, refused where that would repeat more than what was left here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aether.contract.allocations import CellRequest
from aether.contract.calls import Caller, ReplayCall, SubmittedJob
from aether.contract.cellcalls import AllocateCall
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.substrate.cells.drivers.memory import Program, Run
from aether.substrate.replay import effects_of
from tests.support.onenode import STRANGER, OneNode, caller, command, running
from tests.unit.substrate.test_labels import put, reads

RUNS: list[int] = []


async def copy(run: Run) -> int:
    RUNS.append(1)
    run.files["out.txt"] = b"of " + run.files.get("in.txt", b"nothing")
    return 3 if b"bad" in run.files.get("in.txt", b"") else 0


async def slow(run: Run) -> int:
    await asyncio.sleep(600)
    return 0


PROGRAMS: dict[str, Program] = {"copy": copy, "slow": slow}


def on_node(directory: Path, step: Callable[[OneNode], Awaitable[None]], **fields: Any) -> None:
    RUNS.clear()

    async def main() -> None:
        async with running(directory, PROGRAMS, **fields) as node:
            await step(node)

    asyncio.run(main())


async def replay(node: OneNode, job_id: str, by: Caller | None = None, **fields: Any) -> SubmittedJob:
    call = ReplayCall(**{"job_id": job_id, "wait_ms": 10_000, **fields})
    answer = await node.call("job.replay", by or caller(), call)
    assert isinstance(answer, SubmittedJob)
    return answer


async def refused(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


def test_the_same_input_gives_the_same_output_and_names_the_first(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        first = await node.submit(reads(await put(node, b"data", "mine")), caller(), 5_000)
        again = await replay(node, first.job_id)
        assert again.job_id != first.job_id and again.replay_of == first.job_id
        assert (again.input_hash, again.artifacts, again.labels) == (first.input_hash, first.artifacts, ("mine",))
        intent = (await node.records("job.intent"))[-1]
        assert intent.detail["replay_of"] == first.job_id and intent.input_hash == first.input_hash
        failed = await node.submit(reads(await put(node, b"bad")), caller(), 5_000)
        assert failed.state is JobState.FAILED
        assert (await replay(node, failed.job_id)).exit_code == 3, "a failure is replayed, too"
        assert (await node.view(again.job_id)).replay_of == first.job_id

    on_node(tmp_path, step)


def test_labels_of_the_first_job_stay(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        first = await node.submit(reads(await put(node, b"data"), labels=("local-only", "x")), caller(), 5_000)
        assert (await replay(node, first.job_id)).labels == ("local-only", "x")

    on_node(tmp_path, step)


def test_what_cannot_be_repeated_is_not(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        running_job = await node.submit(command("slow"), caller())
        assert await refused(replay(node, running_job.job_id)) == "NOT_READY"
        await node.call("cell.allocate", caller(), AllocateCall(request=CellRequest(name="a")))
        guest = await node.submit(command("copy", cell="a"), caller(), 5_000)
        assert await refused(replay(node, guest.job_id)) == "NOT_REPEATABLE" and len(RUNS) == 1
        assert (await replay(node, guest.job_id, allow_effects=True)).state is JobState.SUCCEEDED
        assert await refused(replay(node, guest.job_id, caller(STRANGER))) == "NOT_FOUND"

    on_node(tmp_path, step)


def test_inputs_that_are_gone(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        big = b"x" * 100_000
        digest = await put(node, big)
        first = await node.submit(reads(digest), caller(), 5_000)
        (node.layout.artifacts / "sha256" / digest[7:9] / digest).unlink()
        assert await refused(replay(node, first.job_id)) == "GONE" and len(RUNS) == 1

    on_node(tmp_path, step)


def test_a_model_answers_with_the_version_that_answered(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        inputs = {"obs": [[1.0, 0.0]]}
        request = JobRequest(kind="model", op="encode_state", params={"model": "pendulum"}, inputs=inputs)
        first = await node.submit(request, caller(), 30_000)
        if first.state is not JobState.SUCCEEDED:
            pytest.skip(f"the model runtime does not answer here: {first.error}")
        again = await replay(node, first.job_id, wait_ms=0)
        view = await node.view(again.job_id, wait_ms=20_000)
        assert (view.result_digest, view.model_version) == (first.result_digest, first.model_version)
        intent = (await node.records("job.intent"))[-1]
        assert intent.model_version == first.model_version, "pinned"

    on_node(tmp_path, step, models=True)


def test_effects() -> None:
    def seen(request: JobRequest, state: JobState = JobState.SUCCEEDED) -> str | None:
        view = JobView(
            job_id="j", request_id="r", kind=request.kind, op=request.op, state=state, tenant_id="t", node_id="n",
            principal="p", attempt=1, labels=(), schema_version="1.0", input_hash="h", created_at="t",
        )  # fmt: skip
        return effects_of(view, request)

    assert seen(command("true")) is None
    assert seen(command("true"), JobState.LOST) is not None
    assert seen(command("true", network={"allow": ["a.test:443"]})) is not None
    assert seen(command("true", cell="a")) is not None
    assert seen(JobRequest(kind="model", op="encode_state", params={"model": "m"})) is None
