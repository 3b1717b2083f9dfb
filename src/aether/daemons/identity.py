"""Identity beyond uids and tickets, composed: API keys, the embedded authority and its socket, issuers of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aether.api.head import Peer
from aether.api.server import HttpServer
from aether.api.tls import AlertingContext, Tls
from aether.contract import ids
from aether.contract.calls import Caller
from aether.contract.canonical import digest_bytes
from aether.contract.errors import AetherError
from aether.contract.paths import Layout
from aether.contract.records import Record
from aether.contract.spiffe import ENDPOINT_VARIABLE
from aether.substrate.access.access import Proofs
from aether.substrate.access.credentials import Credentials, hashing_key
from aether.substrate.access.tokens import IssuerFiles, Tokens
from aether.substrate.access.workloads import TrustBundles, Workloads
from aether.substrate.book import Book
from aether.substrate.entries import Node
from aether.substrate.gate import Gate
from aether.substrate.pki.contexts import ServerContexts
from aether.substrate.pki.store import AuthorityStore


@dataclass(frozen=True, slots=True)
class Identity:
    """What stands between a credential and a principal. `hashing` is the key of the hashes of API keys."""

    store: AuthorityStore
    files: IssuerFiles
    bundles: TrustBundles
    proofs: Proofs
    hashing: bytes = field(repr=False)


def compose(layout: Layout, node: Node, book: Book, secret: bytes) -> Identity:
    """Opens what there is; raises AetherError STATE_UNUSABLE. `secret` does not change while the instance lives."""
    store = AuthorityStore(layout.pki)
    files = IssuerFiles(layout.issuers, lambda raw: _loaded(node, book, raw))
    told = layout.trust_bundles if os.environ.get(ENDPOINT_VARIABLE) else None
    bundles = TrustBundles(files, told, lambda raw, trusted: _loaded(node, book, raw, trusted))
    hashing = hashing_key(secret)
    credentials = Credentials(book.ledger.tickets, hashing, lambda name: store.trusts(name, book.now_ns() // 1_000_000))
    workloads = Workloads(bundles, lambda: store.trust_domain)
    return Identity(store, files, bundles, Proofs(credentials, Tokens(files), workloads), hashing)


def read_issuers(identity: Identity, now_ns: int, log: Any) -> None:
    """Reads the files of issuers. Such that cannot be used are told in the log; tokens are refused meanwhile, or
    certificates of a trust domain."""
    identity.bundles.on_unusable = lambda domain, why: log.error(
        "a trust domain is refused", trust_domain=domain, reason=why
    )
    try:
        identity.files.refresh(now_ns)
    except AetherError:
        log.error("tokens are refused", reason=str(identity.files.error))
    identity.bundles.current(now_ns)


def _loaded(node: Node, book: Book, raw: bytes, bundles: bytes | None = None) -> None:
    """Records what decides on holders of tokens and on workloads from now on; raises AetherError when it cannot be."""
    detail = dict[str, str]()
    for name, document in {"digest": raw, "bundles": bundles}.items():
        if document is not None:
            book.log.store_document(document)
            detail[name] = digest_bytes(document)
    book.write(
        lambda index, now: Record(type="issuers.loaded", log_index=index, time=now, node_id=node.node_id, detail=detail)
    )


class SecuredSocket:
    """The second socket: listens once there is an authority. `app` is the application of the first one."""

    def __init__(self, app: Callable[..., Any], layout: Layout, identity: Identity, gate: Gate, book: Book) -> None:
        self._app = app
        self._path = layout.tls_socket
        self._store = identity.store
        self._gate = gate
        self._contexts = ServerContexts(identity.store, book.now_ns, AlertingContext, identity.bundles.roots)
        self._server: HttpServer | None = None

    def __repr__(self) -> str:
        return f"<SecuredSocket {self._path} listening={self._server is not None}>"

    async def open(self) -> None:
        """Listens if there is an authority and it does not yet; raises ALREADY_RUNNING, STATE_UNUSABLE."""
        if self._server is None and self._store.known:
            self._server = await HttpServer.start(
                self._app, self._path, secured=Tls(self._contexts.current, self._refused)
            )

    async def close(self) -> None:
        if self._server is not None:
            await self._server.close()

    def _refused(self, peer: Peer, why: str) -> None:
        caller = Caller(peer.uid, peer.gid, peer.pid, None, ids.new(ids.REQUEST))
        self._gate.refused(caller, "tls.handshake", AetherError("UNAUTHENTICATED", f"cannot let the client in: {why}"))
