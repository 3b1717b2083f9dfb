"""The TLS context of the second socket: TLS 1.3, a certificate of the client required.

- The handshake proves the client's chain up to a trusted authority, and that it has the private key. Time is not looked
  at there (X509_V_FLAG_NO_CHECK_TIME) but at every request, as revocation is: an expired certificate is answered with a
  clear 401, and one that expires while its connection is kept open is refused too.
- No session is resumed (no tickets): each connection is proved against the authorities that are trusted now.
- The server's own certificate is of the oldest authority that is still trusted, so that clients which know only that
  one go on through a rotation; whoever got a certificate since knows both. Its key lives in memory alone.
"""

from __future__ import annotations

import datetime as dt
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from aether.contract import limits
from aether.contract.errors import AetherError
from aether.substrate.pki import certificates
from aether.substrate.pki.certificates import Leaf
from aether.substrate.pki.store import AuthorityStore, serial, utc

SERVER_LIFE: Final = dt.timedelta(milliseconds=limits.CERTIFICATE_MS_MAX)
_RENEW_NS: Final = limits.CERTIFICATE_MS_MAX // 2 * 1_000_000
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME (openssl/x509_vfy.h), which the ssl module has no name for."""


Context = TypeVar("Context", bound=ssl.SSLContext)


class ServerContexts(Generic[Context]):
    """The context for the next connection; made anew when what is trusted changed or half the life is over. `kind` is
    the server's own type of context."""

    def __init__(
        self,
        store: AuthorityStore,
        now_ns: Callable[[], int],
        kind: type[Context],
        foreign: Callable[[int], Mapping[str, str]] = lambda now_ns: {},
    ) -> None:
        """`foreign` gives the authorities of other trust domains that are trusted at a time (ns since the epoch):
        PEM by a name that changes with the content."""
        self._kind = kind
        self._store = store
        self._now_ns = now_ns
        self._foreign = foreign
        self._made: tuple[tuple[str, ...], int, Context] | None = None

    def current(self) -> Context:
        """Raises AetherError NO_PKI while there is no authority."""
        now_ns = self._now_ns()
        trusted = self._store.trusted(now_ns // 1_000_000)
        if not trusted:
            raise AetherError("NO_PKI", "cannot speak TLS: this instance has no authority of its own")
        foreign = self._foreign(now_ns)
        names = (*(each.authority.name for each in trusted), *foreign)
        if self._made is None or self._made[0] != names or now_ns - self._made[1] > _RENEW_NS:
            key = certificates.new_key()
            now = utc(now_ns)
            leaf = Leaf(f"spiffe://{self._store.trust_domain}/aetherd", "server", serial(), now, now + SERVER_LIFE)
            chain = certificates.pem_of(certificates.issue(trusted[-1].authority, key.public_key(), leaf))
            roots = [*(each.authority.pem for each in trusted), *foreign.values()]
            self._made = (names, now_ns, server_context(self._kind, chain, certificates.pem_of_key(key), roots))
        return self._made[2]


def server_context(kind: type[Context], chain: str, key: bytes, roots: Sequence[str]) -> Context:
    """A context that proves itself by `chain` and takes clients of `roots`; all PEM."""
    context = kind(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    context.load_verify_locations(cadata="".join(roots))
    # The module takes a key from a file alone; this one is in memory, and has no name that another could open.
    held = os.memfd_create("aether-tls", os.MFD_CLOEXEC)
    try:
        with open(held, "wb", closefd=False) as file:
            file.write(key + chain.encode())
        context.load_cert_chain(f"/proc/self/fd/{held}")
    finally:
        os.close(held)
    return context
