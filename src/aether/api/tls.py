"""TLS on a Unix socket: the handshake before HTTP, and what is taken from the client's certificate.

Connections are accepted here rather than by the loop's server, so that a handshake that fails can be told: the peer
(SO_PEERCRED) and why go to `refused`, nothing else of such a connection is looked at. Each takes at most
HTTP_HEADER_TIMEOUT_S; TLS_HANDSHAKES_MAX of them are in progress, HANDSHAKES_PER_UID_MAX of one uid. The context is
asked for anew at each connection, so that what is trusted may change.

A client that is refused is told why by a TLS alert (RFC 8446, 6.2). The loop drops the alert that OpenSSL made, so it
is sent here (`AlertingContext`), and the connection stays open for LINGER_S or until the client closes it: a socket
that is closed with unread bytes makes the client's writes fail before it reads the alert.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from aether.api.head import Peer
from aether.contract import limits
from aether.contract.calls import PeerCertificate
from aether.contract.errors import AetherError

HANDSHAKES_PER_UID_MAX: Final = 32
LINGER_S: Final = 1.0
_ACCEPT_AGAIN_S: Final = 0.1
_DER: Final = 2
"""X509_FILETYPE_ASN1 (openssl/x509.h)."""
_UCRED: Final = struct.Struct("3i")
_LOG: Final = logging.getLogger("aether.api")


_CONNECTION: ContextVar[socket.socket] = ContextVar("aether.tls.connection")


class _AlertingObject(ssl.SSLObject):
    """Sends what a failed handshake leaves to be sent."""

    outgoing: ssl.MemoryBIO
    connection: socket.socket

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            with suppress(OSError):
                self.connection.send(self.outgoing.read(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            raise


class AlertingContext(ssl.SSLContext):
    """A context for `Acceptor`."""

    sslobject_class = _AlertingObject

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **rest: Any) -> ssl.SSLObject:
        made = super().wrap_bio(incoming, outgoing, *args, **rest)
        assert isinstance(made, _AlertingObject)
        made.outgoing, made.connection = outgoing, _CONNECTION.get()
        return made


@dataclass(frozen=True, slots=True)
class Tls:
    """How a socket speaks TLS. `refused` hears of a handshake that failed: the peer and why."""

    context: Callable[[], AlertingContext]
    refused: Callable[[Peer, str], None]


def peer_of(connection: socket.socket) -> Peer:
    """SO_PEERCRED of a connected Unix socket."""
    pid, uid, gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(uid=uid, gid=gid, pid=pid)


def certificate_of(connection: ssl.SSLObject) -> PeerCertificate:
    """The certificate that the handshake proved; raises ValueError when there is none or its times cannot be read."""
    der, said = connection.getpeercert(True), connection.getpeercert()
    if not der or not said:
        raise ValueError("the client has no certificate")
    return PeerCertificate(
        fingerprint=hashlib.sha256(der).hexdigest(),
        not_before_ms=ssl.cert_time_to_seconds(str(said["notBefore"])) * 1_000,
        not_after_ms=ssl.cert_time_to_seconds(str(said["notAfter"])) * 1_000,
        chain=_proven_chain(connection),
    )


def _proven_chain(connection: ssl.SSLObject) -> tuple[bytes, ...]:
    """In DER, the authority last. Python 3.13 made the method public, and its certificates plain bytes."""
    told: Any = connection if hasattr(connection, "get_verified_chain") else getattr(connection, "_sslobj")  # noqa: B009
    return tuple(each if isinstance(each, bytes) else each.public_bytes(_DER) for each in told.get_verified_chain())


class Acceptor:
    """Accepts connections and hands those whose handshake succeeded to a protocol. `run` goes on until cancelled."""

    def __init__(self, listener: socket.socket, protocol: Callable[[], asyncio.BaseProtocol], tls: Tls) -> None:
        self._listener = listener
        self._protocol = protocol
        self._tls = tls
        self._room = asyncio.Semaphore(limits.TLS_HANDSHAKES_MAX)
        self._per_uid: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Acceptor handshakes={len(self._tasks)}>"

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._room.acquire()
                try:
                    connection, _ = await loop.sock_accept(self._listener)
                except OSError:  # out of descriptors, for instance: accept(2)
                    self._room.release()
                    await asyncio.sleep(_ACCEPT_AGAIN_S)
                    continue
                task = loop.create_task(self._shake(connection))
                self._tasks.add(task)
                task.add_done_callback(self._shaken)
        finally:
            for task in self._tasks:
                task.cancel()

    def _shaken(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()
        if not task.cancelled() and task.exception() is not None:
            _LOG.error("a TLS connection failed", exc_info=task.exception())

    async def _shake(self, connection: socket.socket) -> None:
        peer, held = peer_of(connection), connection.dup()
        with held:
            await self._shake_with(connection, held, peer)

    async def _shake_with(self, connection: socket.socket, held: socket.socket, peer: Peer) -> None:
        """`held` is the same socket, which the loop does not close."""
        if self._per_uid[peer.uid] >= HANDSHAKES_PER_UID_MAX:
            connection.close()
            return
        self._per_uid[peer.uid] += 1
        _CONNECTION.set(held)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self._tls.context(),
                ssl_handshake_timeout=limits.HTTP_HEADER_TIMEOUT_S,
            )
        except ssl.SSLError as error:
            self._tls.refused(peer, _why(error))
            connection.close()
            await _linger(held)
        except (OSError, AetherError):  # the client left, or took too long; or there is no authority any more
            connection.close()
        finally:
            self._per_uid[peer.uid] -= 1
            if not self._per_uid[peer.uid]:
                del self._per_uid[peer.uid]


async def _linger(held: socket.socket) -> None:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            held.shutdown(socket.SHUT_WR)
            while await asyncio.get_running_loop().sock_recv(held, 65_536):
                pass


def _why(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is not of an authority that is trusted here ({error.verify_message})"
    if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the client has no certificate"
    return f"the TLS handshake failed ({(error.reason or 'unknown').lower().replace('_', ' ')})"
