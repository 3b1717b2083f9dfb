"""Accounts: nothing is lost or made, no limit is passed, the log's fold is what was held live."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aether.contract.errors import AetherError
from aether.contract.limits import TICKET_ACCOUNTS_MAX
from aether.contract.records import BudgetRef, Record
from aether.contract.units import COUNTED, METERED
from aether.substrate.access import budget as accounting
from aether.substrate.access.budget import Account, Accounts, amounts_of

# root <- child <- grandchild, and root <- sibling
LIMITS: dict[str, dict[str, int]] = {
    "root": {"ops": 12, "micro_usd": 3_000, "cpu_ms": 5_000},
    "child": {"ops": 7, "tokens": 90},
    "grandchild": {"cpu_ms": 900, "gpu_ms": 50},
    "sibling": {"ops": 9, "wall_ms": 400},
}
CHAINS = [("root",), ("root", "child"), ("root", "child", "grandchild"), ("root", "sibling"), ("free",)]
TENANT = "tenant:acme"
NAMES = [*LIMITS, "free", TENANT]
EXACT = st.fixed_dictionaries(
    {}, optional={"ticks": st.integers(0, 5), "tokens": st.integers(0, 60), "micro_usd": st.integers(0, 2_000)}
)
USED = st.fixed_dictionaries({}, optional={unit: st.integers(0, 500) for unit in METERED if unit != "cpu_ms"})


def budget(number: int, chain: tuple[str, ...], ops: int = 1, tenant: dict[str, int] | None = None, **amounts: int):  # type: ignore[no-untyped-def]
    limits = {link: LIMITS[link] for link in chain if link in LIMITS} | ({TENANT: tenant} if tenant else {})
    return BudgetRef(
        reservation_id=f"r{number}", accounts=chain, ops=ops, cpu_ms=0, settled=False, amounts=amounts, limits=limits
    )


def record(kind: str, ref: BudgetRef | None, **detail: str) -> Record:
    return Record(type=kind, log_index=0, time="", node_id="", budget=ref, detail=detail)  # type: ignore[arg-type]


def spent(ref: BudgetRef, cpu_ms: int, amounts: dict[str, int] | None = None) -> BudgetRef:
    used = ref.amounts if amounts is None else amounts
    return msgspec.structs.replace(ref, cpu_ms=cpu_ms, settled=True, amounts=used, limits={})


class AccountsMachine(RuleBasedStateMachine):
    """Any interleaving of what the service does, with the log of records beside it and a model that only adds."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts = Accounts()
        self.log: list[Record] = []
        self.held: list[BudgetRef] = []
        self.open: list[BudgetRef] = []
        self.number = 0
        self.spent: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        self.raised: dict[tuple[str, str], int] = {}
        self.set: dict[str, int] = {}

    def add(self, account: str, amounts: dict[str, int]) -> None:
        for unit, amount in amounts.items():
            self.spent[account][unit] = self.spent[account].get(unit, 0) + amount

    def limit(self, account: str, unit: str) -> int | None:
        stated = self.set.get(unit) if account == TENANT else LIMITS.get(account, {}).get(unit)
        return None if stated is None else stated + self.raised.get((account, unit), 0)

    @rule(chain=st.sampled_from(CHAINS), ops=st.integers(0, 3), amounts=EXACT, runs=st.booleans())
    def reserve(self, chain: tuple[str, ...], ops: int, amounts: dict[str, int], runs: bool) -> None:
        self.number += 1
        ref = budget(self.number, chain, ops, dict(self.accounts.tenant_limits("acme")), **amounts)
        before = _state(self.accounts)
        asked = amounts_of(ref)
        fits = all(
            limit is None or not (need := asked.get(unit, 0) or int(runs and unit in METERED))
            or self.accounts.account(account).used(unit) + need <= limit
            for account, units in ref.limits.items() for unit in units for limit in [self.limit(account, unit)]
        )  # fmt: skip
        try:
            self.accounts.reserve(ref, runs)
        except AetherError as error:
            assert error.code == "BUDGET_EXHAUSTED" and not fits
            assert _state(self.accounts) == before
        else:
            assert fits
            self.held.append(ref)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.held))
        self.held.remove(ref)
        self.accounts.release(ref)
        self.accounts.release(ref)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def intent(self, data: st.DataObject) -> None:
        ref = data.draw(st.sampled_from(self.held))
        self.held.remove(ref)
        self.open.append(ref)
        self._apply(record("job.intent", ref))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), cpu_ms=st.integers(0, 500), used=USED)
    def outcome(self, data: st.DataObject, cpu_ms: int, used: dict[str, int]) -> None:
        """Of exact units at most what was held is spent; metered ones as they come."""
        ref = data.draw(st.sampled_from(self.open))
        self.open.remove(ref)
        amounts = {unit: data.draw(st.integers(0, most)) for unit, most in ref.amounts.items()} | used
        settled = spent(ref, cpu_ms, amounts)
        for account in ref.limits:
            self.add(account, amounts_of(settled))
        self._apply(record("job.outcome", settled))

    @rule(chain=st.sampled_from(CHAINS), used=USED)
    def charge(self, chain: tuple[str, ...], used: dict[str, int]) -> None:
        """A movement that nobody reserved: what a cell sent, or cost while it was there."""
        self.number += 1
        tenant = dict(self.accounts.tenant_limits("acme"))
        ref = msgspec.structs.replace(budget(self.number, chain, 0, tenant, **used), settled=True)
        for account in ref.limits:
            self.add(account, used)
        self._apply(record("egress.closed", ref))

    @rule(
        account=st.sampled_from(["root", "child", TENANT]),
        unit=st.sampled_from(["ops", "tokens"]),
        more=st.integers(1, 9),
    )
    def top_up(self, account: str, unit: str, more: int) -> None:
        if account == TENANT and unit not in self.set:
            return
        root = "root" if account != TENANT else TENANT
        self._apply(record("budget.raised", None, account=account, unit=unit, amount=str(more), root_id=root))
        self.raised[account, unit] = self.raised.get((account, unit), 0) + more

    @rule(unit=st.sampled_from(["ops", "wall_ms"]), amount=st.none() | st.integers(0, 20))
    def set_tenant(self, unit: str, amount: int | None) -> None:
        told = "none" if amount is None else str(amount)
        self._apply(record("budget.set", None, account=TENANT, unit=unit, amount=told))
        self.raised.pop((TENANT, unit), None)
        self.spent[TENANT].pop(unit, None)
        self.set.pop(unit, None)
        if amount is not None:
            self.set[unit] = amount

    @rule()
    def restart(self) -> None:
        """A new process: what was reserved and never recorded is gone, the rest is folded from the log."""
        self.held.clear()
        self.accounts = Accounts()
        half = len(self.log) // 2
        for entry in self.log[:half]:
            self.accounts.apply(entry)
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.accounts.snapshot()))
        self.accounts = Accounts()
        self.accounts.restore(state)
        for entry in self.log[half:]:
            self.accounts.apply(entry)

    def _apply(self, entry: Record) -> None:
        self.log.append(entry)
        self.accounts.apply(entry)

    @invariant()
    def what_was_spent_and_is_held_is_exact(self) -> None:
        for name in NAMES:
            account = self.accounts.account(name)
            assert account.spent == {unit: amount for unit, amount in self.spent[name].items() if amount}
            held: dict[str, int] = {}
            for ref in (*self.held, *self.open):
                if name in ref.limits:
                    for unit, amount in amounts_of(ref).items():
                        held[unit] = held.get(unit, 0) + amount
            assert account.reserved == held

    @invariant()
    def the_fold_is_the_live_state(self) -> None:
        for ref in self.held:
            self.accounts.release(ref)
        fold = Accounts()
        for entry in self.log:
            fold.apply(entry)
        assert _state(fold) == _state(self.accounts)
        for ref in self.held:
            self.accounts._hold(ref)


