"""SQL of the job store: plain functions of a connection; writes run inside the writer's transaction."""

from __future__ import annotations

from typing import Any, Final

import apsw
import msgspec

from aether.contract.jobs import JobRequest, JobState, JobView
from aether.contract.store import Blob, Entry, Facts, JobRow
from aether.contract.wire import ArtifactInfo, ArtifactQuery, Grant, JobQuery

_encode: Final = msgspec.json.Encoder().encode
_LABELS: Final = msgspec.json.Decoder(tuple[str, ...])
_GRANT: Final = msgspec.json.Decoder(Grant)
_VIEW: Final = msgspec.json.Decoder(JobView)
_FACTS: Final = msgspec.json.Decoder(Facts)
_REQUEST: Final = msgspec.json.Decoder(JobRequest)

_KEPT: Final = (
    "job_id, tenant_id, node_id, attempt, revision, kind, effect, labels, phase, state, batch_key, grant_json, "
    "view, facts, intent_index, outcome_index"
)
_INSERT_JOB: Final = f"INSERT OR IGNORE INTO jobs ({_KEPT}, request) VALUES ({', '.join('?' * 17)})"
_UPDATE_JOB: Final = (
    "UPDATE jobs SET node_id = ?, revision = ?, phase = ?, state = ?, grant_json = ?, view = ?, facts = ?, "
    "intent_index = ?, outcome_index = ? WHERE job_id = ? AND attempt = ? AND revision = ?"
)
_INSERT_ENTRY: Final = "INSERT INTO history (job_id, revision, time, event) VALUES (?, ?, ?, ?)"
_INSERT_BLOB: Final = "INSERT OR IGNORE INTO blobs (digest, data) VALUES (?, ?)"
_RAISE_APPLIED: Final = "UPDATE applied SET log_index = ?1 WHERE log_index < ?1"
_ARTIFACT: Final = "digest, size_bytes, media_type, created_at, tenant_id, labels, job_id, name"


def _json(value: Any) -> str:
    return _encode(value).decode()


# ---- jobs


def insert_job(row: JobRow, entry: Entry, blob: Blob | None, connection: apsw.Connection) -> bool:
    connection.execute(
        _INSERT_JOB,
        (
            row.job_id, row.tenant_id, row.node_id, row.attempt, row.revision, row.kind, row.effect,
            _json(row.labels), row.phase, row.state.value, row.batch_key,
            None if row.grant is None else _json(row.grant), _json(row.view), _json(row.facts),
            row.intent_index, row.outcome_index, None if row.request is None else _json(row.request),
        ),
    )  # fmt: skip
    if connection.changes() == 0:
        return False
    connection.execute(_INSERT_ENTRY, (row.job_id, row.revision, entry.time, entry.event.decode()))
    if blob is not None:
        connection.execute(_INSERT_BLOB, (blob.digest, blob.data))
    return True


def update_job(row: JobRow, entry: Entry, connection: apsw.Connection) -> bool:
    connection.execute(
        _UPDATE_JOB,
        (
            row.node_id, row.revision, row.phase, row.state.value,
            None if row.grant is None else _json(row.grant), _json(row.view), _json(row.facts),
            row.intent_index, row.outcome_index, row.job_id, row.attempt, row.revision - 1,
        ),
    )  # fmt: skip
    if connection.changes() == 0:
        return False
    connection.execute(_INSERT_ENTRY, (row.job_id, row.revision, entry.time, entry.event.decode()))
    return True


def delete_jobs(job_ids: tuple[str, ...], connection: apsw.Connection) -> None:
    for job_id in job_ids:
        connection.execute("DELETE FROM jobs WHERE job_id = ? AND outcome_index IS NULL", (job_id,))
        if connection.changes():
            connection.execute("DELETE FROM history WHERE job_id = ?", (job_id,))


