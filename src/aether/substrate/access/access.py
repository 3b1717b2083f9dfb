"""The one check before every operation: identity -> ticket -> policy. Pure but for the clock passed in.

Rules, in this order; the first that fails is the answer:
- the peer has a uid (UNAUTHENTICATED);
- a client certificate, an API key or a token that was shown holds (BAD_CREDENTIAL, CREDENTIAL_EXPIRED,
  CREDENTIAL_REVOKED; `credentials`, `tokens`, `workloads`): it names the principal instead of the uid;
- a ticket that was shown verifies (BAD_TICKET) and is not revoked (TICKET_REVOKED); without one, the ticket that a key
  or certificate stands for is in force, or the implicit ticket of the token's holder or of the uid: role `queen` for
  root and the instance's owner, `user` for others;
- every caveat of every link allows the request (TICKET_EXPIRED, TICKET_DENIED);
- the policy allows it for every role that the ticket names (POLICY_DENIED, with the deciding policies); a job that
  wants a network is also asked as `job.network`, `job.learn` and, once per secret, `job.credential`; a cell that is
  to be scheduled before others as `cell.prioritize` (`access.questions`);
- it may be let to go ahead only once somebody approves it (`demand`; substrate/access/demand.py).

The answer says which accounts a spend is charged to and their limits; reserving is the caller's next step.
Minting is a record: `on_minted` is called before an implicit ticket is used for the first time by this process.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass, replace
from typing import Final

from aether.contract import apikeys, caveats
from aether.contract.calls import Caller, PeerCertificate
from aether.contract.caveats import Request
from aether.contract.errors import AetherError
from aether.contract.records import PolicyRef, TicketRef
from aether.substrate.access import tickets
from aether.substrate.access.credentials import Credentials, Shown
from aether.substrate.access.demand import demanded
from aether.substrate.access.identity import (
    DEFAULT_TENANT,
    QUEEN,
    USER,
    Principal,
    implicit_tenant,
    node_principal,
    principal_of,
)
from aether.substrate.access.keyfile import IMPLICIT, Keys
from aether.substrate.access.policy import Decides
from aether.substrate.access.questions import Answer, ask, callers_own, questions
from aether.substrate.access.questions import Resource as Resource  # what `admit` is asked about
from aether.substrate.access.tickets import Limit, Tickets, Verified
from aether.substrate.access.tokens import Tokens
from aether.substrate.access.workloads import Workloads

_IMPLICIT_MAX: Final = 4_096


@dataclass(frozen=True, slots=True)
class Admission:
    """Leave for one operation: who, by which ticket, by which decision, within which limits of its links.

    `cells` are the patterns of each of the ticket's caveats on allocated cells; `demand` the policy's refusal to let
    it go ahead unapproved.
    """

    principal: Principal
    ticket: TicketRef
    policy: PolicyRef
    limits: tuple[Limit, ...]
    cells: tuple[tuple[str, ...], ...] = ()
    expires_ms: int | None = None
    """When the ticket ends, since the epoch."""
    demand: PolicyRef | None = None
    labels: tuple[str, ...] = ()
    """What the ticket marks: every job carries them, and whatever is uploaded by it."""

    def sees(self, name: str) -> bool:
        """Whether the ticket lets its bearer know of the allocated cell of that name."""
        return all(caveats.matches(name, patterns) for patterns in self.cells)


@dataclass(frozen=True, slots=True)
class Minted:
    """A ticket that now exists: for whom, its link and what it says. Never its text."""

    principal: Principal
    ticket: TicketRef
    caveats: tuple[str, ...]

    def detail(self) -> dict[str, str]:
        """The `detail` of its `ticket.minted` record."""
        return {"caveats": "; ".join(self.caveats)}


class PolicyDeniedError(AetherError):
    """The policy's refusal, with what its record says: who asked, by which ticket, what, and which policies decided."""

    def __init__(self, principal: Principal, ticket: TicketRef, answer: Answer) -> None:
        ref = answer.ref
        if answer.errors:
            why = "the policy could not be evaluated"
        elif ref.determining:
            why = f"forbidden by {', '.join(ref.determining)}"
        else:
            why = f"no policy permits it for role {answer.role}"
        details = {"policies": ", ".join(ref.determining), "policy_digest": ref.digest}
        super().__init__("POLICY_DENIED", f"cannot {answer.operation}: {why}", details=details)
        self.principal = principal
        self.ticket = ticket
        self.policy = ref


@dataclass(frozen=True, slots=True)
class Proofs:
    """What there is beside uids and tickets: kept credentials, tokens, certificates of other trust domains."""

    credentials: Credentials
    tokens: Tokens
    workloads: Workloads


