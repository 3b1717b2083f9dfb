"""Reading: within the caller's tenant. What belongs to another is not found, so that ids cannot be probed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from aether.contract import ids
from aether.contract.calls import (
    ArtifactCall,
    FileReply,
    JobCall,
    ListArtifactsCall,
    ListJobsCall,
    LogsCall,
    RawReply,
    StopCall,
    UploadCall,
)
from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.substrate.audit.verify import verify_receipt
from aether.substrate.cells.drivers.memory import Run
from tests.support.onenode import STRANGER, OneNode, caller, command, running

ALICE, BOB = caller(STRANGER), caller(STRANGER + 1)


async def write(run: Run) -> int:
    run.files["out.txt"] = b"mine"
    return 0


async def fail(run: Run) -> int:
    return 3


async def forever(run: Run) -> int:
    await run.terminated.wait()
    return 5


PROGRAMS = {"write": write, "fail": fail, "forever": forever}


async def code_of(node: OneNode, operation: str, by: Any, body: Any) -> str:
    with pytest.raises(AetherError) as caught:
        await node.call(operation, by, body)
    return caught.value.code


def content(reply: FileReply) -> bytes:
    try:
        return os.pread(reply.fd, reply.size_bytes + 1, reply.offset)
    finally:
        os.close(reply.fd)


async def upload(node: OneNode, by: Any, data: bytes) -> Any:
    fd = os.memfd_create("upload")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return await node.call("artifact.put", by, UploadCall(fd=fd, size_bytes=len(data), media_type="text/plain"))


def test_tenants_do_not_see_each_others_jobs(tmp_path: Path) -> None:
    """Implicit tickets of two uids are two tenants."""

    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("write", outputs=["*.txt"]), ALICE, 5_000)
            assert job.state is JobState.SUCCEEDED
            for operation in ("job.get", "job.result", "job.receipt", "job.story"):
                await node.call(operation, ALICE, JobCall(job_id=job.job_id))
                assert await code_of(node, operation, BOB, JobCall(job_id=job.job_id)) == "NOT_FOUND"
                assert await code_of(node, operation, BOB, JobCall(job_id=ids.new(ids.JOB))) == "NOT_FOUND"
            assert await code_of(node, "job.logs", BOB, LogsCall(job_id=job.job_id)) == "NOT_FOUND"
            mine = await node.call("job.list", ALICE, ListJobsCall())
            assert [view.job_id for view in mine.jobs] == [job.job_id]
            assert (await node.call("job.list", BOB, ListJobsCall())).jobs == ()

    asyncio.run(main())


def test_a_stranger_cannot_stop_a_job_nor_leave_a_record_of_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("forever"), ALICE)
            assert await code_of(node, "job.stop", BOB, StopCall(job_id=job.job_id)) == "NOT_FOUND"
            assert await node.records("job.stop") == []
            await node.call("job.stop", ALICE, StopCall(job_id=job.job_id, grace_ms=100))
            assert (await node.view(job.job_id, ALICE, 5_000)).state is JobState.CANCELLED
            (stop,) = await node.records("job.stop")
            assert stop.principal == f"uid:{STRANGER}"

    asyncio.run(main())


def test_tenants_do_not_see_each_others_artifacts(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            info = await upload(node, ALICE, b"secret")
            assert content(await node.call("artifact.get", ALICE, ArtifactCall(digest=info.digest))) == b"secret"
            assert await code_of(node, "artifact.get", BOB, ArtifactCall(digest=info.digest)) == "NOT_FOUND"
            absent = digest_bytes(b"never kept")
            assert await code_of(node, "artifact.get", BOB, ArtifactCall(digest=absent)) == "NOT_FOUND"
            assert (await node.call("artifact.list", BOB, ListArtifactsCall())).artifacts == ()
            request = command("write")
            stolen = msgspec.structs.replace(request, inputs={"files": [{"path": "in", "artifact": info.digest}]})
            job = await node.submit(stolen, BOB, 5_000)
            assert job.state is JobState.FAILED and job.error is not None and job.error.code == "NOT_FOUND"
            await upload(node, BOB, b"secret")
            assert content(await node.call("artifact.get", BOB, ArtifactCall(digest=info.digest))) == b"secret"

    asyncio.run(main())


def test_outputs_belong_to_the_tenant_of_their_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("write", outputs=["*.txt"]), ALICE, 5_000)
            (ref,) = job.artifacts
            listed = await node.call("artifact.list", ALICE, ListArtifactsCall(job_id=job.job_id))
            assert [info.digest for info in listed.artifacts] == [ref.digest]
            assert (await node.call("artifact.list", BOB, ListArtifactsCall(job_id=job.job_id))).artifacts == ()
            assert await code_of(node, "artifact.get", BOB, ArtifactCall(digest=ref.digest)) == "NOT_FOUND"

    asyncio.run(main())


def test_what_a_job_is_not_ready_for_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("forever"), ALICE)
            for operation in ("job.result", "job.receipt"):
                assert await code_of(node, operation, ALICE, JobCall(job_id=job.job_id)) == "NOT_READY"
            failed = await node.submit(command("fail"), ALICE, 5_000)
            assert await code_of(node, "job.result", ALICE, JobCall(job_id=failed.job_id)) == "NO_RESULT"
            assert await code_of(node, "job.get", ALICE, JobCall(job_id="job_x")) == "BAD_ID"

    asyncio.run(main())


def test_results_and_receipts_of_an_ended_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("write", outputs=["*.txt"]), ALICE, 5_000)
            result = await node.call("job.result", ALICE, JobCall(job_id=job.job_id))
            assert isinstance(result, RawReply)
            said = msgspec.json.decode(result.body)
            assert said["exit_code"] == 0 and [ref["name"] for ref in said["artifacts"]] == ["out.txt"]
            receipt = await node.call("job.receipt", ALICE, JobCall(job_id=job.job_id))
            public_key = node.layout.audit_public_key.read_text()
            assert verify_receipt(msgspec.json.encode(receipt), public_key).ok

    asyncio.run(main())


def test_reads_need_no_budget_and_leave_no_record(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(tmp_path, PROGRAMS) as node:
            job = await node.submit(command("write"), ALICE, 5_000)
            before = node.parts.book.log.size
            for _ in range(5):
                await node.view(job.job_id, ALICE)
                await node.call("job.list", ALICE, ListJobsCall())
            assert node.parts.book.log.size == before

    asyncio.run(main())
