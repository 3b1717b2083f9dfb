"""Accounts: nothing is lost or made, no limit is passed, the log's fold is what was held live."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aether.contract.errors import AetherError
from aether.contract.records import BudgetRef, Record
from aether.substrate.access.budget import Account, Accounts
from aether.substrate.access.tickets import Limit

# root <- child <- grandchild, and root <- sibling
LIMITS = {"root": 12, "child": 7, "sibling": 9}
CPU_LIMITS = {"root": 5_000, "grandchild": 900}
CHAINS = [("root",), ("root", "child"), ("root", "child", "grandchild"), ("root", "sibling"), ("free",)]


def limits_of(chain: tuple[str, ...]) -> tuple[Limit, ...]:
    ops = [Limit(link, "ops", LIMITS[link]) for link in chain if link in LIMITS]
    return (*ops, *(Limit(link, "cpu_ms", CPU_LIMITS[link]) for link in chain if link in CPU_LIMITS))


def budget(number: int, chain: tuple[str, ...], ops: int = 1, cpu_ms: int = 0) -> BudgetRef:
    return BudgetRef(reservation_id=f"r{number}", accounts=chain, ops=ops, cpu_ms=cpu_ms, settled=False)


def record(kind: str, ref: BudgetRef) -> Record:
    return Record(type=kind, log_index=0, time="", node_id="", budget=ref)  # type: ignore[arg-type]


def spent(ref: BudgetRef, cpu_ms: int) -> BudgetRef:
    return msgspec.structs.replace(ref, cpu_ms=cpu_ms, settled=True)


class AccountsMachine(RuleBasedStateMachine):
    """Any interleaving of what the service does, with the log of records beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts = Accounts()
        self.log: list[Record] = []
        self.held: list[BudgetRef] = []
        self.open: list[BudgetRef] = []
        self.number = 0
        self.ops: dict[str, int] = {}

    @rule(chain=st.sampled_from(CHAINS), ops=st.integers(1, 3), cpu_ms=st.integers(0, 400))
    def reserve(self, chain: tuple[str, ...], ops: int, cpu_ms: int) -> None:
        self.number += 1
        ref = budget(self.number, chain, ops, cpu_ms)
        before = {link: msgspec.structs.astuple(_state(self.accounts, link)) for link in LIMITS}
        try:
            self.accounts.reserve(ref, limits_of(chain))
        except AetherError as error:
            assert error.code == "BUDGET_EXHAUSTED"
            assert before == {link: msgspec.structs.astuple(_state(self.accounts, link)) for link in LIMITS}
        else:
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
    @rule(data=st.data(), cpu_ms=st.integers(0, 500))
    def outcome(self, data: st.DataObject, cpu_ms: int) -> None:
        ref = data.draw(st.sampled_from(self.open))
        self.open.remove(ref)
        for link in ref.accounts:
            self.ops[link] = self.ops.get(link, 0) + ref.ops
        self._apply(record("job.outcome", spent(ref, cpu_ms)))

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
    def limits_hold_and_nothing_is_negative(self) -> None:
        for link in ("root", "child", "grandchild", "sibling", "free"):
            account = self.accounts.account(link)
            assert min(account.ops_spent, account.ops_reserved, account.cpu_ms_spent, account.cpu_ms_reserved) >= 0
        for link, limit in LIMITS.items():
            assert self.accounts.account(link).used("ops") <= limit

    @invariant()
    def what_was_spent_and_is_held_is_exact(self) -> None:
        for link in LIMITS:
            account = self.accounts.account(link)
            assert account.ops_spent == self.ops.get(link, 0)
            assert account.ops_reserved == sum(ref.ops for ref in (*self.held, *self.open) if link in ref.accounts)

    @invariant()
    def the_fold_is_the_live_state(self) -> None:
        fold = Accounts()
        for entry in self.log:
            fold.apply(entry)
        for link in {*LIMITS, *CPU_LIMITS}:
            live, folded = self.accounts.account(link), fold.account(link)
            unrecorded = sum(ref.ops for ref in self.held if link in ref.accounts)
            assert live.ops_spent == folded.ops_spent and live.cpu_ms_spent == folded.cpu_ms_spent
            assert live.ops_reserved - unrecorded == folded.ops_reserved


class _Plain(msgspec.Struct):
    ops_spent: int
    ops_reserved: int
    cpu_ms_spent: int
    cpu_ms_reserved: int


def _state(accounts: Accounts, link: str) -> _Plain:
    a = accounts.account(link)
    return _Plain(a.ops_spent, a.ops_reserved, a.cpu_ms_spent, a.cpu_ms_reserved)


AccountsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAccounts = AccountsMachine.TestCase


def test_an_ancestors_limit_binds() -> None:
    accounts = Accounts()
    for number in range(7):
        accounts.reserve(budget(number, CHAINS[1]), limits_of(CHAINS[1]))
    with pytest.raises(AetherError) as caught:
        accounts.reserve(budget(8, CHAINS[1]), limits_of(CHAINS[1]))
    assert caught.value.details["link_id"] == "child"
    for number in range(10, 15):
        accounts.reserve(budget(number, CHAINS[3]), limits_of(CHAINS[3]))
    with pytest.raises(AetherError) as caught:
        accounts.reserve(budget(20, CHAINS[3]), limits_of(CHAINS[3]))
    assert caught.value.details["link_id"] == "root"


def test_cpu_stops_when_it_is_used_up() -> None:
    accounts, chain = Accounts(), CHAINS[2]
    accounts.reserve(budget(1, chain), limits_of(chain))
    accounts.apply(record("job.intent", budget(1, chain)))
    accounts.apply(record("job.outcome", spent(budget(1, chain), 900)))
    with pytest.raises(AetherError, match="cpu_ms"):
        accounts.reserve(budget(2, chain), limits_of(chain))


@given(st.lists(st.text("abcdef", min_size=4, max_size=4), max_size=50))
def test_links_without_a_budget_keep_no_account(links: list[str]) -> None:
    accounts = Accounts()
    for number, link in enumerate(links):
        ref = budget(number, (link,))
        accounts.reserve(ref, ())
        accounts.apply(record("job.intent", ref))
        accounts.apply(record("job.outcome", spent(ref, 1)))
    assert repr(accounts) == "<Accounts links=0 reservations=0>"
    assert accounts.account("abcd") == Account()