def _state(accounts: Accounts) -> dict[str, Any]:
    return {name: (account.spent, account.reserved) for name in NAMES if (account := accounts.account(name))} | {
        "snapshot": msgspec.to_builtins(accounts.snapshot())["raised"],
        "tenants": msgspec.to_builtins(accounts.snapshot())["tenants"],
    }


AccountsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAccounts = AccountsMachine.TestCase


@pytest.mark.parametrize("unit", COUNTED)
def test_exact_units_never_pass_a_limit(unit: str) -> None:
    """Whatever is asked for in whatever order: what is granted adds up to the limit at most."""
    accounts, dice = Accounts(), random.Random(unit)
    for number in range(400):
        asked = {unit: dice.randint(1, 30)}
        ref = BudgetRef(
            reservation_id=f"r{number}", accounts=("a",), ops=asked.pop("ops", 0), cpu_ms=0, settled=False,
            amounts=asked, limits={"a": {unit: 1_000}},
        )  # fmt: skip
        try:
            accounts.reserve(ref)
        except AetherError as error:
            assert error.details["unit"] == unit and error.details["limit"] == 1_000
        else:
            accounts.apply(record("job.outcome", spent(ref, 0)))
        assert accounts.account("a").used(unit) <= 1_000
    assert accounts.account("a").used(unit) == 1_000, "small enough a rest is granted"


