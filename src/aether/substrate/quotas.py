"""How much a tenant and a principal may have at once: a fold of the audit log (`quota.set`), counted on the ledger.

Kinds: open jobs, jobs of them that wait, allocated cells, requests a second. Whoever has as much is told BUSY with a
time to wait (HTTP 429 with Retry-After); nothing is charged or recorded then but, as for any refusal, the refusal.

Fair at admission: a tenant may have as many open jobs as there is room for still. One alone gets half of JOBS_OPEN_MAX,
two that ask for all of it a third each; a tenant that has few jobs is always admitted, whatever the others do.

Rates are token buckets of one second. They are asked before an operation runs, and know who a caller is from its
latest admission, so what is refused costs a look-up in a table.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Final, get_args

from aether.contract import limits
from aether.contract.budgetcalls import Quota, QuotaView
from aether.contract.calls import Caller
from aether.contract.errors import AetherError
from aether.contract.records import Record

KINDS: Final[tuple[Quota, ...]] = get_args(Quota)
DEFAULTS: Final[Mapping[str, Mapping[Quota, int]]] = {
    "tenant": {
        "open_jobs": limits.JOBS_OPEN_MAX,
        "queued_jobs": limits.JOBS_OPEN_MAX,
        "live_cells": limits.CELLS_ALLOCATED_MAX,
        "requests_per_s": limits.TENANT_REQUESTS_PER_S,
    },
    "principal": {
        "open_jobs": limits.JOBS_OPEN_MAX,
        "queued_jobs": limits.JOBS_OPEN_MAX,
        "live_cells": limits.CELLS_ALLOCATED_MAX,
        "requests_per_s": limits.PRINCIPAL_REQUESTS_PER_S,
    },
}
_CALLERS_MAX: Final = 4_096
_NAMED: Final[Mapping[Quota, str]] = {
    "open_jobs": "open jobs",
    "queued_jobs": "jobs that wait",
    "live_cells": "allocated cells",
    "requests_per_s": "requests a second",
}


def tenant_subject(tenant_id: str) -> str:
    return f"tenant:{tenant_id}"


def principal_subject(name: str) -> str:
    return f"principal:{name}"


class _Bucket:
    """Tokens of one subject: `rate` a second, one second's worth at most."""

    __slots__ = ("level", "time_ns")

    def __init__(self, rate: int, now_ns: int) -> None:
        self.level, self.time_ns = float(rate), now_ns

    def take(self, rate: int, now_ns: int) -> bool:
        earned = max(0, now_ns - self.time_ns) * 1e-9 * rate
        self.level, self.time_ns = min(float(rate), self.level + earned), now_ns
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Quotas:
    """See the module head. `apply` is fed every record once, in log order."""

    def __init__(self) -> None:
        self._set: dict[str, dict[Quota, int]] = {}
        self._open: Counter[str] = Counter()
        self._queued: Counter[str] = Counter()
        self._cells: Counter[str] = Counter()
        self._waiting: set[str] = set()
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._callers: OrderedDict[tuple[int, str | None], tuple[str, ...]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Quotas set={len(self._set)} waiting={len(self._waiting)}>"

    # ---- folding

    def apply(self, record: Record) -> None:
        """Counts jobs and cells, and takes `quota.set`."""
        kind = record.type
        if kind == "job.intent" and record.job_id is not None:
            self._count(self._open, record, 1)
            self._count(self._queued, record, 1)
            self._waiting.add(record.job_id)
        elif kind in ("job.started", "job.outcome"):
            if record.job_id in self._waiting:
                self._waiting.discard(record.job_id)
                self._count(self._queued, record, -1)
            if kind == "job.outcome":
                self._count(self._open, record, -1)
        elif kind == "cell.allocated":
            self._count(self._cells, record, 1)
        elif kind == "quota.set":
            self._order(record.detail)

    def cell_ended(self, allocated: Record) -> None:
        """An allocated cell is no more; `allocated` says whose it was, which the record of its end need not."""
        self._count(self._cells, allocated, -1)

    def snapshot(self) -> dict[str, dict[Quota, int]]:
        """What was set; the counts follow from the ledger (`recount`)."""
        return self._set

    def restore(
        self, quotas: dict[str, dict[Quota, int]], jobs: Iterable[tuple[Record, bool]], cells: Iterable[Record]
    ) -> None:
        """Takes over a snapshot: the intents of open jobs and whether each waits, and the records of live cells."""
        self._set = quotas
        for intent, waits in jobs:
            self._count(self._open, intent, 1)
            if waits and intent.job_id is not None:
                self._count(self._queued, intent, 1)
                self._waiting.add(intent.job_id)
        for allocated in cells:
            self._count(self._cells, allocated, 1)

    def _order(self, detail: Mapping[str, str]) -> None:
        subject = self._set.setdefault(detail["subject"], {})
        for quota in KINDS:
            if quota != detail["quota"]:
                continue
            if detail["amount"] == "default":
                subject.pop(quota, None)
            else:
                subject[quota] = int(detail["amount"])
        if not subject:
            del self._set[detail["subject"]]

    def _count(self, counter: Counter[str], record: Record, by: int) -> None:
        for subject in _subjects(record.tenant_id or "", record.principal or ""):
            counter[subject] += by
            if not counter[subject]:
                del counter[subject]

    # ---- asking

    def limit(self, subject: str, quota: Quota) -> int:
        own = self._set.get(subject)
        if own is not None and quota in own:
            return own[quota]
        return DEFAULTS[subject.partition(":")[0]][quota]

    def check_job(self, tenant_id: str, principal: str, open_jobs: int) -> None:
        """Whether one more job may be admitted while `open_jobs` are open on the node; raises BUSY."""
        for subject in _subjects(tenant_id, principal):
            self._check(subject, "open_jobs", self._open[subject])
            self._check(subject, "queued_jobs", self._queued[subject])
        own = self._open[tenant_subject(tenant_id)]
        if own >= limits.JOBS_OPEN_MAX - open_jobs:
            why = f"tenant {tenant_id} has {own} open jobs, as many as there is room for others"
            raise AetherError("BUSY", f"cannot submit: {why}", retry_after_s=1)

    def check_cell(self, tenant_id: str, principal: str) -> None:
        """Whether one more cell may be allocated; raises BUSY."""
        for subject in _subjects(tenant_id, principal):
            self._check(subject, "live_cells", self._cells[subject])

    def admitted(self, caller: Caller, tenant_id: str, principal: str) -> None:
        """Who this caller is, for the requests that it makes next."""
        key = (caller.uid, caller.credential)
        if key not in self._callers:
            self._callers[key] = _subjects(tenant_id, principal)
            if len(self._callers) > _CALLERS_MAX:
                self._callers.popitem(last=False)

    def take_request(self, caller: Caller, now_ns: int) -> None:
        """One more request; raises BUSY. A caller that was never admitted is bounded by its uid."""
        known = self._callers.get((caller.uid, caller.credential))
        for subject in known or (principal_subject(f"uid:{caller.uid}"),):
            rate = self.limit(subject, "requests_per_s")
            bucket = self._buckets.get(subject)
            if bucket is None:
                bucket = self._buckets[subject] = _Bucket(rate, now_ns)
                if len(self._buckets) > _CALLERS_MAX:
                    self._buckets.popitem(last=False)
            if not bucket.take(rate, now_ns):
                raise _busy(subject, "requests_per_s", rate)

    def views(self, subjects: Iterable[str]) -> tuple[QuotaView, ...]:
        """The quotas of these subjects, and what they have now."""
        used: Mapping[Quota, Counter[str]] = {
            "open_jobs": self._open, "queued_jobs": self._queued, "live_cells": self._cells,
        }  # fmt: skip
        return tuple(
            QuotaView(
                subject=subject,
                quota=quota,
                limit=self.limit(subject, quota),
                used=used[quota][subject] if quota in used else None,
                is_default=quota not in self._set.get(subject, {}),
            )
            for subject in subjects
            for quota in KINDS
        )

    def _check(self, subject: str, quota: Quota, used: int) -> None:
        limit = self.limit(subject, quota)
        if used >= limit:
            raise _busy(subject, quota, limit)


def _subjects(tenant_id: str, principal: str) -> tuple[str, str]:
    return tenant_subject(tenant_id), principal_subject(principal)


def _busy(subject: str, quota: Quota, limit: int) -> AetherError:
    return AetherError(
        "BUSY",
        f"cannot admit it: {subject} may have {limit} {_NAMED[quota]}",
        "retry after the time in Retry-After, or ask the operator for more (`aether quota show`)",
        {"subject": subject, "quota": quota, "limit": limit},
        retry_after_s=1,
    )
