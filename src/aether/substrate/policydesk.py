"""Operations on the policy: what is in force, what another one would decide, and putting another one in force.

`policy.load`, `policy.rollback` and `policy.trial` are atomic: the text is examined and kept as a document, the record
`policy.loaded` is made durable, and only then decisions change. They are taken one after the other. A policy under
which nobody could load another is refused unless it is forced. The next start takes up what was loaded last, unless
the operator's file (policy/policy.cedar) has changed since: then that is in force.

Text that callers send is examined on a thread, one at a time: the validator needs seconds for what the bounds let
through. A second look at the log reads it bundle by bundle, for records that the caller may see.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeVar

from msgspec.structs import replace

from aether.contract import ids, limits
from aether.contract import policycalls as wire
from aether.contract.calls import Caller, JobCall, Nothing
from aether.contract.canonical import digest_bytes
from aether.contract.clock import epoch_ns, rfc3339
from aether.contract.errors import AetherError
from aether.contract.records import PolicyRef, Record
from aether.substrate.access.access import Access, Admission, Resource
from aether.substrate.access.identity import Principal, principal_of
from aether.substrate.access.policy import Policy
from aether.substrate.access.policytext import checked
from aether.substrate.access.review import compare, is_decision, locks_out, reconsider, recorded, run_cases, verdicts
from aether.substrate.access.trial import PolicyTrial
from aether.substrate.audit import entry as entries
from aether.substrate.audit.log import AuditLog
from aether.substrate.audit.search import Sight
from aether.substrate.book import Book
from aether.substrate.cellentries import Order
from aether.substrate.cellhouse import CellHouse
from aether.substrate.gate import Gate
from aether.substrate.policybook import LOADED, NO_FILE
from aether.substrate.reading import Reading

_KIND: Final = "policy"
_PARSED_MAX: Final = 8
_RESOURCE: Final = Resource(kind=_KIND)
T = TypeVar("T")


class PolicyDesk:
    """The handlers. `operators` are the uids whose role is `queen`."""

    def __init__(
        self,
        gate: Gate,
        book: Book,
        access: Access,
        house: CellHouse,
        reading: Reading,
        operators: frozenset[int],
    ) -> None:
        self._gate = gate
        self._book = book
        self._access = access
        self._house = house
        self._reading = reading
        self._loaders = tuple((principal_of(uid, "default"), "queen") for uid in sorted(operators | {0}))
        self._parsed: OrderedDict[str, Policy] = OrderedDict()
        self._turn = asyncio.Lock()
        self._loading = asyncio.Lock()

    def handlers(self) -> dict[str, Callable[[Caller, Any], Awaitable[Any]]]:
        """By operation name."""
        return {
            "policy.show": self.show,
            "policy.list": self.listing,
            "policy.explain": self.explain,
            "policy.check": self.check,
            "policy.test": self.test,
            "policy.diff": self.diff,
            "policy.counterfactual": self.counterfactual,
            "policy.load": self.load,
            "policy.rollback": self.rollback,
            "policy.trial": self.trial,
        }

    # ---- reading

    async def show(self, caller: Caller, call: wire.VersionCall) -> wire.PolicyView:
        self._gate.admit(caller, "policy.show", _RESOURCE)
        book = self._book.ledger.policies
        loaded = book.versions().versions[0]
        version = loaded if call.digest is None else book.find(call.digest)
        policy = await self._kept(version.digest)
        return wire.PolicyView(
            version=version,
            loaded=version.digest == loaded.digest,
            policies=tuple(rule.name for rule in policy.rules),
            text=policy.text,
            trial=book.trial(),
        )

    async def listing(self, caller: Caller, call: Nothing) -> wire.Versions:
        self._gate.admit(caller, "policy.list", _RESOURCE)
        return self._book.ledger.policies.versions()

    async def explain(self, caller: Caller, call: wire.ExplainPolicyCall) -> wire.Decided:
        """How every policy stood to a question, or to the one that admitted a job, by the policy that decided then."""
        self._gate.admit(caller, "policy.explain", _RESOURCE)
        if (call.asking is None) == (call.job_id is None):
            raise AetherError("BAD_FIELD", "cannot explain: name either a question or a job")
        if call.asking is not None:
            return _decided(self._current(), call.asking, self._book.now_ns())
        view = await self._reading.view(caller, "job.get", JobCall(job_id=ids.parse(ids.JOB, call.job_id or "")))
        intent = self._book.log.read(view.intent_index or 0, 1)[0] if view.intent_index is not None else None
        asked = recorded(intent) if intent is not None else ()
        if intent is None or intent.policy is None or not asked:
            raise AetherError("NOT_FOUND", f"cannot explain {view.job_id}: its record does not say what was asked")
        return _decided(await self._kept(intent.policy.digest), asked[0], self._book.now_ns())

    async def check(self, caller: Caller, call: wire.PolicyText) -> wire.Checked:
        self._gate.admit(caller, "policy.check", _RESOURCE)
        return await self._threaded(lambda: checked(call.policy))

    async def test(self, caller: Caller, call: wire.TestCall) -> wire.Tested:
        self._gate.admit(caller, "policy.test", _RESOURCE)
        if len(call.cases) > limits.POLICY_CASES_MAX:
            raise AetherError("BAD_FIELD", f"cannot test: more than {limits.POLICY_CASES_MAX} cases")
        policy = self._current() if call.policy is None else await self._candidate(call.policy)
        now_ns = self._book.now_ns()
        return await self._threaded(lambda: run_cases(policy, call.cases, now_ns))

    async def diff(self, caller: Caller, call: wire.PolicyText) -> wire.Difference:
        self._gate.admit(caller, "policy.diff", _RESOURCE)
        candidate, current, now_ns = await self._candidate(call.policy), self._current(), self._book.now_ns()
        return await self._threaded(lambda: compare(current, candidate, now_ns))

    async def counterfactual(self, caller: Caller, call: wire.CounterfactualCall) -> wire.Counterfactual:
        """The recorded decisions that the caller may see, taken again."""
        admission = self._gate.admit(caller, "policy.counterfactual", _RESOURCE)
        sight = Sight(self._inspects(caller), admission.principal.tenant_id, admission.principal.name)
        call = replace(call, since=_moment(call.since), until=_moment(call.until))
        candidate = await self._candidate(call.policy)
        end = self._book.log.durable_size
        look = _SecondLook(candidate, call, sight)
        at, stop = min(call.start, end), min(end, call.start + limits.AUDIT_SEARCH_RECORDS_MAX)
        while at < stop:
            number = at // limits.TILE_WIDTH
            until = min(stop, (number + 1) * limits.TILE_WIDTH)
            await self._threaded(partial(look.over, self._book.log, number, at, until))
            at = until
        return look.answer(searched=max(0, stop - call.start), next_start=stop if stop < end else None)

    # ---- changing

    async def load(self, caller: Caller, call: wire.LoadCall) -> wire.Version:
        """Puts another policy in force; a trial goes on beside it. The one in force already changes nothing."""
        admission = self._gate.admit(caller, "policy.load", _RESOURCE)
        candidate = await self._candidate(call.policy)
        async with self._loading:
            return await self._enforce(caller, admission, "policy.load", candidate, call.force)

    async def rollback(self, caller: Caller, call: wire.RollbackCall) -> wire.Version:
        """Puts an earlier version in force, and ends a trial."""
        admission = self._gate.admit(caller, "policy.rollback", _RESOURCE)
        async with self._loading:
            candidate = await self._kept(self._book.ledger.policies.find(call.digest).digest)
            return await self._enforce(caller, admission, "policy.rollback", candidate, call.force)

    async def trial(self, caller: Caller, call: wire.TrialCall) -> wire.Versions:
        """Begins a trial in place of the one that may go on, or ends it."""
        admission = self._gate.admit(caller, "policy.trial", _RESOURCE)
        if not 1 <= call.share_percent <= 100:
            raise AetherError("BAD_FIELD", "cannot try the policy: share_percent must be within 1..100")
        candidate = await self._candidate(call.policy) if call.policy is not None else None
        async with self._loading:
            after: Policy | PolicyTrial = self._current()
            if candidate is not None:
                after = PolicyTrial(self._current(), candidate, call.share_percent, call.mode)
                if call.mode == "enforced":
                    self._refuse_lockout(candidate, admission, call.force)
            await self._change(caller, admission, "policy.trial", after)
        return self._book.ledger.policies.versions()

    async def _enforce(
        self, caller: Caller, admission: Admission, operation: str, candidate: Policy, force: bool
    ) -> wire.Version:
        self._refuse_lockout(candidate, admission, force)
        running = self._running()
        after: Policy | PolicyTrial = candidate
        if isinstance(running, PolicyTrial) and operation == "policy.load":
            after = PolicyTrial(candidate, running.candidate, running.share_percent, running.mode)
        await self._change(caller, admission, operation, after)
        return self._book.ledger.policies.versions().versions[0]

    def _refuse_lockout(self, candidate: Policy, admission: Admission, force: bool) -> None:
        loaders: list[tuple[Principal, str]] = [*self._loaders, (admission.principal, admission.ticket.role)]
        if not force and locks_out(candidate, loaders, self._book.now_ns()):
            raise AetherError("POLICY_LOCKOUT", "cannot load the policy: nobody could load another one under it")

    async def _change(self, caller: Caller, admission: Admission, operation: str, after: Policy | PolicyTrial) -> None:
        """Records what is in force from here on, durably with its documents; what is so already is not recorded."""
        if state_of(after) == state_of(self._running()):
            return
        order = self._house.order(caller, admission, operation)
        for document in documents_of(after):
            self._book.log.store_document(document)
        file = self._book.ledger.policies.file
        record = self._house.write(order, lambda index, now: _loaded(self._gate, order, after, file, index, now))
        await self._book.durable(record)
        self._access.policy = after

    # ---- inside

    def _current(self) -> Policy:
        running = self._running()
        return running.current if isinstance(running, PolicyTrial) else running

    def _running(self) -> Policy | PolicyTrial:
        running = self._access.policy
        assert isinstance(running, Policy | PolicyTrial)
        return running

    def _inspects(self, caller: Caller) -> bool:
        try:
            self._gate.admit(caller, "audit.inspect", Resource(kind="audit"))
        except AetherError:
            return False
        return True

    async def _candidate(self, text: str) -> Policy:
        """A parsed policy; raises BAD_POLICY. The last few are remembered."""
        key = digest_bytes(text.encode(errors="surrogatepass"))
        policy = self._parsed.get(key)
        if policy is None:
            policy = self._parsed[key] = await self._threaded(lambda: Policy.load(text))
            if len(self._parsed) > _PARSED_MAX:
                self._parsed.popitem(last=False)
        return policy

    async def _kept(self, digest: str) -> Policy:
        """The policy that a record names; raises NOT_FOUND, LOG_CORRUPT, BAD_POLICY."""
        current = self._current()
        if digest == current.digest:
            return current
        return await self._candidate(self._book.log.document(digest).decode())

    async def _threaded(self, work: Callable[[], T]) -> T:
        async with self._turn:
            return await asyncio.to_thread(work)


class _SecondLook:
    """What a candidate would decide otherwise, gathered over pieces of the log."""

    def __init__(self, candidate: Policy, call: wire.CounterfactualCall, sight: Sight) -> None:
        self._candidate = candidate
        self._call = call
        self._sight = sight
        self._examined = self._changes = 0
        self._changed: list[wire.Reversal] = []
        self._undecidable: dict[str, int] = {}

    def over(self, log: AuditLog, number: int, start: int, end: int) -> None:
        """Looks at the entries from `start` up to `end`, which lie in the bundle of that number."""
        bundle, first = log.bundle(number), number * limits.TILE_WIDTH
        for index in range(start, end):
            entry = bundle[index - first]
            if b'"policy":{' in entry or b"POLICY_DENIED" in entry:
                self._add(entries.decode(entry))

    def _add(self, record: Record) -> None:
        call = self._call
        asked = (call.since is None or record.time >= call.since) and (call.until is None or record.time < call.until)
        if not asked or not is_decision(record) or not self._sight.shows(record.tenant_id, record.principal):
            return
        self._examined += 1
        found = reconsider(self._candidate, record)
        if isinstance(found, str):
            self._undecidable[found] = self._undecidable.get(found, 0) + 1
        elif found is not None:
            self._changes += 1
            if len(self._changed) < limits.POLICY_CHANGES_MAX:
                self._changed.append(found)

    def answer(self, searched: int, next_start: int | None) -> wire.Counterfactual:
        return wire.Counterfactual(
            digest=self._candidate.digest,
            searched=searched,
            examined=self._examined,
            unchanged=self._examined - self._changes - sum(self._undecidable.values()),
            changed=tuple(self._changed),
            undecidable=self._undecidable,
            left_out=self._changes - len(self._changed),
            next_start=next_start,
        )


def taken_up(book: Book, file: str | None) -> tuple[Policy | PolicyTrial, dict[str, str]]:
    """The policy of a start and the `detail` of its record: what was loaded last, if the operator's file still says
    what it said then, else that file, else the default; beside it the trial that was going on. Raises BAD_POLICY and
    what reading a document raises."""
    known = book.ledger.policies
    digest = digest_bytes(file.encode()) if file is not None else NO_FILE
    if known.loaded is not None and known.file == digest:
        policy, source = Policy.load(book.log.document(known.loaded).decode()), LOADED
    elif file is not None:
        policy, source = Policy.load(file), "file"
    else:
        policy, source = Policy.default(), "default"
    running: Policy | PolicyTrial = policy
    if (trial := known.trial()) is not None:
        candidate = Policy.load(book.log.document(trial.digest).decode())
        running = PolicyTrial(policy, candidate, trial.share_percent, trial.mode)
    return running, state_of(running)[1] | {"file": digest, "source": source}


def documents_of(policy: Policy | PolicyTrial) -> tuple[bytes, ...]:
    """The texts that a record of it names."""
    both = (policy.current, policy.candidate) if isinstance(policy, PolicyTrial) else (policy,)
    return tuple(each.text.encode() for each in both)


def state_of(policy: Policy | PolicyTrial) -> tuple[PolicyRef, dict[str, str]]:
    """What `policy.loaded` says: the policy in force, and in `detail` the one on trial."""
    tried = policy if isinstance(policy, PolicyTrial) else None
    current = tried.current if tried is not None else policy
    assert isinstance(current, Policy)
    ref = PolicyRef(digest=current.digest, decision="allow", determining=())
    if tried is None:
        return ref, {}
    share = {"share_percent": str(tried.share_percent), "mode": tried.mode}
    return ref, {"trial": tried.candidate.digest} | share


def _loaded(gate: Gate, order: Order, after: Policy | PolicyTrial, file: str, index: int, time: str) -> Record:
    """`policy.loaded` on request; `detail.by` are the policies that let it, under the policy `detail.under`."""
    admission = order.admission
    ref, detail = state_of(after)
    allowed = admission.policy
    return Record(
        type="policy.loaded",
        log_index=index,
        time=time,
        node_id=gate.node.node_id,
        tenant_id=admission.principal.tenant_id,
        principal=admission.principal.name,
        request_id=order.caller.request_id,
        traceparent=order.caller.traceparent,
        operation=order.operation,
        effect="control",
        ticket=admission.ticket,
        policy=ref,
        budget=order.budget,
        detail=detail | {"file": file, "source": LOADED, "under": allowed.digest, "by": ", ".join(allowed.determining)},
    )


def _decided(policy: Policy, asking: wire.Asking, now_ns: int) -> wire.Decided:
    decision, found = verdicts(policy, asking, now_ns)
    return wire.Decided(
        allow=decision.allow,
        digest=decision.digest,
        asked=asking,
        determining=decision.determining,
        errors=decision.errors,
        policies=found,
    )


def _moment(text: str | None) -> str | None:
    """A time as records spell it, so that they compare as text; raises BAD_FIELD."""
    try:
        return None if text is None else rfc3339(epoch_ns(text))
    except (ValueError, OverflowError) as error:
        why = f"{text!r} is not a time such as 2026-09-21T13:33:20Z"
        raise AetherError("BAD_FIELD", f"cannot look again: {why}") from error