def select_job(connection: apsw.Connection, job_id: str) -> JobRow | None:
    found = connection.execute(f"SELECT {_KEPT}, request FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    return None if found is None else _row(found)


def select_open(connection: apsw.Connection) -> list[JobRow]:
    query = f"SELECT {_KEPT}, NULL FROM jobs WHERE phase <> 'done' ORDER BY job_id"
    return [_row(found) for found in connection.execute(query)]


def select_views(connection: apsw.Connection, query: JobQuery) -> list[JobView]:
    sql = "SELECT view FROM jobs WHERE tenant_id = ?"
    values: list[Any] = [query.tenant_id]
    if query.cursor is not None:
        sql += " AND job_id < ?"
        values.append(query.cursor)
    if query.states:
        sql += f" AND state IN ({', '.join('?' * len(query.states))})"
        values += [state.value for state in query.states]
    sql += " ORDER BY job_id DESC LIMIT ?"
    values.append(query.limit)
    return [_VIEW.decode(view) for (view,) in connection.execute(sql, values)]


def select_history(connection: apsw.Connection, job_id: str) -> list[Entry]:
    query = "SELECT time, event FROM history WHERE job_id = ? ORDER BY revision"
    return [Entry(time=time, event=event.encode()) for time, event in connection.execute(query, (job_id,))]


def _row(found: tuple[Any, ...]) -> JobRow:
    return JobRow(
        job_id=found[0],
        tenant_id=found[1],
        node_id=found[2],
        attempt=found[3],
        revision=found[4],
        kind=found[5],
        effect=found[6],
        labels=_LABELS.decode(found[7]),
        phase=found[8],
        state=JobState(found[9]),
        batch_key=found[10],
        grant=None if found[11] is None else _GRANT.decode(found[11]),
        view=_VIEW.decode(found[12]),
        facts=_FACTS.decode(found[13]),
        intent_index=found[14],
        outcome_index=found[15],
        request=None if found[16] is None else _REQUEST.decode(found[16]),
    )


# ---- the audit log


def raise_applied(index: int, connection: apsw.Connection) -> None:
    connection.execute(_RAISE_APPLIED, (index,))


def select_applied(connection: apsw.Connection) -> int:
    return int(connection.execute("SELECT log_index FROM applied").get)


# ---- blobs and artifacts


def insert_blob(blob: Blob, connection: apsw.Connection) -> None:
    connection.execute(_INSERT_BLOB, (blob.digest, blob.data))


def select_blob(connection: apsw.Connection, digest: str) -> bytes | None:
    found = connection.execute("SELECT data FROM blobs WHERE digest = ?", (digest,)).fetchone()
    return None if found is None else found[0]


def insert_artifact(info: ArtifactInfo, connection: apsw.Connection) -> None:
    key = (info.tenant_id, info.digest, info.job_id or "", info.name or "")
    where = "tenant_id = ? AND digest = ? AND job_id = ? AND name = ?"
    known = connection.execute(f"SELECT labels FROM artifacts WHERE {where}", key).fetchone()
    if known is not None:
        labels = tuple(sorted({*_LABELS.decode(known[0]), *info.labels}))
        connection.execute(f"UPDATE artifacts SET labels = ? WHERE {where}", (_json(labels), *key))
        return
    connection.execute(
        f"INSERT INTO artifacts ({_ARTIFACT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            info.digest, info.size_bytes, info.media_type, info.created_at, info.tenant_id, _json(info.labels),
            info.job_id or "", info.name or "",
        ),
    )  # fmt: skip


def select_artifact(connection: apsw.Connection, digest: str, tenant_id: str | None) -> ArtifactInfo | None:
    query = f"SELECT {_ARTIFACT} FROM artifacts WHERE digest = ? AND (?2 IS NULL OR tenant_id = ?2) ORDER BY seq"
    found = [_artifact(row) for row in connection.execute(query, (digest, tenant_id))]
    if not found:
        return None
    labels = sorted({label for info in found for label in info.labels})
    return msgspec.structs.replace(found[0], labels=tuple(labels))


def select_artifacts(connection: apsw.Connection, query: ArtifactQuery) -> list[tuple[str, ArtifactInfo]]:
    sql = f"SELECT {_ARTIFACT}, seq FROM artifacts WHERE tenant_id = ?"
    values: list[Any] = [query.tenant_id]
    if query.job_id is not None:
        sql += " AND job_id = ?"
        values.append(query.job_id)
    if query.cursor is not None:
        sql += " AND seq < ?"
        values.append(int(query.cursor))
    sql += " ORDER BY seq DESC LIMIT ?"
    values.append(query.limit)
    return [(str(row[8]), _artifact(row)) for row in connection.execute(sql, values)]


def _artifact(row: tuple[Any, ...]) -> ArtifactInfo:
    return ArtifactInfo(
        digest=row[0],
        size_bytes=row[1],
        media_type=row[2],
        created_at=row[3],
        tenant_id=row[4],
        labels=_LABELS.decode(row[5]),
        job_id=row[6] or None,
        name=row[7] or None,
    )
