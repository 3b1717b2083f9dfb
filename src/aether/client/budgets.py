"""Budgets, usage and quotas from Python: `client.budgets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import msgspec

from aether.contract import budgetcalls as wire
from aether.contract import ids

T = TypeVar("T")


class Calls(Protocol):
    """What is needed of `Client`."""

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T: ...


class Budgets:
    """`client.budgets`: the operations. All methods raise AetherError."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def show(self, account: str | None = None) -> tuple[wire.AccountView, ...]:
        """One account (a link, or `tenant:<id>`), or those that the caller is charged on."""
        return self._calls.call_json("budget.show", wire.AccountList, query=[("account", account)]).accounts

    def set(self, tenant_id: str, limits: Mapping[str, int | None]) -> wire.AccountView:
        """What a tenant may spend from now on, by unit; None ends the limit of one."""
        return self._send("budget.set", wire.AccountView, wire.SetBudget(tenant_id=tenant_id, limits=dict(limits)))

    def top_up(
        self, account: str, amounts: Mapping[str, int], *, idempotency_key: str | None = None
    ) -> wire.AccountView:
        """Adds to what an account may spend."""
        body = wire.TopUp(account=account, amounts=dict(amounts))
        return self._send("budget.top-up", wire.AccountView, body, idempotency_key)

    def usage(
        self, by: wire.By = "principal", *, since: str | None = None, until: str | None = None
    ) -> wire.UsageReport:
        """What was spent; days are `2026-09-21`, both within."""
        return self._calls.call_json("usage", wire.UsageReport, query=[("by", by), ("since", since), ("until", until)])

    def quotas(self, subject: str | None = None) -> tuple[wire.QuotaView, ...]:
        """Of a tenant or principal (`tenant:acme`, `principal:uid:1000`), or the caller's."""
        return self._calls.call_json("quota.show", wire.QuotaList, query=[("subject", subject)]).quotas

    def set_quotas(self, subject: str, quotas: Mapping[wire.Quota, int | None]) -> tuple[wire.QuotaView, ...]:
        """Bounds a tenant or principal; None is the default."""
        return self._send("quota.set", wire.QuotaList, wire.SetQuota(subject=subject, quotas=dict(quotas))).quotas

    def _send(self, name: str, reply: type[T], body: msgspec.Struct, key: str | None = None) -> T:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key or ids.new(ids.REQUEST)}
        return self._calls.call_json(name, reply, body=msgspec.json.encode(body), headers=headers)
