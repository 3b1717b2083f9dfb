"""What every Store keeps to (`aether.contract.store`). Each test runs on every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from aether.backends.memory.store import MemoryStore
from aether.backends.sqlite.store import SqliteStore
from aether.contract import ids
from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.store import Blob, Entry, Facts, JobRow, Store
from aether.contract.wire import ArtifactInfo, ArtifactQuery, Grant, JobQuery

Check = Callable[[Store], Awaitable[None]]
ENTRY = Entry(time="2026-01-01T00:00:00.000000Z", event=b'{"event":"submitted"}')
replace = msgspec.structs.replace


@pytest.fixture(params=["memory", "sqlite"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Check], None]:
    def fatal(error: BaseException) -> None:
        raise AssertionError(f"the store gave up: {error!r}")

    def run(check: Check) -> None:
        async def body() -> None:
            store: Store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "jobs.db", fatal)
            await store.open()
            try:
                await check(store)
            finally:
                await store.close()

        asyncio.run(body())

    return run


def row(job_id: str | None = None, tenant_id: str = "default", **changes: object) -> JobRow:
    job_id = job_id or ids.new(ids.JOB)
    view = JobView(
        job_id=job_id, request_id="r", kind="command", op="run", state=JobState.QUEUED, tenant_id=tenant_id,
        node_id="n", principal="p", attempt=1, labels=("a",), schema_version="1.0", input_hash="h", created_at="t",
    )  # fmt: skip
    made = JobRow(
        job_id=job_id, tenant_id=tenant_id, node_id="n", attempt=1, revision=1, kind="command", effect="cell",
        labels=("a",), phase="queued", state=JobState.QUEUED, batch_key="k",
        grant=Grant(grant_id="g", job_id=job_id, attempt=1, reservation_id="r"), view=view, facts=Facts(),
        request=JobRequest(kind="command", op="run", params={"argv": ["x", "ü\u2028"]}),
    )  # fmt: skip
    return replace(made, **changes)


def test_a_row_comes_back_as_it_was(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        kept = row(intent_index=7, facts=Facts(cell_id="c", stop_grace_ms=0))
        assert await store.submit(kept, ENTRY)
        assert await store.get(kept.job_id) == kept
        assert await store.get("job_x") is None
        assert await store.history(kept.job_id) == [ENTRY]
        assert await store.history("job_x") == []

    run(check)


def test_submit_is_idempotent(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        kept = row()
        assert await store.submit(kept, ENTRY)
        assert not await store.submit(replace(kept, phase="done"), ENTRY, Blob(digest="sha256:b", data=b"b"))
        assert await store.get(kept.job_id) == kept
        assert await store.get_blob("sha256:b") is None
        assert len(await store.history(kept.job_id)) == 1

    run(check)


def test_advance_is_compare_and_set(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        kept = row()
        await store.submit(kept, ENTRY)
        moved = replace(kept, revision=2, phase="launching", request=None)
        assert await store.advance(moved, ENTRY)
        assert not await store.advance(moved, ENTRY), "the same revision twice"
        assert not await store.advance(replace(moved, revision=4), ENTRY), "a revision ahead"
        assert not await store.advance(replace(moved, revision=3, attempt=2), ENTRY), "another attempt"
        assert not await store.advance(row(), ENTRY), "an unknown job"
        assert await store.get(kept.job_id) == replace(moved, request=kept.request), "the request stays"
        assert len(await store.history(kept.job_id)) == 2

    run(check)


def test_of_two_claims_one_wins(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        kept = row()
        await store.submit(kept, ENTRY)
        claims = [replace(kept, revision=2, phase="launching", node_id=node) for node in ("a", "b")]
        won = await asyncio.gather(*(store.advance(claim, ENTRY) for claim in claims))
        assert sorted(won) == [False, True]

    run(check)


def test_writes_take_effect_in_order(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        kept = row()
        store.submit(kept, ENTRY)
        for revision in range(2, 50):
            last = store.advance(replace(kept, revision=revision), ENTRY)
        assert await last
        found = await store.get(kept.job_id)
        assert found is not None and found.revision == 49

    run(check)


def test_open_jobs_are_those_not_done_oldest_first(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        rows = [row() for _ in range(5)]
        for kept in reversed(rows):
            await store.submit(kept, ENTRY)
        await store.advance(replace(rows[1], revision=2, phase="done"), ENTRY)
        await store.advance(replace(rows[3], revision=2, phase="finishing"), ENTRY)
        found = await store.open_jobs()
        assert [r.job_id for r in found] == [rows[i].job_id for i in (0, 2, 3, 4)]
        assert all(r.request is None for r in found)

    run(check)


def test_drop_spares_rows_with_an_outcome(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        bare, ended = row(), row(outcome_index=3)
        for kept in (bare, ended):
            await store.submit(kept, ENTRY)
        await store.drop((bare.job_id, ended.job_id, "job_x"))
        assert await store.get(bare.job_id) is None
        assert await store.history(bare.job_id) == []
        assert await store.get(ended.job_id) == ended
        assert len(await store.history(ended.job_id)) == 1

    run(check)


def test_listing_pages_newest_first_within_a_tenant(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        rows = [row(tenant_id="a" if n % 2 else "b") for n in range(10)]
        for kept in rows:
            await store.submit(kept, ENTRY)
        failed = rows[3]
        view = replace(failed.view, state=JobState.FAILED)
        await store.advance(replace(failed, revision=2, state=JobState.FAILED, view=view), ENTRY)
        mine = [r.job_id for r in reversed(rows) if r.tenant_id == "a"]
        first = await store.list_jobs(JobQuery(tenant_id="a", limit=2))
        assert [v.job_id for v in first] == mine[:2]
        rest = await store.list_jobs(JobQuery(tenant_id="a", limit=9, cursor=mine[1]))
        assert [v.job_id for v in rest] == mine[2:]
        found = await store.list_jobs(JobQuery(tenant_id="a", states=(JobState.FAILED, JobState.LOST)))
        assert [v.job_id for v in found] == [failed.job_id]
        assert await store.list_jobs(JobQuery(tenant_id="c")) == []

    run(check)


def test_the_applied_index_only_rises(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        assert await store.applied_index() == 0
        await store.set_applied_index(5)
        await store.set_applied_index(3)
        assert await store.applied_index() == 5

    run(check)


def test_blobs(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        data = bytes(range(256))
        await store.put_blob(Blob(digest="sha256:a", data=data))
        await store.put_blob(Blob(digest="sha256:a", data=data))
        kept = row()
        await store.submit(kept, ENTRY, Blob(digest="sha256:b", data=b""))
        assert await store.get_blob("sha256:a") == data
        assert await store.get_blob("sha256:b") == b""
        assert await store.get_blob("sha256:c") is None

    run(check)


def _artifact(digest: str, tenant_id: str = "a", job_id: str | None = "job_1", **changes: object) -> ArtifactInfo:
    info = ArtifactInfo(
        digest=digest, size_bytes=1, media_type="text/plain", created_at="t", tenant_id=tenant_id, job_id=job_id,
        name="out",
    )  # fmt: skip
    return replace(info, **changes)


def test_artifacts_are_found_by_tenant_with_all_their_labels(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        await store.add_artifact(_artifact("sha256:a", labels=("local-only",)))
        await store.add_artifact(_artifact("sha256:a", labels=("other",), job_id=None, name=None))
        await store.add_artifact(_artifact("sha256:a", tenant_id="b", labels=("b",)))
        found = await store.find_artifact("sha256:a", "a")
        assert found == _artifact("sha256:a", labels=("local-only", "other"))
        assert await store.find_artifact("sha256:a", "c") is None
        assert await store.find_artifact("sha256:z") is None

    run(check)


def test_artifact_pages(run: Callable[[Check], None]) -> None:
    async def check(store: Store) -> None:
        for n in range(5):
            await store.add_artifact(_artifact(f"sha256:{n}", job_id=f"job_{n % 2}"))
            await store.add_artifact(_artifact(f"sha256:{n}", job_id=f"job_{n % 2}"))
        page = await store.list_artifacts(ArtifactQuery(tenant_id="a", limit=2))
        assert [info.digest for _, info in page] == ["sha256:4", "sha256:3"]
        page = await store.list_artifacts(ArtifactQuery(tenant_id="a", limit=9, cursor=page[-1][0]))
        assert [info.digest for _, info in page] == ["sha256:2", "sha256:1", "sha256:0"]
        page = await store.list_artifacts(ArtifactQuery(tenant_id="a", job_id="job_1"))
        assert [info.digest for _, info in page] == ["sha256:3", "sha256:1"]
        assert await store.list_artifacts(ArtifactQuery(tenant_id="b")) == []

    run(check)
