"""Whether two jobs left the same: the outputs of each by path, and the paths that differ.

Paths: `state` and `exit_code`; `artifact/<name>` and `result` by digest; `stdout` and `stderr` of a command by the
digest of what is kept of them. Times, ids and usage are no outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

import msgspec

from aether.contract.jobs import ArtifactRef, JobView

MANIFEST: Final = "artifacts.json"
"""The one artifact of a job with more of them than its outcome holds: it names them all."""


class Outputs(Protocol):
    """What is needed of `Client`."""

    def artifact_bytes(self, digest: str) -> bytes: ...

    def logs(self, job_id: str, *, stream: str = "all", follow: bool = False, cursor: int = 0) -> Iterator[bytes]: ...


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a replay. `differs` are the paths of which the two have not the same, `same` the others."""

    job_id: str
    replay_of: str
    differs: tuple[str, ...]
    same: tuple[str, ...]


def compare(client: Outputs, first: JobView, again: JobView) -> Comparison:
    """Both jobs are terminal. Raises AetherError when an output cannot be had."""
    left, right = outputs(client, first), outputs(client, again)
    paths = sorted(left.keys() | right.keys())
    return Comparison(
        job_id=again.job_id,
        replay_of=first.job_id,
        differs=tuple(path for path in paths if left.get(path) != right.get(path)),
        same=tuple(path for path in paths if left.get(path) == right.get(path)),
    )


def outputs(client: Outputs, job: JobView) -> Mapping[str, str | None]:
    """What the job left, by path."""
    found: dict[str, str | None] = {"state": job.state.value}
    found |= {f"artifact/{ref.name}": ref.digest for ref in _artifacts(client, job)}
    if job.kind != "command":
        return found | {"result": job.result_digest}
    found["exit_code"] = str(job.exit_code)
    for stream in ("stdout", "stderr"):
        hashed = hashlib.sha256()
        for chunk in client.logs(job.job_id, stream=stream):
            hashed.update(chunk)
        found[stream] = f"sha256:{hashed.hexdigest()}"
    return found


def _artifacts(client: Outputs, job: JobView) -> tuple[ArtifactRef, ...]:
    if [ref.name for ref in job.artifacts] != [MANIFEST]:
        return job.artifacts
    try:
        return msgspec.json.decode(client.artifact_bytes(job.artifacts[0].digest), type=tuple[ArtifactRef, ...])
    except msgspec.DecodeError:  # a file that only has this name
        return job.artifacts
