"""API keys and certificates as operations: what they stand for, who may make and revoke them, what is kept of them."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from aether.client.identity import new_request
from aether.contract import apikeys, spiffe
from aether.contract import identitycalls as wire
from aether.contract import ticketcalls as ticketwire
from aether.contract.calls import Caller, ListJobsCall, Nothing, PeerCertificate
from aether.contract.errors import AetherError
from aether.contract.jobs import JobState
from aether.contract.limits import CERTIFICATE_MS_MAX
from aether.substrate.cells.drivers.memory import Program, Run
from aether.substrate.pki import certificates
from aether.substrate.pki.store import AuthorityStore
from tests.support import identities
from tests.support.onenode import STRANGER, OneNode, caller, command, running

HOUR_MS = 3_600_000


async def ok(run: Run) -> int:
    return 0


async def forever(run: Run) -> int:
    await asyncio.sleep(600)
    return 0


PROGRAMS: dict[str, Program] = {"ok": ok, "forever": forever}
Step = Callable[[OneNode], Awaitable[None]]


def on_node(directory: Path, step: Step) -> None:
    async def main() -> None:
        async with running(directory, PROGRAMS) as node:
            await step(node)

    asyncio.run(main())


async def create(node: OneNode, by: Caller | None = None, **fields: Any) -> wire.CreatedKey:
    made = await node.call("key.create", by or caller(), wire.KeyCall(request=wire.KeyRequest(**fields)))
    assert isinstance(made, wire.CreatedKey)
    return made


async def issue(node: OneNode, name: str = "agent", by: Caller | None = None, **fields: Any) -> wire.IssuedCertificate:
    await node.call("pki.init", caller(), wire.InitCall(request=wire.InitRequest()))
    request = wire.IssueRequest(**{"name": name, "csr": new_request(name)[1], **fields})
    issued = await node.call("pki.issue", by or caller(), wire.IssueCall(request=request))
    assert isinstance(issued, wire.IssuedCertificate)
    return issued


def shows(issued: wire.IssuedCertificate, **changed: Any) -> Caller:
    """A caller whose TLS handshake proved the certificate."""
    leaf = x509.load_pem_x509_certificate(issued.certificate.encode())
    begins, ends = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    proven = PeerCertificate(
        fingerprint=certificates.fingerprint(leaf),
        not_before_ms=int(begins.timestamp() * 1000),
        not_after_ms=int(ends.timestamp() * 1000),
    )
    return replace(caller(STRANGER), certificate=replace(proven, **changed))


async def restarted(node: OneNode) -> None:
    await node.kill_aetherd()
    await node.start_aetherd()
    await node.connected()


async def refused(work: Awaitable[Any]) -> str:
    with pytest.raises(AetherError) as caught:
        await work
    return caught.value.code


def jobs(node: OneNode, by: Caller) -> Awaitable[Any]:
    return node.call("job.list", by, ListJobsCall())


def test_a_key_is_a_principal_within_what_it_says(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        made = await create(node, name="ci", role="user", operations=("job.*",), budget={"ops": 2})
        holder = caller(STRANGER, ticket=made.key)
        done = await node.submit(command("ok"), by=holder)
        assert done.principal == f"key:{made.key_id}" and done.tenant_id == "default"
        await node.submit(command("ok"), by=holder)
        assert await refused(node.submit(command("ok"), by=holder)) == "BUDGET_EXHAUSTED"
        assert await refused(node.call("cell.list", holder, Nothing())) == "TICKET_DENIED"
        assert await refused(create(node, holder)) == "TICKET_DENIED", "it is no way to a wider one"
        (listed,) = (await node.call("key.list", caller(), Nothing())).keys
        assert listed.name == "ci" and [(b.unit, b.spent, b.limit) for b in listed.budget] == [("ops", 2, 2)]

    on_node(tmp_path, step)


def test_of_a_key_only_a_hash_is_kept(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        made = await create(node)
        assert made.key is not None
        await node.submit(command("ok"), by=caller(ticket=made.key))
        (record,) = await node.records("key.created")
        secret = made.key.rpartition("_")[2]
        assert made.key_id in str(record) and secret[:20] not in str(await node.records())
        assert len(record.detail["hash"]) == 64
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or secret.encode() not in path.read_bytes(), path

    on_node(tmp_path, step)


def test_a_key_is_told_once_also_when_the_call_is_repeated(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        by = caller(key="k-1")
        first = await create(node, by, name="a")
        again = await create(node, by, name="a")
        assert first.key is not None and again.key is None and again.key_id == first.key_id
        assert await refused(create(node, by, name="b")) == "IDEMPOTENCY_CONFLICT"

    on_node(tmp_path, step)


def test_a_wrong_or_unknown_key_is_refused_and_recorded(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        made = await create(node)
        assert made.key is not None
        known = apikeys.parse(made.key)
        wrong = [
            apikeys.write(known.key_id, bytes(32)),
            apikeys.write("0" * 16, known.secret),
            made.key + "A",
            "aek1_",
        ]
        for text in wrong:
            assert await refused(jobs(node, caller(STRANGER, ticket=text))) == "BAD_CREDENTIAL"
        denied = await node.records("access.denied")
        assert [r.error.code for r in denied if r.error] == ["BAD_CREDENTIAL"] * 4, "also where it only wanted to read"
        assert not any(text in str(denied) for text in wrong[:3])

    on_node(tmp_path, step)


def test_revoking_a_key_ends_what_it_admitted_and_survives_a_restart(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        made = await create(node)
        holder = caller(STRANGER, ticket=made.key)
        view = await node.submit(command("forever"), by=holder)
        async with asyncio.timeout(10):
            while node.parts.book.ledger.open[view.job_id].started is None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)
        done = await node.call("key.revoke", caller(), wire.RevokeKeyCall(key_id=made.key_id))
        assert done.jobs == 1 and done.link_id == made.link_id
        ended = await node.view(view.job_id, wait_ms=10_000)
        assert ended.state is JobState.CANCELLED and ended.error is not None and ended.error.code == "REVOKED"
        assert await refused(jobs(node, holder)) == "CREDENTIAL_REVOKED"
        await restarted(node)
        assert await refused(jobs(node, holder)) == "CREDENTIAL_REVOKED"

    on_node(tmp_path, step)


def test_a_key_of_another_tenant_is_not_seen_and_a_holder_sees_only_its_own(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        mine, other = await create(node), await create(node)
        stranger = caller(STRANGER)
        assert (await node.call("key.list", stranger, Nothing())).keys == ()
        asked = wire.RevokeKeyCall(key_id=mine.key_id)
        assert await refused(node.call("key.revoke", stranger, asked)) == "NOT_FOUND"
        holder = caller(STRANGER, ticket=mine.key)
        assert [k.key_id for k in (await node.call("key.list", holder, Nothing())).keys] == [mine.key_id]
        assert await refused(node.call("key.revoke", holder, wire.RevokeKeyCall(key_id=other.key_id))) == "NOT_FOUND"
        assert (await node.call("key.revoke", holder, asked)).link_id == mine.link_id, "but may give its own back"

    on_node(tmp_path, step)


def test_a_key_expires(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        made = await create(node, expires_ms=HOUR_MS)
        now_ns = node.parts.book.now_ns()
        node.parts.book.now_ns = lambda: now_ns + 2 * HOUR_MS * 1_000_000
        assert await refused(jobs(node, caller(ticket=made.key))) == "CREDENTIAL_EXPIRED"
        assert (await node.call("key.list", caller(), Nothing())).keys == ()

    on_node(tmp_path, step)


def test_another_role_needs_a_grant_and_bounds_hold(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        stranger = caller(STRANGER)
        assert (await create(node, stranger)).role == "user"
        assert await refused(create(node, stranger, role="queen")) == "POLICY_DENIED"
        assert await refused(create(node, name="a\nb")) == "BAD_FIELD"
        assert await refused(issue(node, "a", expires_ms=CERTIFICATE_MS_MAX + 1)) == "BAD_FIELD"
        for name in ("", "../x", "a//b", "a b", "x" * 65):
            assert await refused(issue(node, name)) == "BAD_FIELD"
        for operation, call in (
            ("pki.init", wire.InitCall(request=wire.InitRequest())),
            ("pki.rotate", wire.RotateCall()),
        ):
            assert await refused(node.call(operation, stranger, call)) == "POLICY_DENIED"

    on_node(tmp_path, step)


def test_a_certificate_is_a_principal_and_its_rights_are_those_of_its_record(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        issued = await issue(node, "team/agent-1", role="user", kinds=("command",))
        assert issued.spiffe_id == "spiffe://aether.internal/default/team/agent-1"
        holder = shows(issued)
        view = await node.submit(command("ok"), by=holder)
        assert view.principal == issued.spiffe_id and view.tenant_id == "default"
        ticket = await node.call(
            "ticket.mint", caller(), ticketwire.MintCall(request=ticketwire.MintRequest(role="user"))
        )
        both = replace(holder, credential=ticket.ticket)
        assert (await node.submit(command("ok"), by=both)).principal == issued.spiffe_id, "a ticket says what, not who"
        stranger = await issue(node, "agent", caller(STRANGER))
        assert stranger.spiffe_id == f"spiffe://aether.internal/uid-{STRANGER}/agent", "no tenant names another's"

    on_node(tmp_path, step)


def test_certificates_that_do_not_hold_are_refused(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        issued = await issue(node)
        now_ms = node.parts.book.now_ns() // 1_000_000
        assert await refused(jobs(node, shows(issued, not_after_ms=now_ms))) == "CREDENTIAL_EXPIRED"
        assert await refused(jobs(node, shows(issued, not_before_ms=now_ms + 5_000))) == "BAD_CREDENTIAL"
        assert await refused(jobs(node, shows(issued, fingerprint="0" * 64))) == "BAD_CREDENTIAL"
        await node.call("pki.revoke", caller(), wire.RevokeCertificateCall(fingerprint=issued.fingerprint))
        assert await refused(jobs(node, shows(issued))) == "CREDENTIAL_REVOKED"
        with_ticket = replace(shows(issued), credential=(await create(node)).key)
        assert await refused(jobs(node, replace(with_ticket, credential=None))) == "CREDENTIAL_REVOKED"
        assert await refused(jobs(node, with_ticket)) == "CREDENTIAL_REVOKED", "nothing makes up for it"

    on_node(tmp_path, step)


def test_an_authority_that_was_replaced_is_trusted_until_its_certificates_ended(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        old = await issue(node, expires_ms=HOUR_MS)
        view = await node.call("pki.rotate", caller(), wire.RotateCall())
        assert [each.state for each in view.authorities] == ["issuing", "trusted"]
        assert view.authorities[1].retires_at == old.expires_at
        new = await issue(node)
        assert new.authority != old.authority and old.bundle in new.bundle
        for each in (old, new):
            await jobs(node, shows(each))
        await restarted(node)
        await jobs(node, shows(old))
        await node.call("pki.rotate", caller(), wire.RotateCall(at_once=True))
        for each in (old, new):
            assert await refused(jobs(node, shows(each))) in ("BAD_CREDENTIAL", "CREDENTIAL_REVOKED")
        keys = node.layout.pki
        assert keys.stat().st_mode & 0o777 == 0o700
        assert [path.stat().st_mode & 0o777 for path in sorted(keys.iterdir())] == [0o600] * 2

    on_node(tmp_path, step)


def test_an_issued_certificate_fits_the_profile(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        issued = await issue(node, expires_ms=HOUR_MS)
        leaf = x509.load_pem_x509_certificate(issued.certificate.encode())
        extensions = leaf.extensions
        assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(purposes) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(n.value) for n in names] == [issued.spiffe_id]
        assert leaf.not_valid_after_utc - dt.datetime.now(dt.UTC) < dt.timedelta(minutes=61)
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(issued.bundle.encode()))

    on_node(tmp_path, step)


def test_a_request_that_proves_no_key_is_refused(tmp_path: Path) -> None:
    async def step(node: OneNode) -> None:
        _, csr = new_request("a")
        broken = csr[:200] + ("A" if csr[200] != "A" else "B") + csr[201:]
        for text in ("", "x", broken, csr[:-80], "-" * 9_000):
            assert await refused(issue(node, "a", csr=text)) == "BAD_FIELD"

    on_node(tmp_path, step)


def test_keys_that_others_can_read_are_not_used(tmp_path: Path) -> None:
    store = AuthorityStore(tmp_path / "pki")
    store.replace("aether.internal", identities.foreign_authority(), None, 0)
    assert AuthorityStore(tmp_path / "pki").issuing.name == store.issuing.name
    next((tmp_path / "pki").glob("*.key")).chmod(0o640)
    with pytest.raises(AetherError, match="others can read"):
        AuthorityStore(tmp_path / "pki")


@given(st.one_of(st.text(max_size=80), st.from_regex(r"aek1_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", fullmatch=True)))
def test_a_key_has_one_spelling(text: str) -> None:
    try:
        key = apikeys.parse(text)
    except AetherError as error:
        assert error.code == "BAD_CREDENTIAL" and (len(text) < 6 or text not in error.message)
    else:
        assert apikeys.write(key.key_id, key.secret) == text


@given(st.one_of(st.text(max_size=60), st.from_regex(r"spiffe://[a-z0-9.-]{1,9}(/[a-z.]{0,4}){0,3}")))
def test_a_spiffe_id_is_read_whole_or_refused(text: str) -> None:
    try:
        found = spiffe.parse(text)
    except AetherError as error:
        assert error.code == "BAD_CREDENTIAL"
    else:
        assert str(found) == text and ".." not in found.path.split("/") and "//" not in found.path
