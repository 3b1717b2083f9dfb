"""The authority's hold on the network of cells: what egressd may serve, and what it says happened.

A cell with a network is made in this order: `egress.open` at egressd (rules and secrets are checked there, before
anything exists), the record `egress.opened` durable, the cell without an executable, the listener in its network
namespace handed to egressd, the executable. When the cell has ended, `egress.close`, and the record `egress.closed`
with the sums, before the job's outcome, or after the `cell.freed` or `cell.lost` of an allocated cell. In between come
records `egress.connection`, each naming the one before it of the same cell (`previous`), so that they can be found
from the last one backwards; at most EGRESS_RECORDS_PER_JOB_MAX of one cell.

aetherd keeps a duplicate of each listener: a restarted egressd is given its cells again. A cell's certificate authority
dies with the egressd that made it: its intercepted hosts then fail until the cell is made anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from msgspec.structs import replace

from aether.backends.link import EventHandlers, Handlers
from aether.contract import ids, limits
from aether.contract.canonical import canonical
from aether.contract.cells import CellSpec, InputFile
from aether.contract.egresswire import (
    EgressCell,
    EgressClosed,
    EgressConnection,
    EgressConnections,
    EgressDrop,
    EgressListen,
    EgressOpen,
    EgressOpened,
    EgressReached,
    EgressSecret,
    EgressServing,
    EgressSums,
    EgressWatch,
)
from aether.contract.errors import AetherError
from aether.contract.labels import LOCAL_ONLY
from aether.contract.network import NEEDED, Network
from aether.contract.ports import Link
from aether.contract.records import BudgetRef, Record, RecordType
from aether.contract.wire import Empty, Hello, RoleHealth, Token
from aether.substrate import entries
from aether.substrate.allocations import Allocation
from aether.substrate.book import Book
from aether.substrate.cells.drivers.port import Listening
from aether.substrate.entries import Node

ROLE: Final = "egressd"
TRUSTED_FILE: Final = ".aether/trusted.pem"
"""Below /work: what a cell with interception is to trust."""
_TRUST_VARIABLES: Final = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO", "CURL_CA_BUNDLE", "PIP_CERT",
)  # fmt: skip
_PROXY_VARIABLES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
PROXY: Final = f"http://127.0.0.1:{limits.EGRESS_PORT}"
NO_PROXY: Final = "localhost,127.0.0.1,::1"
NODE_DIRECTORY: Final = str(Path(__file__).resolve().parents[1] / "runtime/node")
NODE_OPTIONS: Final = "--require=/mnt/node/proxy.cjs"
"""Node looks at the proxy variables from 22.21 and 24 on alone: older ones are taught by this file."""

_NUMBERS: Final = ("port", "sent_bytes", "received_bytes", "ms", "count")
_DETAILS: Final = ("host", "port", "address", "rule", "verdict", "reason", "credential", *_NUMBERS[1:])

T = TypeVar("T")
Files = Sequence[tuple[InputFile, int]]


class _Asked(msgspec.Struct, frozen=True):
    """Of the specification of an allocated cell (`contract.allocations.specification`): its network."""

    network: Network


@dataclass(slots=True)
class _Served:
    """A cell with a network: on whose account, what it may reach, its listener once there is one.

    `told`: there is a record of it, so that there will be one of its end; `closing`: that is on its way.
    """

    subject: Record
    network: Network | None
    listener: int = -1
    written: int = 0
    unlisted: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    told: bool = False
    closing: bool = False


class EgressDesk:
    """Handlers of egressd's verbs, and what execution asks for. All methods raise AetherError."""

    def __init__(self, node: Node, book: Book) -> None:
        self._node = node
        self._book = book
        self._link: Link | None = None
        self._served: dict[str, _Served] = {}
        self._reached: Callable[[str], None] = lambda cell_id: None
        self._restoring: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<EgressDesk connected={self._link is not None} cells={len(self._served)}>"

    # ---- the link

    def verbs(self, link: Callable[[], Link]) -> Handlers:
        """The handlers of one connection of egressd."""

        async def greet(body: Hello) -> Hello:
            if body.protocol_version != limits.PROTOCOL_VERSION or body.version != self._node.version:
                raise AetherError("VERSION_MISMATCH", f"cannot work with {body.role} {body.version}")
            mine = limits.PROTOCOL_VERSION
            return Hello(role="aetherd", protocol_version=mine, version=self._node.version, node_id=self._node.node_id)

        async def serving(body: EgressServing) -> EgressDrop:
            return self._attach(link(), body)

        return {"hello": (Hello, greet), "egress.serving": (EgressServing, serving)}

    def events(self) -> EventHandlers:
        return {
            "egress.connections": (EgressConnections, self._connected),
            "egress.reached": (EgressReached, lambda event: self._reached(event.cell_id)),
        }

    def on_reached(self, call: Callable[[str], None]) -> None:
        """`call(cell)` hears when a cell has passed the bytes that `passed` asked about."""
        self._reached = call

    async def passed(self, cell_id: str, until: tuple[int, int] | None) -> EgressSums:
        """What the cell has sent and received; `until`: tell when it has sent or received that much."""
        sent, received = until or (None, None)
        asked = EgressWatch(cell_id=cell_id, sent_bytes=sent, received_bytes=received)
        return await self._require().call("egress.passed", asked, EgressSums)

    def detach(self, link: Link) -> None:
        if self._link is link:
            self._link = None

    async def health(self) -> RoleHealth:
        if self._link is None:
            reason = "egressd is not connected: cells with a network are refused"
            return RoleHealth(role=ROLE, ok=False, version=self._node.version, reason=reason)
        return await self._link.call("health", Empty(), RoleHealth)

    def _attach(self, link: Link, body: EgressServing) -> EgressDrop:
        """Takes a connection: adopts the live cells that it serves, and gives it those that it lost."""
        self._link = link
        ledger = self._book.ledger
        subjects = {job.place: job.intent for job in ledger.open.values() if not job.is_guest}
        subjects |= {
            cell.cell_id: cell.allocated for cell in ledger.cells.live.values() if cell.egress_index is not None
        }
        for cell_id in set(body.cell_ids) - self._served.keys() & subjects.keys():
            self._served[cell_id] = _Served(subjects[cell_id], None, told=True)
        for cell_id in self._served.keys() - set(body.cell_ids):
            task = asyncio.ensure_future(self._restore(link, cell_id))
            self._restoring.add(task)
            task.add_done_callback(self._restoring.discard)
        return EgressDrop(cell_ids=tuple(set(body.cell_ids) - self._served.keys()))

    async def _restore(self, link: Link, cell_id: str) -> None:
        served = self._served.get(cell_id)
        if served is None or served.network is None or served.listener < 0:
            return
        with contextlib.suppress(AetherError):
            opened = await self._open(link, cell_id, served)
            if opened >= 0:
                os.close(opened)
            await self._listen(cell_id, served.listener)

    # ---- for execution

    async def launch(
        self,
        cell_id: str,
        subject: Record,
        spec: CellSpec,
        files: Files,
        start: Callable[[CellSpec, Files, Listening], Awaitable[T]],
    ) -> T:
        """Makes a cell with a network by `start`, in the order that the module head states.

        `subject` is the intent of its job, or the `cell.allocated` of an allocated cell.
        """
        network = spec.network
        assert network is not None
        _check_leaves(spec)
        if self._link is None:
            why = "cannot give the cell a network: egressd is not connected"
            raise AetherError("UNAVAILABLE", why, retry_after_s=1)
        served = self._served.setdefault(cell_id, _Served(subject, network))
        trusted = -1
        try:
            trusted = await self._open(self._link, cell_id, served)
            document = self._book.log.store_document(canonical(msgspec.to_builtins(network)))
            whose = {} if subject.job_id is not None else {"allocated": str(subject.log_index)}
            opened = self._write(cell_id, served, "egress.opened", {"network": document} | whose)
            served.told = True
            await self._book.durable(opened)
            more = [(InputFile(path=TRUSTED_FILE, artifact=""), trusted)] if trusted >= 0 else []

            async def listening(listener: int) -> None:
                await self._listen(cell_id, listener)
                served.listener = os.dup(listener)

            return await start(with_proxy(spec, trusts=trusted >= 0), [*files, *more], listening)
        except BaseException:
            await self.close(cell_id)
            raise
        finally:
            if trusted >= 0:
                os.close(trusted)

    async def secrets(self, secrets: Mapping[str, str]) -> dict[str, str]:
        """What the references stand for now, by variable; raises BAD_FIELD, UNAVAILABLE."""
        found: dict[str, str] = {}
        for name, source in secrets.items():
            link = self._require()
            answer = await link.call("egress.secret", EgressSecret(name=name, source=source), Token)
            with open(await link.take_fd(answer.token), "rb") as file:
                file.seek(0)
                found[name] = file.read(limits.EGRESS_SECRET_BYTES_MAX).decode("utf-8", "surrogateescape")
        return found

    def guest(self, cell: Allocation, spec: CellSpec) -> CellSpec:
        """What an executable that enters an allocated cell is told of the network there. Raises POLICY_DENIED."""
        if cell.egress_index is None:
            return spec
        _check_leaves(spec)
        network = msgspec.json.decode(self._book.log.document(cell.spec), type=_Asked).network
        return with_proxy(spec, trusts=network.intercept and bool(network.credentials))

    async def close(self, cell_id: str) -> Record | None:
        """Ends a cell's network; the record of its sums, not yet durable. A cell without one has nothing to end."""
        served = self._served.get(cell_id)
        if served is None or served.closing:
            return None
        served.closing = True  # and still served: what egressd said before its answer is on its way
        if served.listener >= 0:
            os.close(served.listener)
            served.listener = -1
        try:
            closed = await self._require().call("egress.close", EgressCell(cell_id=cell_id), EgressClosed)
            self._write_rows(cell_id, served, closed.rows)
            detail = {name: str(getattr(closed.sums, name)) for name in EgressSums.__struct_fields__}
            detail["unlisted"] = str(closed.sums.unlisted + served.unlisted)
            served.sent_bytes, served.received_bytes = closed.sums.sent_bytes, closed.sums.received_bytes
        except AetherError as error:  # the sums died with egressd, or it drops the cell when it is back
            detail = {"unknown": error.message}
        finally:
            del self._served[cell_id]
        return self._write(cell_id, served, "egress.closed", detail, _charge(served)) if served.told else None

    # ---- inside

    def _require(self) -> Link:
        if self._link is None:
            raise AetherError("UNAVAILABLE", "cannot reach egressd: it is not connected", retry_after_s=1)
        return self._link

    async def _open(self, link: Link, cell_id: str, served: _Served) -> int:
        """The descriptor of what the cell is to trust, the caller's, or -1."""
        assert served.network is not None
        body = EgressOpen(cell_id=cell_id, job_id=served.subject.job_id or "", network=served.network)
        opened = await link.call("egress.open", body, EgressOpened)
        return -1 if opened.ca_token is None else await link.take_fd(opened.ca_token)

    async def _listen(self, cell_id: str, listener: int) -> None:
        link = self._require()
        await link.call("egress.listen", EgressListen(cell_id=cell_id, token=await link.send_fd(listener)), Empty)

    def _connected(self, event: EgressConnections) -> None:
        for row in event.rows:
            served = self._served.get(row.cell_id)
            if served is not None:
                self._write_rows(row.cell_id, served, (row,))

    def _write_rows(self, cell_id: str, served: _Served, rows: Sequence[EgressConnection]) -> None:
        for row in rows:
            served.sent_bytes += row.sent_bytes
            served.received_bytes += row.received_bytes
            if served.written < limits.EGRESS_RECORDS_PER_JOB_MAX:
                served.written += 1
                self._write(cell_id, served, "egress.connection", connection_detail(row))
            else:
                served.unlisted += row.count

    def _write(
        self, cell_id: str, served: _Served, kind: RecordType, detail: dict[str, str], charge: BudgetRef | None = None
    ) -> Record:
        ledger, job_id = self._book.ledger, served.subject.job_id
        owner = ledger.cells.find_any(cell_id) if job_id is None else ledger.open.get(job_id)
        last = None if owner is None else owner.egress_index
        chain = {} if last is None else {"previous": str(last)}
        return self._book.write(
            lambda index, time: replace(
                entries.follow_up(kind, served.subject, index, time),
                cell_id=cell_id,
                detail=detail | chain,
                budget=charge,
            )
        )