def test_an_ancestors_limit_binds() -> None:
    accounts = Accounts()
    for number in range(7):
        accounts.reserve(budget(number, CHAINS[1]))
    with pytest.raises(AetherError) as caught:
        accounts.reserve(budget(8, CHAINS[1]))
    assert caught.value.details["account"] == "child"
    for number in range(10, 15):
        accounts.reserve(budget(number, CHAINS[3]))
    with pytest.raises(AetherError) as caught:
        accounts.reserve(budget(20, CHAINS[3]))
    assert caught.value.details["account"] == "root"


def test_cpu_stops_when_it_is_used_up() -> None:
    accounts, chain = Accounts(), CHAINS[2]
    accounts.reserve(budget(1, chain), runs=True)
    accounts.apply(record("job.intent", budget(1, chain)))
    accounts.apply(record("job.outcome", spent(budget(1, chain), 901)))
    with pytest.raises(AetherError, match="s of CPU"):
        accounts.reserve(budget(2, chain), runs=True)
    accounts.reserve(budget(3, chain))


def test_a_tenants_budget_begins_when_it_is_set() -> None:
    accounts, free = Accounts(), ("free",)
    accounts.reserve(budget(1, free))
    accounts.apply(record("budget.set", None, account=TENANT, unit="ops", amount="1"))
    accounts.apply(record("job.outcome", spent(budget(1, free), 0)))
    limits = dict(accounts.tenant_limits("acme"))
    accounts.reserve(budget(2, free, tenant=limits))
    with pytest.raises(AetherError, match="by tenant acme"):
        accounts.reserve(budget(3, free, tenant=limits))
    accounts.apply(record("budget.set", None, account=TENANT, unit="ops", amount="none"))
    accounts.reserve(budget(4, free, tenant=limits))
    assert list(accounts.tenants()) == []


def test_what_a_ticket_left_is_forgotten_with_it() -> None:
    accounts = Accounts()
    accounts.reserve(budget(1, CHAINS[2]))
    accounts.apply(record("budget.raised", None, account="child", unit="ops", amount="5", root_id="root"))
    accounts.apply(record("job.outcome", spent(budget(1, CHAINS[2]), 0)))
    accounts.forget("root")
    assert msgspec.to_builtins(accounts.snapshot()) == msgspec.to_builtins(Accounts().snapshot())


def test_one_ticket_cannot_grow_accounts_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "TICKET_ACCOUNTS_MAX", 3)
    assert TICKET_ACCOUNTS_MAX > 3
    accounts, refused = Accounts(), []
    for number in range(6):
        link = f"derived-{number}"
        ref = BudgetRef(
            reservation_id=link, accounts=("root", link), ops=1, cpu_ms=0, settled=False, limits={link: {"ops": 9}}
        )
        try:
            accounts.reserve(ref)
        except AetherError as error:
            refused.append(error.code)
    assert refused == ["TICKET_LIMIT"] * 3


@given(st.lists(st.text("abcdef", min_size=4, max_size=4), max_size=50))
def test_links_without_a_budget_keep_no_account(links: list[str]) -> None:
    accounts = Accounts()
    for number, link in enumerate(links):
        ref = budget(number, (link,))
        accounts.reserve(ref)
        accounts.apply(record("job.intent", ref))
        accounts.apply(record("job.outcome", spent(ref, 1)))
    assert repr(accounts) == "<Accounts accounts=0 reservations=0>"
    assert accounts.account("abcd") == Account()
