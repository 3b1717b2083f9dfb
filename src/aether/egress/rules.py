"""What one cell may reach, decided without I/O: first the name, then every address it resolved to.

- A name that no rule takes is refused before it is resolved: a look-up would carry its labels to a stranger's server.
- An address, asked for or resolved, must be public or lie in a network that a rule names with this port. Loopback,
  private, link-local (the metadata service), shared (RFC 6598), multicast, reserved and translated addresses
  (IPv4-mapped, NAT64, 6to4, Teredo: each carries an IPv4 address of its own) are not public.
- A rule that names an address or network is the only way to be sent to an address by its number.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from aether.contract.network import LEARN, Address, Network, Rule, parse_rule

_V4: Final = ipaddress.IPv4Network
_V6: Final = ipaddress.IPv6Network
_GLOBAL_UNICAST: Final = _V6("2000::/3")
"""All that IANA has given out (RFC 4291 2.4): IPv4-mapped, NAT64, site-local and the rest lie outside."""
_NOT_PUBLIC: Final = (
    _V4("192.0.0.0/24"),  # protocol assignments, RFC 6890; Python 3.11 calls part of it global
    _V4("168.63.129.16/32"),  # Azure's host agent: a public number that is answered by the hypervisor
    _V4("192.88.99.0/24"),  # 6to4 relays, RFC 7526
    _V6("2001::/23"),  # protocol assignments, RFC 2928; Teredo is among them
    _V6("2002::/16"),  # 6to4, RFC 3056
    _V6("3fff::/20"),  # documentation, RFC 9637
)


class RefusedError(Exception):
    """What the cell may not do: `reason` is a stable word for the record, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Allowed:
    """The rule that admits a destination: its text for the record, and whether bytes other than TLS may pass."""

    rule: str
    tcp: bool


def is_public(address: Address) -> bool:
    """Whether an address belongs to the Internet at large (IANA special-purpose registries, RFC 6890)."""
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    if address.version == 6 and address not in _GLOBAL_UNICAST:
        return False
    return not any(address.version == network.version and address in network for network in _NOT_PUBLIC)


class Rules:
    """The rules of one cell. A credential's host is allowed without being listed again."""

    def __init__(self, network: Network) -> None:
        self.learn = network.learn
        self._rules = [parse_rule(text) for text in network.allow]
        own = [parse_rule(credential.host) for credential in network.credentials]
        self._rules += [rule for rule in own if rule not in self._rules]

    def check_host(self, host: str | Address, port: int) -> Allowed:
        """The rule for a destination as the client named it; raises RefusedError `not-allowed`."""
        taking = [rule for rule in self._rules if rule.takes(host, port)]
        if taking:
            first = next((rule for rule in taking if rule.tcp), taking[0])
            return Allowed(str(first), first.tcp)
        if self.learn and (isinstance(host, str) or is_public(host)):
            return Allowed(LEARN, False)
        raise RefusedError("not-allowed", f"no rule allows {host}:{port}")

    def check_address(self, address: Address, port: int) -> None:
        """Whether this address may be dialled; raises RefusedError `address`."""
        if not is_public(address) and not any(rule.takes(address, port) for rule in self._rules):
            raise RefusedError("address", f"{address} is not public, and no rule names it")


def injecting(network: Network) -> dict[tuple[str, int], str]:
    """`{(host, port): credential name}` of the credentials; of two for one host the first."""
    found: dict[tuple[str, int], str] = {}
    for credential in network.credentials:
        found.setdefault(destination_of(parse_rule(credential.host)), credential.name)
    return found


def destination_of(rule: Rule) -> tuple[str, int]:
    """The one host, as text, and the port of a rule that names one."""
    assert rule.port is not None
    return (rule.name if rule.network is None else str(rule.network.network_address)), rule.port