def _charge(served: _Served) -> BudgetRef | None:
    """What the cell's bytes cost; of sums that nobody knows any more, those of the connections that were told."""
    subject = served.subject.budget
    amounts = {"bytes_out": served.sent_bytes, "bytes_in": served.received_bytes}
    amounts = {unit: amount for unit, amount in amounts.items() if amount}
    if subject is None or not amounts:
        return None
    return BudgetRef(
        reservation_id=ids.new(ids.RESERVATION),
        accounts=subject.accounts,
        ops=0,
        cpu_ms=0,
        settled=True,
        amounts=amounts,
        limits=subject.limits,
    )


def _check_leaves(spec: CellSpec) -> None:
    if LOCAL_ONLY in spec.labels:
        raise AetherError("POLICY_DENIED", "cannot give the cell a network: the job or an input is local-only")


def connection_detail(row: EgressConnection) -> dict[str, str]:
    """The `detail` of an `egress.connection` record: what applies, as text."""
    told = {name: getattr(row, name) for name in _DETAILS}
    return {name: str(value) for name, value in told.items() if value is not None}


def connection_of(record: Record) -> EgressConnection:
    """The row that an `egress.connection` record was made of."""
    numbers = {name: int(record.detail.get(name, "0")) for name in _NUMBERS}
    words = {name: record.detail.get(name) for name in _DETAILS if name not in _NUMBERS}
    subject = {"cell_id": record.cell_id, "job_id": record.job_id or ""}
    return msgspec.convert({**subject, **words, **numbers}, EgressConnection)


def with_proxy(spec: CellSpec, *, trusts: bool) -> CellSpec:
    """The specification with the variables by which programs find the proxy and, if `trusts`, its authority.

    Both spellings: curl reads http_proxy in lower case alone. What the job sets itself stays.
    """
    env = {"NO_PROXY": NO_PROXY, "no_proxy": NO_PROXY, "NODE_USE_ENV_PROXY": "1", "NODE_OPTIONS": NODE_OPTIONS}
    for name in _PROXY_VARIABLES:
        env |= {name: PROXY, name.lower(): PROXY}
    if trusts:
        env |= dict.fromkeys(_TRUST_VARIABLES, f"/work/{TRUSTED_FILE}")
    shown = {"node": NODE_DIRECTORY} | spec.readonly_dirs
    require = tuple(dict.fromkeys((*spec.require, *NEEDED)))
    return replace(spec, env=env | spec.env, readonly_dirs=shown, require=require)
