"""The whole check: implicit and shown tickets, roles, refusals with their codes, what is minted."""

from __future__ import annotations

import pytest

from aether.contract import caveats as c
from aether.contract.calls import Caller
from aether.contract.errors import AetherError
from aether.contract.tickets import attenuate
from aether.substrate.access.access import Access, Minted, Resource
from aether.substrate.access.identity import principal_of
from aether.substrate.access.keyfile import Keys
from aether.substrate.access.policy import Policy

NOW_NS = 1_790_000_000_000_000_000
COMMAND = Resource(kind="command", op="run")
POLICY = Policy.default()


class Kit:
    """An Access with operator 1000, and what it minted."""

    def __init__(self, secret: bytes = b"s" * 32) -> None:
        self.minted: list[Minted] = []
        self.full = False
        self.revoked: set[str] = set()
        self.access = Access.create(Keys(secret, {"e1": secret}), POLICY, {1000}, self._on_minted, self.revoked)

    def _on_minted(self, minted: Minted) -> None:
        if self.full:
            raise AetherError("DISK_FULL", "cannot record")
        self.minted.append(minted)

    def admit(self, uid: int, operation: str = "job.submit", resource: Resource = COMMAND, ticket: str | None = None):  # type: ignore[no-untyped-def]
        caller = Caller(uid=uid, gid=uid, pid=1, credential=ticket, request_id="r")
        return self.access.admit(caller, operation, resource, NOW_NS)

    def ticket(self, *said: c.Caveat, tenant: str = "lab") -> str:
        return self.access.mint(tenant, b"n" * 16, said, principal_of(1000, "default"))[0]

    def refused(self, *arguments: object, **named: object) -> AetherError:
        with pytest.raises(AetherError) as caught:
            self.admit(*arguments, **named)  # type: ignore[arg-type]
        return caught.value


def test_implicit_tickets_follow_the_uid() -> None:
    kit = Kit()
    assert [kit.admit(uid).ticket.role for uid in (0, 1000, 1001)] == ["queen", "queen", "user"]
    assert [kit.admit(uid).principal.tenant_id for uid in (0, 1000, 1001)] == ["default", "default", "uid-1001"]
    assert len({kit.admit(uid).ticket.link_ids for uid in (0, 1000, 1001)}) == 3
    assert [minted.principal.name for minted in kit.minted] == ["uid:0", "uid:1000", "uid:1001"]
    assert kit.minted[0].detail() == {"caveats": "role=queen"}
    assert kit.refused(-1).code == "UNAUTHENTICATED"
    assert kit.refused(1001, "policy.load", Resource(kind="node")).code == "POLICY_DENIED"


def test_implicit_tickets_are_the_same_after_a_restart() -> None:
    assert Kit().admit(1001).ticket == Kit().admit(1001).ticket
    assert Kit().admit(1001).ticket != Kit(b"o" * 32).admit(1001).ticket


def test_minting_that_cannot_be_recorded_is_offered_again() -> None:
    kit = Kit()
    kit.full = True
    kit.admit(1001, "job.get", Resource(kind="job"))
    kit.full = False
    kit.admit(1001)
    kit.admit(1001)
    assert len(kit.minted) == 1


def test_a_shown_ticket_decides_tenant_and_role_not_the_uid() -> None:
    kit = Kit()
    admission = kit.admit(0, ticket=kit.ticket(c.role("user"), c.budget("ops", 5)))
    assert (admission.principal.name, admission.principal.tenant_id) == ("uid:0", "lab")
    assert (admission.ticket.role, admission.ticket.implicit) == ("user", False)
    assert [limit.amount for limit in admission.limits] == [5]
    assert admission.policy.determining == ("user-submit",)
    assert kit.minted == []


