"""Tickets: a narrower one never widens, a changed one never verifies, hostile text never surprises."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract import caveats as c
from aether.contract import tickets as texts
from aether.contract.caveats import Caveat, Request
from aether.contract.errors import AetherError
from aether.contract.tickets import attenuate
from aether.contract.units import UNITS
from aether.substrate.access.keyfile import settle
from aether.substrate.access.tickets import Tickets, check

SECRET = b"s" * 32
NONCE = bytes(16)
NOW_MS = 1_790_000_000_000
AUTHORITY = Tickets({"e1": SECRET}, "e1")
PLAIN = AUTHORITY.mint("default", NONCE, (c.role("user"),))

NAMES = st.sampled_from(
    ["job.submit", "job.get", "job.*", "*", "command", "model", "m", "m@1", "m@*", "local-only", ""]
)
LISTS = st.lists(NAMES, max_size=4).map(tuple)
CAVEATS = st.one_of(
    st.builds(Caveat, st.sampled_from(["operations", "kinds", "models", "labels", "hosts"]), LISTS),
    st.builds(c.paths, st.sampled_from(["r:/work", "rw:/work/a", "rwx:/", "r:/work/../etc"])),
    st.builds(c.role, st.sampled_from(["user", "queen"])),
    st.builds(c.expires, st.integers(NOW_MS - 2, NOW_MS + 2)),
    st.builds(c.budget, st.sampled_from(UNITS), st.integers(0, 2**64 - 1)),
)
REQUESTS = st.builds(
    Request,
    operation=st.sampled_from(["job.submit", "job.get", "cell.explain", "health"]),
    kind=st.sampled_from(["command", "model", "job", None]),
    model=st.sampled_from(["m", "m@1", "m@2", "n", None]),
    labels=st.lists(st.sampled_from(["local-only", "pii"]), max_size=2).map(tuple),
    hosts=st.lists(st.sampled_from(["m", "x.org"]), max_size=2).map(tuple),
    paths=st.lists(st.sampled_from(["r:/work/a/b", "w:/work/a", "r:/work/../etc", "x:/workx", "r:rel"])).map(tuple),
)


def allowed(text: str, request: Request, now_ms: int = NOW_MS) -> bool:
    try:
        check(AUTHORITY.verify(text), request, now_ms)
    except AetherError as error:
        assert error.code in ("TICKET_DENIED", "TICKET_EXPIRED")
        return False
    return True


def refused(text: str) -> str:
    with pytest.raises(AetherError) as caught:
        AUTHORITY.verify(text)
    assert "aetk1_" not in str(caught.value)
    return caught.value.code


@given(st.lists(st.lists(CAVEATS, max_size=3), max_size=4), REQUESTS)
@settings(max_examples=400, deadline=None)
def test_a_narrower_ticket_never_widens(blocks: list[list[Caveat]], request: Request) -> None:
    text = PLAIN
    for block in blocks:
        narrower = attenuate(text, block)
        before, after = AUTHORITY.verify(text), AUTHORITY.verify(narrower)
        assert not allowed(narrower, request) or allowed(text, request)
        assert set(before.roles) <= set(after.roles) and before.limits == after.limits[: len(before.limits)]
        assert after.link_ids[:-1] == before.link_ids and after.tenant == before.tenant
        text = narrower


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    text = attenuate(PLAIN, (c.kinds("command"), c.budget("ops", 3)))
    raw = bytearray(base64.urlsafe_b64decode(text[6:] + "=" * (-len(text[6:]) % 4)))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    assert refused("aetk1_" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()) == "BAD_TICKET"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_links_cannot_be_removed_reordered_or_invented(data: st.DataObject) -> None:
    text = attenuate(attenuate(PLAIN, (c.kinds("command"),)), (c.expires(NOW_MS),))
    parts = texts.parse(text)
    blocks = data.draw(st.lists(st.sampled_from([*parts.blocks, b"\x00\x00"]), max_size=4))
    if tuple(blocks) != parts.blocks:
        forged = texts.write(b"".join((parts.header, *blocks, parts.tag)))
        assert refused(forged) == "BAD_TICKET"


@given(st.one_of(st.text(max_size=80), st.binary(max_size=120).map(lambda raw: texts.write(raw))))
@settings(max_examples=300, deadline=None)
def test_hostile_text_is_only_ever_a_bad_ticket(text: str) -> None:
    assert refused(text) == "BAD_TICKET"
    with pytest.raises(AetherError, match="BAD_TICKET"):
        attenuate(text, ())


@given(st.binary(max_size=80))
@settings(max_examples=300)
def test_hostile_caveats_are_values_or_nothing(block: bytes) -> None:
    try:
        found = c.decode(block)
    except ValueError:
        return
    for caveat in found:
        c.allows(caveat, Request("job.submit"), NOW_MS)
        assert str(caveat)


def test_the_spelling_is_unique() -> None:
    for change in (PLAIN + "=", PLAIN.upper(), " " + PLAIN, PLAIN + "\n", PLAIN.replace("aetk1_", "aetk2_")):
        assert refused(change) == "BAD_TICKET"
    raw = texts._decode(PLAIN)
    padded = next(text for n in range(3) if len(text := _widen(n)) % 4 in (2, 3))
    assert raw and refused(padded[:-1] + chr(ord(padded[-1]) + 1)) == "BAD_TICKET"


def _widen(count: int) -> str:
    return AUTHORITY.mint("t" * (1 + count), NONCE, (c.role("user"),))[6:]


def test_unknown_caveats_deny() -> None:
    parts = texts.parse(PLAIN)
    block = b"\x00\x04\xc8\x00\x01x"
    tag = hmac.digest(parts.tag, block, "sha256")
    text = texts.write(b"".join((parts.header, *parts.blocks, block, tag)))
    assert AUTHORITY.verify(text).links[1] == (Caveat("unknown"),)
    assert not allowed(text, Request("health"))


def test_the_construction_is_the_documented_one() -> None:
    parts = texts.parse(PLAIN)
    key = AUTHORITY._key("e1", "default")
    assert parts.tag == hmac.digest(key, b"aetk1\x00" + parts.header + parts.blocks[0], "sha256")
    assert AUTHORITY.verify(PLAIN).link_ids == (hashlib.sha256(parts.tag).hexdigest()[:32],)


@pytest.mark.parametrize(
    ("said", "request_", "expected"),
    [
        (c.operations("job.*"), Request("job.get"), True),
        (c.operations("job.*"), Request("artifact.get"), False),
        (c.operations(), Request("health"), False),
        (c.kinds("command"), Request("job.submit", "model"), False),
        (c.kinds("command"), Request("job.get", "job"), True),
        (c.models("m"), Request("job.submit", "model", "m@2"), True),
        (c.models("m@1"), Request("job.submit", "model", "m"), False),
        (c.models("m"), Request("job.submit", "model", None), False),
        (c.models("m"), Request("job.submit", "command"), True),
        (c.labels("local-only"), Request("job.submit", "command"), False),
        (c.labels("local-only"), Request("job.submit", "command", labels=("a", "local-only")), True),
        (c.paths("r:/work"), Request("job.submit", "command", paths=("r:/work/a",)), True),
        (c.paths("r:/work"), Request("job.submit", "command", paths=("rw:/work/a",)), False),
        (c.paths("r:/work"), Request("job.submit", "command", paths=("r:/work/../etc",)), False),
        (c.paths("r:/work"), Request("job.submit", "command", paths=("r:/workshop",)), False),
        (c.hosts("*.x.org"), Request("job.submit", "command", hosts=("a.x.org:443",)), True),
        (c.hosts("*.x.org:443"), Request("job.submit", "command", hosts=("a.x.org:80",)), False),
        (c.hosts("*.x.org"), Request("job.submit", "command", hosts=("x.org:443",)), False),
        (c.hosts("*.x.org"), Request("job.submit", "command", hosts=("a.x.org:443", "y.org:443")), False),
        (c.hosts("x.org"), Request("job.submit", "command", hosts=("*:*",)), False),
        (c.hosts("10.0.0.0/8"), Request("job.submit", "command", hosts=("10.1.0.0/16:80",)), True),
        (c.hosts("x.org"), Request("job.submit", "command", hosts=("tcp://x.org:22",)), False),
        (c.hosts(), Request("job.submit", "command", hosts=("x.org:443",)), False),
        (c.hosts(), Request("job.submit", "command"), True),
        (c.expires(NOW_MS + 1), Request("health"), True),
        (c.expires(NOW_MS), Request("health"), False),
    ],
)
def test_what_caveats_allow(said: Caveat, request_: Request, expected: bool) -> None:
    assert allowed(attenuate(PLAIN, (said,)), request_) is expected


def test_revoking_a_link_refuses_what_derives_from_it() -> None:
    revoked: set[str] = set()
    authority = Tickets({"e1": SECRET}, "e1", revoked)
    parent = authority.mint("default", NONCE, (c.role("user"),))
    child = attenuate(parent, (c.kinds("command"),))
    revoked.add(authority.verify(child).link_ids[-1])
    authority.verify(parent)
    with pytest.raises(AetherError, match="TICKET_REVOKED"):
        authority.verify(child)
    revoked.add(authority.verify(parent).link_ids[0])
    for text in (parent, child):
        with pytest.raises(AetherError, match="TICKET_REVOKED"):
            authority.verify(text)


def test_tenants_and_epochs_have_their_own_keys() -> None:
    other = Tickets({"e2": b"o" * 32, "e1": SECRET}, "e2")
    assert other.verify(PLAIN).kid == "e1"
    assert refused(other.mint("default", NONCE, (c.role("user"),))) == "BAD_TICKET"
    parts = texts.parse(PLAIN)
    header = parts.header.replace(b"\x07default", b"\x07attackr")
    assert refused(texts.write(b"".join((header, *parts.blocks, parts.tag)))) == "BAD_TICKET"


def test_what_cannot_be_minted() -> None:
    for said in ((), (c.role("a"), c.role("b"))):
        with pytest.raises(AetherError, match="one role"):
            AUTHORITY.mint("default", NONCE, said)
    for said in ((c.budget("gold", 1),), (c.expires(-1),), (c.operations("x" * 70_000),), (Caveat("nonsense"),)):
        with pytest.raises(AetherError, match="BAD_FIELD"):
            attenuate(PLAIN, said)
    text = PLAIN
    for _ in range(texts.LINKS_MAX - 1):
        text = attenuate(text, ())
    AUTHORITY.verify(text)
    with pytest.raises(AetherError, match="links already"):
        attenuate(text, ())


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys/tickets.key"
    first = settle(path, 1, set())
    assert settle(path, 1, set()) == first and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(first.epochs) == ["e1"] and first.implicit != first.epochs["e1"]
    second = settle(path, 2, {"e1"})
    assert list(second.epochs) == ["e1", "e2"] and second.newest == "e2" and second.implicit == first.implicit
    assert second.epochs["e1"] == first.epochs["e1"] != second.epochs["e2"]
    assert settle(path, 2, {"e1"}) == second and settle(path, 1, {"e1"}) == second, "a newer key is not thrown away"
    third = settle(path, 3, {"e2"})
    assert list(third.epochs) == ["e2", "e3"] and list(settle(path, 3, set()).epochs) == ["e3"]
    assert "secret" not in repr(third) and third.implicit.hex() not in repr(third)


def test_a_key_file_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "tickets.key"
    good = settle(path, 1, set())
    path.chmod(0o644)
    with pytest.raises(AetherError, match="others can read"):
        settle(path, 1, set())
    path.chmod(0o600)
    line = "ab" * 32
    short = good.implicit.hex()[:-2]
    malformed = ("", "zz", line, "e1 00", f"e1 {line}", f"x {line}")
    after_one = ("", f"e0 {line}", f"e2 {line}\ne1 {line}", f"e1 {short}", "e1")
    for bad in (*malformed, *(f"implicit {line}\n{rest}" for rest in after_one)):
        path.write_text(bad)
        with pytest.raises(AetherError, match="malformed"):
            settle(path, 1, set())


def test_another_key_leaves_earlier_tickets_as_they_are_until_it_is_dropped() -> None:
    authority = Tickets({"e1": SECRET}, "e1")
    old = authority.mint("default", NONCE, (c.role("user"),))
    authority.rekey({"e1": SECRET, "e2": b"o" * 32}, "e2")
    new = authority.mint("default", NONCE, (c.role("user"),))
    assert authority.verify(old).kid == "e1" and authority.verify(new).kid == "e2" and old != new
    assert authority.mint("default", NONCE, (c.role("user"),), "e1") == old
    authority.rekey({"e2": b"o" * 32}, "e2")
    assert authority.verify(new).kid == "e2"
    for refused in (lambda: authority.verify(old), lambda: authority.mint("default", NONCE, (c.role("user"),), "e1")):
        with pytest.raises(AetherError, match="not known here"):
            refused()
