"""aurorad's verbs over a real link, against the fake authority."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from aether.contract import wire
from aether.contract.canonical import digest_bytes
from aether.contract.cells import ExitStatus
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState, JobView
from aether.contract.limits import RESULT_INLINE_BYTES_MAX
from aether.contract.modelwire import InferReply, InferRequest
from tests.unit.orchestrator.fake_world import World, command, echo, eventually, install_model, predict

Body = Callable[[World], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Body], None]:
    def play(body: Body) -> None:
        async def main() -> None:
            install_model(tmp_path / "models")
            world = World(tmp_path)
            await world.start()
            try:
                await body(world)
                assert world.authority.violations == []
            finally:
                await world.stop()

        asyncio.run(main())

    return play


async def ask(world: World, verb: str, body: msgspec.Struct, reply: type[msgspec.Struct]) -> msgspec.Struct:
    assert world.authority.link is not None
    return await world.authority.link.call(verb, body, reply)


async def refused(awaitable: Awaitable[object]) -> str:
    with pytest.raises(AetherError) as caught:
        await awaitable
    return caught.value.code


async def upload(world: World, data: bytes, **changes: object) -> wire.ArtifactInfo:
    assert world.authority.link is not None
    fd = os.memfd_create("up")
    os.write(fd, data)
    token = await world.authority.link.send_fd(fd)
    os.close(fd)
    body = wire.ArtifactPut(token=token, size_bytes=len(data), media_type="text/plain", tenant_id="default")
    return await ask(world, "artifact.put", msgspec.structs.replace(body, **changes), wire.ArtifactInfo)


def result_key(view: JobView) -> wire.ResultKey:
    assert view.result_digest is not None and view.result_bytes is not None
    return wire.ResultKey(digest=view.result_digest, size_bytes=view.result_bytes)


async def download(world: World, digest: str) -> bytes:
    assert world.authority.link is not None
    info = await ask(world, "artifact.get", wire.ArtifactKey(digest=digest, tenant_id="default"), wire.ArtifactInfo)
    assert info.token is not None
    fd = await world.authority.link.take_fd(info.token)
    try:
        return os.read(fd, info.size_bytes + 1)
    finally:
        os.close(fd)


def test_a_command_job_from_inputs_to_artifacts(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        given = await upload(world, b"input", labels=("local-only",))
        world.authority.outputs = {"report.json": b"{}", "deep/data.bin": b"z" * 100_000}
        world.authority.cell_end = lambda cell: (0.02, ExitStatus(code=0))
        request = command("job", outputs=("*",), files=[{"path": "in", "artifact": given.digest}], labels=("mine",))
        job_id = await world.authority.submit(request)
        assert job_id is not None
        row = await world.settled(job_id)
        assert row.state is JobState.SUCCEEDED
        assert world.authority.cells[job_id].inputs == [b"input"]
        refs = {ref.name: ref for ref in row.view.artifacts}
        assert refs["report.json"].media_type == "application/json"
        assert await download(world, refs["deep/data.bin"].digest) == b"z" * 100_000
        page = await ask(
            world, "artifact.list", wire.ArtifactQuery(tenant_id="default", job_id=job_id), wire.ArtifactPage
        )
        assert {info.name for info in page.artifacts} == {"report.json", "deep/data.bin"}
        assert all(info.labels == ("local-only", "mine") for info in page.artifacts), "labels follow the data"
        story = await ask(world, "job.story", wire.JobKey(job_id=job_id), wire.Story)
        assert [line.event for line in story.lines] == [
            "Submitted", "Claimed", "CellStarted", "CellExited", "Collected", "Finished",
        ]  # fmt: skip

    play(body)


def test_many_outputs_are_named_by_one_manifest(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        world.authority.outputs = {f"f{n}": b"%d" % n for n in range(150)}
        job_id = await world.authority.submit(command("job", outputs=("*",)))
        assert job_id is not None
        row = await world.settled(job_id)
        (ref,) = row.view.artifacts
        assert ref.name == "artifacts.json"
        assert len(msgspec.json.decode(await download(world, ref.digest))) == 150

    play(body)


def test_an_input_of_another_tenant_is_not_there(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        given = await upload(world, b"theirs", tenant_id="other")
        job_id = await world.authority.submit(command("job", files=[{"path": "in", "artifact": given.digest}]))
        assert job_id is not None
        row = await world.settled(job_id)
        assert row.state is JobState.FAILED and row.view.error is not None and row.view.error.code == "NOT_FOUND"
        assert job_id not in world.authority.cells

    play(body)


def test_a_refused_launch_fails_the_job(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        world.authority.refuse_launch = AetherError("LEVEL_UNMET", "cannot launch: no user namespaces")
        job_id = await world.authority.submit(command("job"))
        assert job_id is not None
        row = await world.settled(job_id)
        assert row.view.error is not None and row.view.error.code == "LEVEL_UNMET"

    play(body)


def test_a_transient_refusal_is_waited_out(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        world.authority.refuse_launch = AetherError("CELL_LIMIT", "cannot launch: too many cells")
        job_id = await world.authority.submit(command("job"))
        assert job_id is not None
        await asyncio.sleep(0.12)
        world.authority.refuse_launch = None
        assert (await world.settled(job_id)).state is JobState.SUCCEEDED

    play(body)


def test_stop_while_running_and_again(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        world.authority.cell_end = lambda cell: None
        job_id = await world.authority.submit(command("job"))
        assert job_id is not None
        await eventually(lambda: _cell(world, job_id))
        view = await ask(world, "job.get", wire.JobKey(job_id=job_id), JobView)
        for _ in range(2):
            await ask(world, "job.stop", wire.JobStop(job_id=job_id, grace_ms=10), wire.Empty)
        row = await world.settled(job_id)
        assert row.state is JobState.CANCELLED and row.view.error is not None and row.view.error.code == "CANCELLED"
        await ask(world, "job.stop", wire.JobStop(job_id=job_id, grace_ms=10), wire.Empty)
        assert row.view.result_digest is None
        assert view.state in (JobState.QUEUED, JobState.RUNNING)

    play(body)


async def _cell(world: World, job_id: str) -> bool | None:
    return True if job_id in world.authority.cells else None


def test_the_queue_holds_the_bound(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path)
        await world.start()
        assert world.aurora is not None
        world.aurora._scheduler.running_max = 2
        live: list[int] = []

        def end(cell: object) -> tuple[float, ExitStatus]:
            live.append(sum(1 for other in world.authority.cells.values() if other.end is None))
            return 0.002, ExitStatus(code=0)

        world.authority.cell_end = end
        ids = [await world.authority.submit(command("job")) for _ in range(10)]
        for job_id in ids:
            assert job_id is not None and (await world.settled(job_id)).state is JobState.SUCCEEDED
        assert max(live) <= 2
        launched = sorted(world.authority.cells)
        assert launched == sorted(j for j in ids if j) and list(world.authority.cells) == launched, "not in order"
        await world.stop()

    asyncio.run(main())


# ---- models


def test_run_answers_and_keeps(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        reply = await world.authority.run(predict(x=1))
        assert reply.state is JobState.SUCCEEDED and reply.result == b'{"echo":{"x":1}}' and reply.error is None
        assert (reply.model_id, reply.model_version) == ("pendulum", "1.0.0")
        assert reply.code.model_digest is not None and reply.usage.basis["cpu_user_us"] == "apportioned"
        (job_id,) = world.authority.released
        row = await world.settled(job_id)
        assert job_id in world.authority.kept
        result = await ask(world, "job.result", result_key(row.view), wire.ResultReply)
        assert result.result == reply.result
        assert row.request == predict(x=1), "kept, so that it can be replayed"

    play(body)


def test_routes(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        models = world.tmp / "models"
        install_model(models, version="1.10.0")
        install_model(models, version="1.9.9")
        (models / "pendulum/2.0.0").mkdir()
        (models / "pendulum/latest").mkdir()
        listed = await ask(world, "model.list", wire.Empty(), wire.ModelList)
        states = {info.version: info.state for info in listed.models}
        assert set(states) == {"1.0.0", "1.9.9", "1.10.0", "2.0.0"} and states["2.0.0"].startswith("broken")
        assert (await world.authority.run(predict("pendulum"))).model_version == "1.10.0"
        assert (await world.authority.run(predict("pendulum@1.9.9"))).model_version == "1.9.9"
        for unknown in ("pendulum@2.0.0", "walker", "pendulum@", "../pendulum"):
            assert await refused(world.authority.run(predict(unknown))) == "NO_SUCH_MODEL"

    play(body)


def test_more_versions_than_workers(play: Callable[[Body], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime that was not asked for longest gives its place; none is left behind."""
    monkeypatch.setattr("aether.orchestrator.engines.model.WORKERS_MAX", 2)

    async def body(world: World) -> None:
        for version in ("1.1.0", "1.2.0", "1.3.0"):
            install_model(world.tmp / "models", version=version)
            assert (await world.authority.run(predict(f"pendulum@{version}"))).model_version == version
        await eventually(lambda: _runtimes_left(world, 2))
        assert (await world.authority.run(predict("pendulum@1.1.0"))).state is JobState.SUCCEEDED

    play(body)