class ImplicitTickets:
    """One ticket per uid or token's holder that comes without one, and one for the node itself.

    Its nonce is derived from the principal, and its key outlives epochs, so that it is the same ticket - and the same
    account - after a restart or a change of keys. The text of such a ticket never leaves: nobody can send one.
    `on_minted` may refuse (no room for the record): then the ticket serves, unrecorded, only for what needs no
    record either, and is offered again.
    """

    def __init__(
        self, authority: Tickets, nonce_key: bytes, operators: Collection[int], on_minted: Callable[[Minted], None]
    ) -> None:
        self._authority = authority
        self._nonce_key = nonce_key
        self._operators = frozenset(operators) | {0}
        self._on_minted = on_minted
        self._known: OrderedDict[int | Principal | None, Shown] = OrderedDict()

    def of(self, uid: int | None) -> Shown:
        """The principal and ticket of a uid; None is the node."""
        known = self._known.get(uid)
        if known is None:
            known = self._mint(uid, self._principal(uid))
        return known

    def named(self, principal: Principal) -> Shown:
        """The ticket of a principal that something else than a uid proved, for the one role it may act in."""
        known = self._known.get(principal)
        if known is None:
            known = self._mint(principal, principal)
        return known

    def _principal(self, uid: int | None) -> Principal:
        if uid is None:
            return node_principal()
        role = QUEEN if uid in self._operators else USER
        return principal_of(uid, implicit_tenant(uid, self._operators), (role,))

    def _mint(self, key: int | Principal | None, principal: Principal) -> Shown:
        (role,) = principal.roles
        nonce = hmac.digest(self._nonce_key, f"implicit\0{principal.name}\0{role}".encode(), "sha256")[:16]
        said = (caveats.role(role),)
        verified = self._authority.verify(self._authority.mint(principal.tenant_id, nonce, said))
        shown = Shown(principal, verified, True)
        try:
            self._on_minted(Minted(principal, _ticket_ref(verified, True), tuple(map(str, said))))
        except AetherError:
            return shown
        self._known[key] = shown
        if len(self._known) > _IMPLICIT_MAX:
            self._known.popitem(last=False)
        return shown