def test_refusals_have_their_codes() -> None:
    kit = Kit()
    ticket = kit.ticket(c.role("user"), c.kinds("command"))
    assert kit.refused(5, ticket="aetk1_x").code == "BAD_TICKET"
    assert kit.refused(5, ticket="").code == "BAD_TICKET"
    assert kit.refused(5, resource=Resource(kind="model", model="m"), ticket=ticket).code == "TICKET_DENIED"
    expired = attenuate(ticket, (c.expires(NOW_NS // 1_000_000),))
    assert kit.refused(5, ticket=expired).code == "TICKET_EXPIRED"
    denied = kit.refused(5, "policy.load", Resource(kind="node"), ticket=ticket)
    assert denied.code == "POLICY_DENIED" and denied.details["policy_digest"] == POLICY.digest
    link = kit.admit(5, ticket=ticket).ticket.link_ids[0]
    kit.revoked.add(link)
    assert kit.refused(5, ticket=attenuate(ticket, ())).code == "TICKET_REVOKED"


def test_naming_another_role_never_adds_to_the_first() -> None:
    kit = Kit()
    user = kit.ticket(c.role("user"))
    for narrowed in (attenuate(user, (c.role("queen"),)), attenuate(user, (c.role("nobody"), c.role("queen")))):
        assert kit.refused(5, "policy.load", Resource(kind="node"), ticket=narrowed).code == "POLICY_DENIED"
    queen = kit.ticket(c.role("queen"))
    kit.admit(5, "policy.load", Resource(kind="node"), ticket=queen)
    as_user = attenuate(queen, (c.role("user"),))
    assert kit.refused(5, "policy.load", Resource(kind="node"), ticket=as_user).code == "POLICY_DENIED"
    assert kit.admit(5, ticket=as_user).ticket.role == "user"


def test_the_node_acts_as_itself() -> None:
    kit = Kit()
    admission = kit.access.admit_node("job.submit", Resource(kind="model", op="serve", model="m"), NOW_NS)
    assert (admission.principal.name, admission.ticket.role) == ("node", "node")
    with pytest.raises(AetherError, match="POLICY_DENIED"):
        kit.access.admit_node("job.submit", COMMAND, NOW_NS)


def test_a_replaced_policy_counts_at_once() -> None:
    kit = Kit()
    kit.admit(1001)
    kit.access.policy = Policy.load("")
    assert kit.refused(1001).code == "POLICY_DENIED"


def reaching(*hosts: str, credentials: tuple[str, ...] = (), labels: tuple[str, ...] = ()) -> Resource:
    return Resource(kind="command", op="run", hosts=hosts, credentials=credentials, labels=labels)


def test_a_network_is_a_question_of_its_own() -> None:
    kit = Kit()
    admission = kit.admit(1001, resource=reaching("a.test:443"))
    assert admission.policy.determining == ("user-network", "user-submit")
    secret = ("a.test:443 file:/etc/key",)
    assert kit.refused(1001, resource=reaching("*:*")).code == "POLICY_DENIED"
    assert "job.credential" in kit.refused(1001, resource=reaching("a.test:443", credentials=secret)).message
    assert kit.admit(1000, resource=reaching("*:*", credentials=secret)).policy.determining == ("operator",)
    stays = kit.refused(1000, resource=reaching("a.test:443", labels=("local-only",)))
    assert stays.details["policies"] == "local-only-has-no-network"


def test_a_ticket_narrows_hosts_and_a_policy_may_read_them() -> None:
    kit = Kit()
    ticket = kit.ticket(c.role("queen"), c.hosts("*.a.test:443"))
    kit.admit(5, resource=reaching("x.a.test:443"), ticket=ticket)
    kit.admit(5, ticket=ticket)
    for host in ("x.a.test:80", "b.test:443", "*:*", "*.test:443"):
        assert kit.refused(5, resource=reaching(host), ticket=ticket).code == "TICKET_DENIED"
    text = POLICY.text + '@id("no-b")forbid(principal, action == Action::"job.network", resource)'
    text += 'when{context.hosts.contains("b.test:443")};'
    text += '@id("lent")permit(principal in Role::"user", action == Action::"job.credential", resource)'
    kit.access.policy = Policy.load(text + 'when{context.id == "a.test:443 env:KEY"};')
    assert kit.refused(1000, resource=reaching("a.test:443", "b.test:443")).details["policies"] == "no-b"
    kit.admit(1001, resource=reaching("a.test:443", credentials=("a.test:443 env:KEY",)))
    assert kit.refused(1001, resource=reaching("b.test:443", credentials=("evil.test:443 env:KEY",)))


def test_going_before_others_is_a_question_of_its_own() -> None:
    kit = Kit()
    raised = Resource(kind="command", op="run", raises=True)
    assert kit.admit(1000, resource=raised).policy.determining == ("operator",)
    refused = kit.refused(1001, "job.submit", raised)
    assert refused.code == "POLICY_DENIED" and "cell.prioritize" in refused.message
    text = (
        POLICY.text + '@id("urgent")permit(principal in Role::"user", action == Action::"cell.prioritize", resource);'
    )
    kit.access.policy = Policy(text)
    assert kit.admit(1001, resource=raised).policy.determining == ("urgent", "user-submit")
