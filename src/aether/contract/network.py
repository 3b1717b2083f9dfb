"""What a cell may reach: rules, credentials by reference, limits. Pure; both the authority and egressd read it.

A rule is `[tcp://]HOST:PORT`. HOST is a name, `*.suffix` (any name below it, not the suffix itself), an address
(IPv6 in brackets) or a network `a.b.c.d/n`; PORT is a number or `*`. Without `tcp://` only TLS whose ClientHello
names the host, or plain HTTP whose Host does, passes; with it any bytes. An empty list allows nothing.

Names are compared in lower case without a trailing dot. A name whose last label is a number is refused, since
resolvers read such names as addresses in notations of their own (inet_aton(3), WHATWG URL "ends in a number").
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

import msgspec

from aether.contract import limits
from aether.contract.errors import AetherError
from aether.contract.secrets import check_source, path_of

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
NEEDED: Final = ("cell", "netns")
"""What a cell with a network must have: without them it would share the host's."""
LEARN: Final = "*:*"
"""The host a learning job declares: a caveat or a policy that names hosts sees that it wants any."""
INTERNAL: Final = ".internal"
"""A credential NAME is spoken to as http://NAME.internal/, which egressd forwards to its host over TLS."""
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_CREDENTIAL_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
FORBIDDEN_HEADERS: Final = frozenset(
    {"host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect"}
)
"""What frames or routes a message can carry no credential."""


class NetworkLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of one cell's traffic. `sent_bytes` leave the cell, `received_bytes` come in; both for its whole life."""

    connections: int = limits.EGRESS_CONNECTIONS_DEFAULT
    requests_per_s: int = limits.EGRESS_REQUESTS_PER_S_DEFAULT
    sent_bytes: int = limits.EGRESS_BYTES_DEFAULT
    received_bytes: int = limits.EGRESS_BYTES_DEFAULT
    connection_ms: int = limits.EGRESS_CONNECTION_MS_DEFAULT
    idle_ms: int = limits.EGRESS_IDLE_MS_DEFAULT