class Access:
    """See the module head. `policy` may be replaced by another one while it runs. `describe` adds what is known of a
    resource: its owner, its tenant, its labels."""

    def __init__(self, authority: Tickets, implicit: ImplicitTickets, policy: Decides, proofs: Proofs | None) -> None:
        self._authority = authority
        self._implicit = implicit
        self._proofs = proofs
        self.policy = policy
        self.describe: Callable[[Principal, str, Resource], Resource] = callers_own

    @classmethod
    def create(
        cls,
        keys: Keys,
        policy: Decides,
        operators: Collection[int],
        on_minted: Callable[[Minted], None],
        revoked: Set[str] = frozenset(),
        proofs: Proofs | None = None,
    ) -> Access:
        """Access with the keys of tickets; `operators` are uids beside root with role `queen`, `revoked` the
        ids of links that are refused, kept by the caller. Without `proofs` only uids and tickets are known."""
        authority = Tickets(keys.epochs, keys.newest, revoked)
        nonce_key = hashlib.sha256(b"aether implicit v1\0" + keys.implicit).digest()
        own = Tickets({IMPLICIT: keys.implicit}, IMPLICIT)
        return cls(authority, ImplicitTickets(own, nonce_key, operators, on_minted), policy, proofs)

    def rekey(self, keys: Keys) -> None:
        """Mints with the newest of these epochs from now on, and takes tickets of all of them."""
        self._authority.rekey(keys.epochs, keys.newest)

    def admit(self, caller: Caller, operation: str, resource: Resource, now_ns: int) -> Admission:
        """Leave for `caller`, or the AetherError of the rule that refused. `now_ns` is the wall clock."""
        return self.admit_shown(self.identify(caller, operation, now_ns), operation, resource, now_ns)

    def identify(self, caller: Caller, operation: str, now_ns: int) -> Shown:
        """Who the caller is and the ticket in force: the first rules of the module head."""
        if caller.uid < 0:
            raise AetherError("UNAUTHENTICATED", f"cannot {operation}: the peer's identity is not known")
        text, now_ms, own = caller.credential, now_ns // 1_000_000, None
        if caller.certificate is not None:
            own = self._certified(caller.certificate, now_ns)
        if text is None:
            return own if own is not None else self._implicit.of(caller.uid)
        if text.startswith(apikeys.PREFIX):
            return self._proven().credentials.of_key(text, now_ms)
        if "." in text:
            granted = self._proven().tokens.verify(text, now_ns)
            return self._implicit.named(Principal(granted.name, granted.tenant, "token", None, (granted.role,)))
        verified = self._authority.verify(text)
        holder = own.principal if own is not None else principal_of(caller.uid, verified.tenant)
        return Shown(replace(holder, tenant_id=verified.tenant, roles=verified.roles), verified, False)

    def _certified(self, certificate: PeerCertificate, now_ns: int) -> Shown:
        proofs = self._proven()
        if not proofs.credentials.knows(certificate):
            granted = proofs.workloads.verify(certificate, now_ns)
            if granted is not None:
                return self._implicit.named(Principal(granted.name, granted.tenant, "workload", None, (granted.role,)))
        return proofs.credentials.of_certificate(certificate, now_ns // 1_000_000)

    def links_of(self, caller: Caller) -> tuple[str, ...]:
        """The links whose revocation ends what this caller was answered with; it was admitted before."""
        text, proofs, links = caller.credential, self._proofs, tuple[str, ...]()
        if caller.certificate is not None and proofs is not None:
            links = proofs.credentials.links(f"certificate:{caller.certificate.fingerprint}")
        if text is None or "." in text:
            return links
        if text.startswith(apikeys.PREFIX):
            return links + (proofs.credentials.links(f"key:{apikeys.parse(text).key_id}") if proofs else ())
        return links + self._authority.read(text).link_ids

    def _proven(self) -> Proofs:
        if self._proofs is None:
            raise AetherError("BAD_CREDENTIAL", "cannot use the credential: only tickets are known here")
        return self._proofs

    def bearer(self, caller: Caller, now_ns: int) -> str:
        """Names the principal that a caller acts as, and its ticket. Raises as `admit` does of who asks."""
        shown = self.identify(caller, "tell who asks", now_ns)
        tickets.check_expiry(shown.verified, now_ns // 1_000_000)
        return f"{shown.principal.tenant_id}\0{shown.principal.name}\0{shown.verified.link_ids[-1]}"

    def admit_node(self, operation: str, resource: Resource, now_ns: int) -> Admission:
        """Leave for the instance itself (its workers), by its own ticket."""
        return self.admit_shown(self._implicit.of(None), operation, resource, now_ns)

    def mint(
        self, tenant: str, nonce: bytes, said: tuple[caveats.Caveat, ...], holder: Principal
    ) -> tuple[str, Minted]:
        """A ticket's text, for its holder alone, and what its record says. Raises AetherError BAD_FIELD."""
        text = self._authority.mint(tenant or DEFAULT_TENANT, nonce, said)
        return text, Minted(holder, _ticket_ref(self._authority.verify(text), False), tuple(map(str, said)))

    def text(self, kid: str, tenant: str, nonce: bytes, said: tuple[caveats.Caveat, ...]) -> str:
        """The text of a ticket that was minted before under `kid`. Raises AetherError BAD_FIELD, BAD_TICKET."""
        return self._authority.mint(tenant, nonce, said, kid)

    def read(self, text: str) -> Verified:
        """A ticket of this authority, also one that is revoked or expired; raises BAD_TICKET."""
        return self._authority.read(text)

    def verify(self, text: str) -> Verified:
        """A ticket that holds, but for its caveats; raises BAD_TICKET, TICKET_REVOKED."""
        return self._authority.verify(text)

    def admit_shown(self, shown: Shown, operation: str, resource: Resource, now_ns: int) -> Admission:
        """Leave for whom `identify` found; raises TICKET_EXPIRED, TICKET_DENIED, POLICY_DENIED."""
        principal, verified, implicit = shown.principal, shown.verified, shown.implicit
        request = Request(
            operation, resource.kind, resource.model, resource.labels, resource.hosts, resource.paths, resource.cells
        )
        tickets.check(verified, request, now_ns // 1_000_000)
        ticket, about = _ticket_ref(verified, implicit), self.describe(principal, operation, resource)
        answer = ask(self.policy, principal, verified.roles, operation, about, now_ns)
        if answer.ref.decision == "deny":
            raise PolicyDeniedError(principal, ticket, answer)
        cells = tuple(caveat.items for link in verified.links for caveat in link if caveat.type == "cells")
        first = next(questions(operation, about))
        demand = demanded(self.policy, principal, verified.roles, first, about.hosts, now_ns)
        labels = tuple(name for link in verified.links for c in link if c.type == "labels" for name in c.items)
        return Admission(principal, ticket, answer.ref, verified.limits, cells, verified.expires_ms, demand, labels)


def _ticket_ref(verified: Verified, implicit: bool) -> TicketRef:
    return TicketRef(kid=verified.kid, role=verified.role, link_ids=verified.link_ids, implicit=implicit)
