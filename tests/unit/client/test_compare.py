"""What two jobs left, path by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from aether.client.compare import compare
from aether.contract.jobs import ArtifactRef, JobState, JobView


class Kept:
    """The outputs of jobs."""

    def __init__(self, logs: Mapping[tuple[str, str], bytes], artifacts: Mapping[str, bytes]) -> None:
        self._logs, self._artifacts = logs, artifacts

    def artifact_bytes(self, digest: str) -> bytes:
        return self._artifacts[digest]

    def logs(self, job_id: str, *, stream: str = "all", follow: bool = False, cursor: int = 0) -> Iterator[bytes]:
        yield self._logs.get((job_id, stream), b"")


def job(name: str, *refs: ArtifactRef, kind: str = "command", **fields: object) -> JobView:
    view = JobView(
        job_id=name, request_id="r", kind=kind, op="run", state=JobState.SUCCEEDED, tenant_id="t", node_id="n",
        principal="p", attempt=1, labels=(), schema_version="1.0", input_hash="h", created_at="t", artifacts=refs,
        exit_code=0,
    )  # fmt: skip
    return msgspec.structs.replace(view, **fields)


def ref(name: str, digest: str) -> ArtifactRef:
    return ArtifactRef(name=name, digest=digest, size_bytes=1)


def test_the_same() -> None:
    found = compare(Kept({}, {}), job("a", ref("x", "1")), job("b", ref("x", "1")))
    assert found.differs == () and found.same == ("artifact/x", "exit_code", "state", "stderr", "stdout")


def test_each_path_that_differs() -> None:
    kept = Kept({("a", "stdout"): b"one", ("b", "stdout"): b"two"}, {})
    first, again = job("a", ref("x", "1"), ref("y", "1")), job("b", ref("x", "2"), exit_code=1, state=JobState.FAILED)
    found = compare(kept, first, again)
    assert found.differs == ("artifact/x", "artifact/y", "exit_code", "state", "stdout") and found.same == ("stderr",)


def test_a_manifest_is_opened() -> None:
    def manifest(*refs: ArtifactRef) -> bytes:
        return msgspec.json.encode(refs)

    kept = Kept({}, {"m1": manifest(ref("x", "1"), ref("y", "1")), "m2": manifest(ref("x", "1"), ref("y", "2"))})
    found = compare(kept, job("a", ref("artifacts.json", "m1")), job("b", ref("artifacts.json", "m2")))
    assert found.differs == ("artifact/y",)


def test_a_model() -> None:
    found = compare(Kept({}, {}), job("a", kind="model", result_digest="1"), job("b", kind="model", result_digest="2"))
    assert found.differs == ("result",)