class Credential(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A secret by reference, sent as `header` to `host` (`name:port`, over verified TLS) and nowhere else.

    `source` is a reference (`contract.secrets`), resolved by egressd; `prefix` goes before its value (`Bearer `).
    """

    name: str
    host: str
    header: str
    source: str
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a network asks leave for: `hosts` as rules, `credentials` as `host:port source`, `paths` as `r:/path`."""

    hosts: tuple[str, ...] = ()
    credentials: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


NOTHING: Final = Wanted()


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`params.network` of a command job. `intercept`: credentials are also put into TLS to their own hosts, which the
    proxy then ends with a certificate authority of this one cell. `learn`: every public host is allowed and noted.
    """

    allow: tuple[str, ...] = ()
    credentials: tuple[Credential, ...] = ()
    intercept: bool = False
    learn: bool = False
    limits: NetworkLimits = NetworkLimits()

    def hosts(self) -> tuple[str, ...]:
        """All that the cell may speak to, as rules: what tickets narrow and policies read."""
        asked = {str(parse_rule(text)) for text in self.allow} | {credential.host for credential in self.credentials}
        return tuple(sorted(asked | ({LEARN} if self.learn else set())))

    def wanted(self) -> Wanted:
        """What an authority is asked to allow."""
        sources = [credential.source for credential in self.credentials]
        return Wanted(
            self.hosts(),
            tuple(f"{credential.host} {credential.source}" for credential in self.credentials),
            tuple(f"r:{path}" for source in sources if (path := path_of(source)) is not None),
        )

    def lines(self) -> tuple[str, ...]:
        """The network in words, for `aether cell explain`."""
        told = [f"network: {host} through egressd" for host in self.hosts()]
        for credential in self.credentials:
            way = f"http://{credential.name}{INTERNAL}/" + (f" and https://{credential.host}" if self.intercept else "")
            told.append(
                f"network: {credential.header} for {credential.host} from {credential.source}, spoken to as {way}"
            )
        return tuple(told)


@dataclass(frozen=True, slots=True)
class Rule:
    """One parsed rule: either `name` (perhaps `*.suffix`, or `*`) or `network`; `port` None is any."""

    name: str
    network: IPNetwork | None
    port: int | None
    tcp: bool = False

    def __str__(self) -> str:
        host = self.name
        if self.network is not None:
            single = self.network.prefixlen == self.network.max_prefixlen
            host = str(self.network.network_address if single else self.network)
            host = f"[{host}]" if self.network.version == 6 else host
        return f"{'tcp://' if self.tcp else ''}{host}:{'*' if self.port is None else self.port}"

    def takes(self, host: str | Address, port: int) -> bool:
        """Whether a destination, a normalised name or an address, falls under this rule."""
        if self.port not in (None, port):
            return False
        if isinstance(host, str):
            return self.network is None and _name_within(host, self.name)
        return self.network is not None and host.version == self.network.version and host in self.network

    def covers(self, asked: Rule) -> bool:
        """Whether everything that `asked` takes falls under this rule too; `tcp://` covers both."""
        if self.port not in (None, asked.port) or (asked.tcp and not self.tcp):
            return False
        if self.network is None or asked.network is None:
            return self.network is None and (self.name == "*" or _covers_name(self, asked))
        mine, theirs = self.network, asked.network
        if isinstance(mine, ipaddress.IPv4Network) and isinstance(theirs, ipaddress.IPv4Network):
            return theirs.subnet_of(mine)
        if isinstance(mine, ipaddress.IPv6Network) and isinstance(theirs, ipaddress.IPv6Network):
            return theirs.subnet_of(mine)
        return False


def _name_within(name: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    return name.endswith(pattern[1:]) and len(name) >= len(pattern) if pattern.startswith("*.") else name == pattern


def _covers_name(mine: Rule, asked: Rule) -> bool:
    if asked.network is not None:
        return False
    if asked.name.startswith("*."):
        return mine.name.startswith("*.") and asked.name.endswith(mine.name[1:])
    return _name_within(asked.name, mine.name)


def parse_host(text: str) -> str | Address:
    """A destination as a client names it: an address, or a name in normal form. Raises ValueError."""
    if text.startswith("["):
        if not text.endswith("]"):
            raise ValueError("a bracket is open")
        return _unscoped(ipaddress.IPv6Address(text[1:-1]))
    try:
        return _unscoped(ipaddress.ip_address(text))
    except ValueError:
        return parse_name(text)


def _unscoped(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise ValueError("an address with a zone is this machine's own affair")
    return address


def parse_name(text: str) -> str:
    """A host name in normal form; raises ValueError."""
    name = text.lower().removesuffix(".")
    parts = name.split(".")
    if not 0 < len(name) <= 253 or any(_LABEL.fullmatch(part) is None for part in parts):
        raise ValueError("it is no host name")
    if _NUMBER.fullmatch(parts[-1]):
        raise ValueError("it ends in a number")
    return name


def parse_rule(text: str, *, any_port: bool = False) -> Rule:
    """One rule; with `any_port` the port may be left out, and `*` stands for every name (in caveats and policies).

    Raises ValueError.
    """
    tcp = text.startswith("tcp://")
    rest = text.removeprefix("tcp://")
    if len(rest) > 300:
        raise ValueError("it is too long")
    host, port_text = _split_port(rest, any_port)
    port = None if port_text == "*" else parse_port(port_text)
    if host == "*" and any_port:
        return Rule("*", None, port, tcp)
    if host.startswith("*."):
        return Rule("*." + parse_name(host[2:]), None, port, tcp)
    if "%" in host:
        raise ValueError("an address with a zone is this machine's own affair")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return Rule("", ipaddress.ip_network(bare), port, tcp)
    except ValueError as error:
        if "/" in bare or bare is not host:
            raise ValueError(f"it is no network: {error}") from error
    return Rule(parse_name(host), None, port, tcp)


def _split_port(text: str, any_port: bool) -> tuple[str, str]:
    closing = text.rfind("]")
    colon = text.rfind(":")
    if colon > closing and (closing >= 0 or text.count(":") == 1):
        return text[:colon], text[colon + 1 :]
    if any_port:
        return text, "*"
    raise ValueError("it has no port")


def parse_port(text: str) -> int:
    """A port as digits; raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError("its port is not within 1..65535")
    return int(text)


def check_network(network: Network) -> None:
    """What the types do not say; raises AetherError BAD_FIELD."""
    if len(network.allow) > limits.EGRESS_RULES_MAX or len(network.credentials) > limits.EGRESS_CREDENTIALS_MAX:
        raise _bad(
            "network", f"more than {limits.EGRESS_RULES_MAX} rules or {limits.EGRESS_CREDENTIALS_MAX} credentials"
        )
    for text in network.allow:
        try:
            parse_rule(text)
        except ValueError as error:
            raise _bad(f"rule {text[:80]!r}", str(error)) from error
    if len({credential.name for credential in network.credentials}) < len(network.credentials):
        raise _bad("network.credentials", "two have the same name")
    for credential in network.credentials:
        _check_credential(credential)
    _check_limits(network.limits)
    if not (network.allow or network.credentials or network.learn):
        raise _bad("network", "it allows nothing; leave it out")


def _check_credential(credential: Credential) -> None:
    what = f"credential {credential.name[:80]!r}"
    if _CREDENTIAL_NAME.fullmatch(credential.name) is None:
        raise _bad(what, "its name must be one lower-case label, since it is spoken to as NAME.internal")
    try:
        rule = parse_rule(credential.host)
    except ValueError as error:
        raise _bad(what, f"its host {credential.host[:80]!r}: {error}") from error
    single = rule.network is None or rule.network.num_addresses == 1
    if rule.tcp or rule.port is None or rule.name.startswith("*") or not single or str(rule) != credential.host:
        raise _bad(what, f"its host must be one name and port in normal form, not {credential.host[:80]!r}")
    if _TOKEN.fullmatch(credential.header) is None or credential.header.lower() in FORBIDDEN_HEADERS:
        raise _bad(what, f"{credential.header[:80]!r} is no header that can carry it")
    check_source(what, credential.source)
    if len(credential.prefix) > 64 or not credential.prefix.isprintable() or not credential.prefix.isascii():
        raise _bad(what, "its prefix must be at most 64 printable characters")


def _check_limits(asked: NetworkLimits) -> None:
    bounds = {
        "connections": (1, limits.EGRESS_CONNECTIONS_MAX),
        "requests_per_s": (1, limits.EGRESS_REQUESTS_PER_S_MAX),
        "sent_bytes": (0, 1 << 50),
        "received_bytes": (0, 1 << 50),
        "connection_ms": (1, limits.TIMEOUT_MS_MAX),
        "idle_ms": (1, limits.TIMEOUT_MS_MAX),
    }
    for name, (low, high) in bounds.items():
        value = getattr(asked, name)
        if not low <= value <= high:
            raise _bad(f"network.limits.{name} = {value}", f"not within {low}..{high}")


def _bad(what: str, why: str) -> AetherError:
    return AetherError("BAD_FIELD", f"cannot accept {what}: {why}")