async def _runtimes_left(world: World, count: int) -> bool | None:
    return True if sum(1 for c in world.authority.cells.values() if c.runtime and not c.freed) == count else None


def test_the_runtimes_errors_are_the_jobs(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        error = AetherError("NONFINITE", "cannot predict: obs holds NaN").body()

        def answer(request: InferRequest) -> InferReply:
            return msgspec.structs.replace(echo(request), ok=False, result=None, error=error)

        world.authority.answer = answer
        reply = await world.authority.run(predict())
        assert reply.state is JobState.FAILED and reply.error == error and reply.result is None
        job_id = await world.authority.submit(predict())
        assert job_id is not None
        row = await world.settled(job_id)
        assert row.state is JobState.FAILED and row.view.error == error

    play(body)


def test_a_runtime_is_not_trusted(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        def answer(request: InferRequest) -> InferReply:
            return msgspec.structs.replace(
                echo(request), result=b'{"a":1}, "injected": true', batch_size=-3, infer_us=10**15
            )

        world.authority.answer = answer
        reply = await world.authority.run(predict())
        assert reply.error is not None and reply.error.code == "ENGINE_DIED"
        assert reply.usage.cpu_user_us is not None and reply.usage.cpu_user_us < 10**9

    play(body)


def test_a_large_result_is_an_artifact(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        text = msgspec.json.encode("x" * RESULT_INLINE_BYTES_MAX)
        world.authority.answer = lambda request: msgspec.structs.replace(echo(request), result=text)
        reply = await world.authority.run(predict())
        assert reply.result is None and reply.result_digest == digest_bytes(text)
        assert await download(world, reply.result_digest) == text

    play(body)


def test_a_dead_runtime_fails_its_jobs_and_comes_back(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.authority.run(predict())
        (cell,) = [cell for cell in world.authority.cells.values() if cell.runtime is not None]
        assert cell.runtime is not None
        cell.runtime._answer = lambda request: None
        waiting = [asyncio.ensure_future(world.authority.run(predict(n=n))) for n in range(5)]
        queued = await world.authority.submit(predict())
        assert queued is not None
        await eventually(lambda: _requests(cell.runtime, 7))
        world.authority.end_cell(cell, ExitStatus(signal=11))
        for reply in await asyncio.gather(*waiting):
            assert reply.state is JobState.FAILED and reply.error is not None and reply.error.code == "ENGINE_DIED"
        row = await world.settled(queued)
        assert row.view.error is not None and row.view.error.code == "ENGINE_DIED"
        assert (await world.authority.run(predict())).state is JobState.SUCCEEDED
        assert cell.freed and cell.grant.job_id in world.authority.outcomes

    play(body)


async def _requests(runtime: object, count: int) -> bool | None:
    return True if len(runtime.requests) >= count else None  # type: ignore[attr-defined]


def test_a_runtime_that_may_not_start(tmp_path: Path) -> None:
    async def main() -> None:
        install_model(tmp_path / "models")
        world = World(tmp_path)
        world.authority.refuse_launch = AetherError("LEVEL_UNMET", "cannot launch: no user namespaces")
        await world.start()
        assert await refused(world.authority.run(predict())) == "LEVEL_UNMET"
        world.authority.refuse_launch = None
        reply = await eventually(lambda: _try_run(world))
        assert reply.state is JobState.SUCCEEDED
        await world.stop()

    asyncio.run(main())


async def _try_run(world: World) -> wire.JobRunReply | None:
    try:
        return await world.authority.run(predict())
    except AetherError:
        return None


def test_a_silent_runtime_meets_the_deadline(play: Callable[[Body], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.orchestrator.engines.model.DEADLINE_S", 0.3)

    async def body(world: World) -> None:
        world.authority.answer = lambda request: None
        reply = await world.authority.run(predict())
        assert reply.state is JobState.TIMED_OUT and reply.error is not None and reply.error.code == "TIMED_OUT"

    play(body)


def test_a_restarted_authority_finds_the_runtime_alive(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.authority.run(predict())
        assert world.link is not None
        world.link.close()
        await asyncio.sleep(0.01)
        await world.connect()
        await world.authority.run(predict())
        runtimes = [cell for cell in world.authority.cells.values() if cell.runtime is not None]
        assert len(runtimes) == 1 and runtimes[0].end is None

    play(body)


def test_a_runtime_of_an_earlier_aurorad_is_retired(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.authority.run(predict())
        (old,) = [cell for cell in world.authority.cells.values() if cell.runtime is not None]
        await world.bury()
        await world.start()
        assert (await world.authority.run(predict())).state is JobState.SUCCEEDED
        await eventually(lambda: _freed(old))
        assert old.grant.job_id in world.authority.outcomes

    play(body)


async def _freed(cell: object) -> bool | None:
    return True if cell.freed else None  # type: ignore[attr-defined]


# ---- bounds, lists, odds and ends


def test_open_jobs_are_bounded(play: Callable[[Body], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.orchestrator.jobs.desk.JOBS_OPEN_MAX", 2)

    async def body(world: World) -> None:
        world.authority.cell_end = lambda cell: None
        first = [await world.authority.submit(command("job")) for _ in range(2)]
        assert None not in first
        assert await world.authority.submit(command("job")) is None
        assert await refused(world.authority.run(predict())) == "BUSY"

    play(body)


def test_a_full_store_refuses_and_goes_on(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        world.store.full = True
        assert await world.authority.submit(command("job")) is None
        assert world.aurora is not None and len(world.aurora._desk.open) == 0
        world.store.full = False
        job_id = await world.authority.submit(command("job"))
        assert job_id is not None and (await world.settled(job_id)).state is JobState.SUCCEEDED

    play(body)


def test_submit_twice_is_one_job(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        row = world.authority.admit(command("job"))
        await asyncio.gather(*(ask(world, "job.submit", row, wire.Empty) for _ in range(3)))
        await world.settled(row.view.job_id)
        await ask(world, "job.submit", row, wire.Empty)
        assert list(world.authority.launches.values()) == [1]

    play(body)


def test_pages_of_jobs(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        made = [await world.authority.submit(command("job")) for _ in range(5)]
        page = await ask(world, "job.list", wire.JobQuery(tenant_id="default", limit=2), wire.JobPage)
        assert [view.job_id for view in page.jobs] == made[:2:-1]
        rest = await ask(
            world, "job.list", wire.JobQuery(tenant_id="default", limit=9, cursor=page.next_cursor), wire.JobPage
        )
        assert [view.job_id for view in rest.jobs] == made[2::-1] and rest.next_cursor is None
        bad = wire.JobQuery(tenant_id="default", cursor="x' OR 1=1")
        assert await refused(ask(world, "job.list", bad, wire.JobPage)) == "BAD_ID"
        bad_artifacts = wire.ArtifactQuery(tenant_id="default", cursor="x")
        assert await refused(ask(world, "artifact.list", bad_artifacts, wire.ArtifactPage)) == "BAD_FIELD"

    play(body)


def test_what_is_not_there(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        key = wire.JobKey(job_id="job_01a5c0de-0000-7000-8000-000000000000")
        for verb in ("job.get", "job.story"):
            assert await refused(ask(world, verb, key, JobView)) == "NOT_FOUND"
        await ask(world, "job.stop", wire.JobStop(job_id=key.job_id, grace_ms=1), wire.Empty)
        lost = wire.ResultKey(digest="sha256:" + "0" * 64, size_bytes=10)
        assert await refused(ask(world, "job.result", lost, wire.ResultReply)) == "GONE"
        missing = wire.ArtifactKey(digest="sha256:" + "0" * 64, tenant_id="default")
        assert await refused(ask(world, "artifact.get", missing, wire.ArtifactInfo)) == "NOT_FOUND"
        assert (
            await refused(
                ask(world, "artifact.get", wire.ArtifactKey(digest="../x", tenant_id="default"), wire.ArtifactInfo)
            )
            == "BAD_ID"
        )

    play(body)


def test_an_upload_that_is_shorter_than_announced(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        assert await refused(upload(world, b"abc", size_bytes=4)) == "BAD_REQUEST"

    play(body)


def test_health_and_metrics(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        job_id = await world.authority.submit(command("job"))
        assert job_id is not None
        await world.settled(job_id)
        health = await ask(world, "health", wire.Empty(), wire.RoleHealth)
        assert health.ok and health.role == "aurorad" and health.facts["jobs_open"] == 0
        text = (await ask(world, "metrics", wire.Empty(), wire.MetricsReply)).text.decode()
        assert 'aether_aurorad_jobs_finished_total{kind="command",state="succeeded"} 1.0' in text
        assert "aether_aurorad_jobs_open 0.0" in text
        assert "open=0" in repr(world.aurora)

    play(body)


def test_another_protocol_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aether.orchestrator.service.PROTOCOL_VERSION", 2)

    async def main() -> None:
        world = World(tmp_path)
        with pytest.raises(AetherError, match="VERSION_MISMATCH"):
            await world.start()
        await world.stop()

    asyncio.run(main())


def test_a_row_lost_before_it_was_durable_is_made_from_the_log(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        await world.authority.run(predict(x=1))
        (job_id,) = world.authority.released
        await world.settled(job_id)
        await world.bury()
        world.store._jobs.clear()
        world.store._history.clear()
        await world.start()
        row = await world.settled(job_id)
        assert row.state is JobState.SUCCEEDED and row.view.result_digest is not None

    play(body)


def test_a_pure_job_whose_answer_was_never_released_is_forgotten(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        row = world.authority.admit(predict(x=1))
        job_id = row.view.job_id
        del world.authority.open[job_id]
        await ask(world, "job.run", row, wire.JobRunReply)
        assert await world.store.get(job_id) is not None
        await world.bury()
        await world.start()
        assert await world.store.get(job_id) is None

    play(body)


def test_an_orderly_end_leaves_queued_model_jobs_to_the_next_start(play: Callable[[Body], None]) -> None:
    async def body(world: World) -> None:
        world.authority.answer = lambda request: None
        job_id = await world.authority.submit(predict(x=1))
        assert job_id is not None and world.aurora is not None
        await eventually(lambda: _asked(world))
        await world.aurora.close()
        world.authority.answer = echo
        await world.start()
        assert (await world.settled(job_id)).state is JobState.SUCCEEDED

    play(body)


async def _asked(world: World) -> bool | None:
    return True if any(c.runtime and c.runtime.requests for c in world.authority.cells.values()) else None
