"""Rules and addresses: what is allowed, what covers what, what is public."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.contract.network import Credential, Network, NetworkLimits, Rule, check_network, parse_host, parse_rule
from aether.egress.rules import RefusedError, Rules, is_public

LABEL = st.from_regex(r"[a-z][a-z0-9]{0,4}", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
PORT = st.one_of(st.integers(1, 65535).map(str), st.just("*"))
NETWORK = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(lambda t: ipaddress.ip_network(t, strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(0, 128)).map(lambda t: ipaddress.IPv6Network(t, strict=False)),
)
HOST = st.one_of(NAME, NAME.map("*.{}".format), NETWORK.map(lambda n: f"[{n}]" if n.version == 6 else str(n)))
RULE = st.tuples(st.sampled_from(["", "tcp://"]), HOST, PORT).map(lambda t: f"{t[0]}{t[1]}:{t[2]}").map(parse_rule)


@given(RULE)
def test_a_rule_is_what_it_says(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule
    assert rule.covers(rule)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse_rule(text)
    except ValueError:
        return
    assert parse_rule(str(rule)) == rule


@given(RULE, RULE, NAME, st.integers(1, 65535))
def test_what_a_covered_rule_takes_the_covering_takes(wide: Rule, narrow: Rule, name: str, port: int) -> None:
    if not wide.covers(narrow):
        return
    assert wide.tcp or not narrow.tcp
    hosts: list[str | ipaddress.IPv4Address | ipaddress.IPv6Address] = [name]
    if narrow.network is not None:
        hosts += [narrow.network.network_address, narrow.network.broadcast_address]
    else:
        hosts.append(narrow.name.replace("*", name))
    for host in hosts:
        for number in (port, narrow.port or port):
            assert wide.takes(host, number) or not narrow.takes(host, number)


@pytest.mark.parametrize(
    ("granted", "asked", "covered"),
    [
        ("*.example.org", "a.b.example.org:443", True),
        ("*.example.org", "example.org:443", False),
        ("*.example.org", "evilexample.org:443", False),
        ("*.example.org", "*.b.example.org:443", True),
        ("b.example.org", "*.b.example.org:443", False),
        ("example.org:443", "example.org:444", False),
        ("example.org:443", "example.org:*", False),
        ("example.org", "tcp://example.org:22", False),
        ("10.0.0.0/8", "10.2.0.0/16:80", True),
        ("10.2.0.0/16", "10.0.0.0/8:80", False),
        ("*", "*:*", True),
        ("*.org", "*:*", False),
    ],
)
def test_covering(granted: str, asked: str, covered: bool) -> None:
    assert parse_rule(granted, any_port=True).covers(parse_rule(asked, any_port=True)) is covered


@pytest.mark.parametrize(
    "text",
    ["", ":443", "example.org", "example.org:0", "example.org:70000", "example.org:٤٤٣", "a..b:1", "127.1:80",
     "0x7f000001:80", "2130706433:80", "http://example.org:80", "*:443", "a*.b:1", "exa mple:1", "é.org:443",
     "10.0.0.1/8:80", "[fe80::1%lo]:80", "-a.org:1", "user@host:1"],
)  # fmt: skip
def test_bad_rules(text: str) -> None:
    with pytest.raises(ValueError):
        parse_rule(text)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "10.1.2.3", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.168.1.1", "100.64.0.1",
     "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16",
     "192.0.2.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::a9fe:a9fe",
     "64:ff9b:1::1", "2002:7f00:1::", "2001:0:4136:e378::", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254",
     "ff02::1", "2001:db8::1"],
)  # fmt: skip
def test_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1"])
def test_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def rules(*allow: str, learn: bool = False) -> Rules:
    return Rules(Network(allow=allow, learn=learn))


def reason(call: object, *args: object) -> str:
    with pytest.raises(RefusedError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.reason


def test_addresses_need_a_rule_of_their_own() -> None:
    of = rules("example.org:443", "10.1.0.0/16:443")
    of.check_host("example.org", 443)
    of.check_address(ipaddress.ip_address("10.1.2.3"), 443)
    assert reason(of.check_address, ipaddress.ip_address("10.1.2.3"), 80) == "address"
    assert reason(of.check_address, ipaddress.ip_address("10.2.2.3"), 443) == "address"
    assert reason(of.check_host, ipaddress.ip_address("93.184.216.34"), 443) == "not-allowed"
    assert reason(of.check_host, "example.org", 80) == "not-allowed"


def test_learning_takes_what_is_public_and_nothing_else() -> None:
    of = rules(learn=True)
    assert of.check_host("anything.test", 1234).rule == "*:*"
    assert of.check_host(ipaddress.ip_address("8.8.8.8"), 53).rule == "*:*"
    assert reason(of.check_host, ipaddress.ip_address("127.0.0.1"), 80) == "not-allowed"
    assert reason(of.check_address, ipaddress.ip_address("169.254.169.254"), 80) == "address"


def test_hosts_a_client_names() -> None:
    assert parse_host("EXAMPLE.org.") == "example.org"
    assert parse_host("[::1]") == ipaddress.ip_address("::1")
    for text in ("127.1", "0177.0.0.1", "1", "0x1", "[::1", "::1%lo", "a b", "", ".", "x" * 64 + ".org"):
        with pytest.raises(ValueError):
            parse_host(text)


def cred(**changes: str) -> Credential:
    fields = {
        "name": "api",
        "host": "api.test:443",
        "header": "Authorization",
        "source": "env:AETHER_SECRET_KEY",
    } | changes
    return Credential(**fields)


@pytest.mark.parametrize(
    "network",
    [
        Network(),
        Network(allow=("nonsense",)),
        Network(allow=tuple(f"a{n}.test:1" for n in range(200))),
        Network(credentials=(cred(), cred())),
        Network(credentials=(cred(name="A"),)),
        Network(credentials=(cred(name="a.b"),)),
        Network(credentials=(cred(host="*.test:443"),)),
        Network(credentials=(cred(host="10.0.0.0/8:443"),)),
        Network(credentials=(cred(host="api.test:*"),)),
        Network(credentials=(cred(host="tcp://api.test:443"),)),
        Network(credentials=(cred(host="API.test:443"),)),
        Network(credentials=(cred(header="Host"),)),
        Network(credentials=(cred(header="a b"),)),
        Network(credentials=(cred(header="transfer-encoding"),)),
        Network(credentials=(cred(source="file:relative"),)),
        Network(credentials=(cred(source="file:/a/../b"),)),
        Network(credentials=(cred(source="/etc/shadow"),)),
        Network(credentials=(cred(source="env:PATH"),)),
        Network(credentials=(cred(prefix="a\r\nb"),)),
        Network(allow=("a.test:1",), limits=NetworkLimits(connections=0)),
    ],
)
def test_networks_that_are_refused(network: Network) -> None:
    with pytest.raises(AetherError) as caught:
        check_network(network)
    assert caught.value.code == "BAD_FIELD"


def test_hosts_are_all_that_is_asked_for() -> None:
    network = Network(allow=("B.test:80", "10.0.0.0/8:*"), credentials=(cred(),), learn=True)
    check_network(network)
    assert network.hosts() == ("*:*", "10.0.0.0/8:*", "api.test:443", "b.test:80")
