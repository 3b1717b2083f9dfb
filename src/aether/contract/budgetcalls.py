"""Calls about budgets, usage and quotas. An account is named by the id of a link, or as `tenant:<id>`."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from aether.contract.errors import AetherError
from aether.contract.ticketcalls import LINK_PATTERN, Budget
from aether.contract.units import AMOUNT_MAX, UNITS

TENANT_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9:._@+=/-]{0,127}$"
ACCOUNT_PATTERN: Final = rf"({LINK_PATTERN})|(^tenant:{TENANT_PATTERN[1:]})"
SUBJECT_PATTERN: Final = rf"^(tenant|principal):{TENANT_PATTERN[1:]}"
DAY_PATTERN: Final = r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])$"
By = Literal["principal", "tenant", "kind", "day"]
Quota = Literal["open_jobs", "queued_jobs", "live_cells", "requests_per_s"]
QUOTA_MAX: Final = 1_000_000


class ShowBudgetCall(msgspec.Struct, frozen=True, kw_only=True):
    """`budget.show`: one account, or those that whoever asks is charged on."""

    account: str | None = None


class AccountView(msgspec.Struct, frozen=True, kw_only=True):
    """What an account may spend, with what was added to it, and what it spent and holds."""

    account: str
    budget: tuple[Budget, ...]


class AccountList(msgspec.Struct, frozen=True, kw_only=True):
    """`budget.show`: ancestors first, the tenant last."""

    accounts: tuple[AccountView, ...]


class SetBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `budget.set`: what a tenant may spend of each unit from now on; null ends the limit of a unit."""

    tenant_id: str
    limits: dict[str, int | None]


class SetBudgetCall(msgspec.Struct, frozen=True, kw_only=True):
    """`budget.set`."""

    request: SetBudget


class TopUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `budget.top-up`: how much more the account may spend."""

    account: str
    amounts: dict[str, int]


class TopUpCall(msgspec.Struct, frozen=True, kw_only=True):
    """`budget.top-up`."""

    request: TopUp


class UsageCall(msgspec.Struct, frozen=True, kw_only=True):
    """`usage`: days are UTC, both within."""

    by: By = "principal"
    since: str | None = None
    until: str | None = None


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent under one name: jobs that ended, and amounts by unit."""

    name: str
    jobs: int
    amounts: dict[str, int]


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """`usage`: rows by name."""

    by: By
    rows: tuple[UsageRow, ...]


class ShowQuotaCall(msgspec.Struct, frozen=True, kw_only=True):
    """`quota.show`: of one subject, or of whoever asks and its tenant."""

    subject: str | None = None


class QuotaView(msgspec.Struct, frozen=True, kw_only=True):
    """One bound: `used` now, null for a rate; `is_default`: nobody set it for this subject."""

    subject: str
    quota: Quota
    limit: int
    used: int | None
    is_default: bool


class QuotaList(msgspec.Struct, frozen=True, kw_only=True):
    """`quota.show`, `quota.set`."""

    quotas: tuple[QuotaView, ...]


class SetQuota(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of `quota.set`: bounds of a tenant or principal (`tenant:acme`, `principal:uid:1000`); null is the
    default."""

    subject: str
    quotas: dict[Quota, int | None]


class SetQuotaCall(msgspec.Struct, frozen=True, kw_only=True):
    """`quota.set`."""

    request: SetQuota


def check_set(request: SetBudget) -> None:
    """Raises AetherError BAD_FIELD."""
    if re.fullmatch(TENANT_PATTERN, request.tenant_id) is None:
        raise _refused(f"{request.tenant_id[:80]!r} is no name of a tenant")
    _check_amounts({unit: amount or 0 for unit, amount in request.limits.items()})


def check_top_up(request: TopUp) -> None:
    """Raises AetherError BAD_FIELD."""
    if re.fullmatch(ACCOUNT_PATTERN, request.account) is None:
        raise _refused(f"{request.account[:80]!r} is no account")
    _check_amounts(request.amounts)
    if min(request.amounts.values()) < 1:
        raise _refused("an amount is not above 0")


def check_quota(request: SetQuota) -> None:
    """Raises AetherError BAD_FIELD."""
    if re.fullmatch(SUBJECT_PATTERN, request.subject) is None:
        raise _refused(f"{request.subject[:80]!r} is neither tenant:<id> nor principal:<name>")
    if not request.quotas or any(not 0 <= (amount or 0) <= QUOTA_MAX for amount in request.quotas.values()):
        raise _refused(f"name at least one quota, within 0..{QUOTA_MAX}")


def _check_amounts(amounts: dict[str, int]) -> None:
    if not amounts or any(unit not in UNITS for unit in amounts):
        raise _refused(f"name at least one unit of {', '.join(UNITS)}")
    if any(not 0 <= amount <= AMOUNT_MAX for amount in amounts.values()):
        raise _refused(f"an amount is not within 0..{AMOUNT_MAX}")


def _refused(why: str) -> AetherError:
    return AetherError("BAD_FIELD", f"cannot read the order: {why}")
