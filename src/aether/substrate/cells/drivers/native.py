"""Cells through the spawner: levels `cell` and `process`, and what the OCI runtimes of its host add.

The spawner is the truth about what lives; this side keeps only what it needs to answer at once (reports, ends,
uid slots) and rebuilds it from `cell.list` after every connect. The idempotency key of a cell is its id.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from aether.contract import limits
from aether.contract.allocations import FileListing
from aether.contract.canonical import digest_bytes
from aether.contract.cellplan import IdMap, exec_to_obj, to_obj
from aether.contract.cells import CellSpec, Contention, ExecEnd, InputFile, Limits, SandboxReport, Usage
from aether.contract.errors import AetherError
from aether.contract.jobs import Stdio
from aether.contract.wire import CellFile, CellFiles
from aether.substrate.cells import levels
from aether.substrate.cells.client import Connector, SpawnerLink
from aether.substrate.cells.drivers import guests, listening
from aether.substrate.cells.drivers.port import Adopted, Explained, Fingerprint, Handle, Listening, Order, Started
from aether.substrate.cells.facts import Facts, read_facts
from aether.substrate.cells.interpreter import zygote
from aether.substrate.cells.plan import (
    DEFAULT_ENV,
    JOB_ID,
    Blueprint,
    blueprint,
    cgroup_limits,
    check_spec,
    exec_spec,
    id_map,
    plan_cell,
)
from aether.substrate.cells.report import contention_of, end_of, sandbox_report, usage_of, verify_required

FILES_PER_MESSAGE: Final = 200
SLOT_TRIES: Final = 16
BLUEPRINTS_MAX: Final = 256
OUTLINE: Final = "outline"
"""The cell that a kept plan is drawn for."""


@dataclass(slots=True)
class _Cell:
    """What is remembered of a live cell."""

    exec_id: str
    slot: int | None
    report: SandboxReport
    plan_text: bytes
    execs: set[str] = field(default_factory=set)


class NativeDriver:
    """The driver `native`. `start` connects and stays connected; until then verbs raise UNAVAILABLE."""

    name = "native"

    def __init__(self, path: Path) -> None:
        self._connector = Connector(path, self._connected, self._event, self._lost)
        self._facts: Facts | None = None
        self._cells: dict[str, _Cell] = {}
        self._ends: dict[tuple[str, str], ExecEnd] = {}
        self._waiting: dict[tuple[str, str], list[asyncio.Future[ExecEnd]]] = {}
        self._blueprints: dict[bytes, Blueprint] = {}
        self._kept: dict[bytes, str] = {}
        self._slots: set[int] = set()
        self._on_end: list[Callable[[ExecEnd], None]] = []
        self._on_gone: list[Callable[[str, str | None], None]] = []
        self._on_connect: list[Callable[[list[Adopted]], None]] = []

    def start(self) -> None:
        self._connector.start()

    async def close(self) -> None:
        await self._connector.close()

    def on_end(self, call: Callable[[ExecEnd], None]) -> None:
        self._on_end.append(call)

    def on_gone(self, call: Callable[[str, str | None], None]) -> None:
        self._on_gone.append(call)

    def on_connect(self, call: Callable[[list[Adopted]], None]) -> None:
        """`call` hears what lives, or ended without being freed, after every connect."""
        self._on_connect.append(call)

    # ---- connection

    async def _connected(self, link: SpawnerLink, hello: dict[str, Any]) -> None:
        facts = read_facts(hello)
        if self._facts is None or self._facts.instance != facts.instance:
            self._cells.clear()  # a new spawner: the cells died with the old one
            self._ends.clear()
            self._slots.clear()
        self._facts = facts
        found = await self._list(link)
        for call in self._on_connect:
            call(found)
        for adopted in found:
            for end in adopted.execs.values():
                if end is not None:
                    self._ended(end)

    def _lost(self) -> None:
        """Waiters stay: the spawner may be the same one at the next connect, and else the list shows the loss."""

    async def _list(self, link: SpawnerLink) -> list[Adopted]:
        views = (await link.call("cell.list", {})).json()["cells"]
        found: list[Adopted] = []
        for view in views:
            slot = self.facts.ids.slot(view["uid_first"])
            if slot is not None:
                self._slots.add(slot)
            if not view["execs"] and view["once"]:
                continue
            cell_id = view["cell"]
            first = view["execs"][0]["exec"] if view["once"] else ""
            if cell_id not in self._cells:
                report = sandbox_report(view["report"], {}, self.facts.ids.host(view["uid_first"]), "")
                self._cells[cell_id] = _Cell(first, slot, report, b"")
            ends = {e["exec"]: end_of(cell_id, e) if e["state"] == "ended" else None for e in view["execs"]}
            self._cells[cell_id].execs = set(ends)
            gone = (view["reason"] or "cell-died") if view["state"] == "gone" else None
            began_us = view["started_wall_us"]
            found.append(Adopted(Handle(cell_id), cell_id, first, began_us, ends.get(first), ends, gone))
        listed = {view["cell"] for view in views}
        for key in [key for key in self._waiting if key[0] not in listed]:
            for future in self._waiting.pop(key):
                if not future.done():
                    future.set_exception(_no_cell(key[0]))
        return found

    def _event(self, name: str, fields: dict[str, Any]) -> None:
        if name == "exec.exited":
            self._ended(end_of(fields["cell"], fields))
        elif name == "cell.gone":
            for call in self._on_gone:
                call(fields["cell"], fields["reason"])

    def _ended(self, end: ExecEnd) -> None:
        key = (end.cell_id, end.exec_id)
        if key in self._ends:
            return
        self._ends[key] = end
        for future in self._waiting.pop(key, []):
            if not future.done():
                future.set_result(end)
        for call in self._on_end:
            call(end)

    @property
    def facts(self) -> Facts:
        if self._facts is None:
            raise AetherError("UNAVAILABLE", f"cannot plan a cell: {self._connector.reason}", retry_after_s=1)
        return self._facts

    @property
    def reason(self) -> str:
        """Why there is no connection now; empty when there is one."""
        return self._connector.reason

    @property
    def instance(self) -> str | None:
        """The id of the spawner that was last connected."""
        return self._facts.instance if self._facts is not None else None

    def found(self, handle: Handle) -> Started | None:
        known = self._cells.get(handle)
        return None if known is None else Started(handle, known.exec_id, known.report, known.plan_text, None)

    # ---- the contract

    async def fingerprint(self) -> Fingerprint:
        if self._facts is None or self._connector.link is None:
            return Fingerprint(False, self._connector.reason, (), {}, {})
        facts = self._facts
        drivers = [levels.NATIVE, *(name for name, lack in facts.drivers.items() if lack is None)]
        shown = {
            "executor": facts.executor,
            "drivers": drivers,
            "instance": facts.instance,
            "landlock_abi": facts.landlock_abi,
        }
        missing = {name: (lack.reason, lack.remedy) for name, lack in facts.missing.items()}
        missing |= {name: (lack.reason, lack.remedy) for name, lack in facts.drivers.items() if lack is not None}
        return Fingerprint(True, "", levels.levels_here(facts), shown, missing)

    async def bundle(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        if plan["driver"] == levels.NATIVE:
            return None
        config: dict[str, Any] = (await self._connector.require().call("cell.bundle", {"plan": plan})).json()
        return config

    async def probe(self) -> dict[str, Any]:
        """All that the host can and cannot enforce, asked now."""
        value: dict[str, Any] = (await self._connector.require().call("probe", {})).json()
        return value

    def check_required(self, words: Sequence[str]) -> None:
        """Whether this host can do what is required; raises AetherError LEVEL_UNMET, UNAVAILABLE."""
        levels.require(words, self.facts)

    def explain(self, spec: CellSpec) -> Explained:
        check_spec(spec)
        planned = plan_cell(spec, "cell_example", "exec_example", self.facts, 0)
        return Explained(planned.lines(), to_obj(planned.plan), planned.document(), planned.missing)

    async def launch(self, order: Order) -> Started:
        check_spec(order.spec)
        link, facts = self._connector.require(), self.facts
        known = self.found(Handle(order.cell_id))
        if known is not None:
            return known
        if facts.level == "cell" and len(order.files) <= FILES_PER_MESSAGE:
            return await self._create_kept(link, order, {})
        return await self._create_in_slot(link, order, {})

    async def _create_in_slot(self, link: SpawnerLink, order: Order, more: Mapping[str, Any]) -> Started:
        """In a block of uids of our choice: a plan that names it, or more files than one message carries."""
        facts, files = self.facts, list(order.files)
        for _ in range(SLOT_TRIES):
            slot = self._take_slot()
            try:
                ids = id_map(facts, order.spec, slot)
                files = await self._prepare(link, order.cell_id, ids, files)
                drawn = blueprint(order.spec, order.cell_id, order.exec_id, facts, slot)
                asked = {"plan": drawn.plan, "limits": drawn.limits, **more}
                return await self._create(link, order, drawn, asked, slot, files)
            except AetherError as error:
                self._slots.discard(slot)
                if not (error.code == "BAD_PLAN" and "holds it" in error.message):
                    raise
                self._slots.add(slot)  # somebody else's: an older instance of us, not yet listed
        raise AetherError("CELL_LIMIT", "cannot launch: no block of uids is free")

    async def _create_kept(self, link: SpawnerLink, order: Order, more: Mapping[str, Any]) -> Started:
        """By a blueprint that the spawner keeps: it chooses the block of uids, and may have a cell ready."""
        for again in (False, True):
            drawn = await self._blueprint(link, order, again)
            asked = {"blueprint": {"digest": drawn.digest, "cell": order.cell_id}, **more}
            try:
                return await self._create(link, order, drawn, asked, None, list(order.files))
            except AetherError as error:
                if again or error.code != "NOT_FOUND":
                    raise
        raise AssertionError("unreachable")

    def _take_slot(self) -> int:
        """The lowest free block of uids: the launcher keeps the user namespace of a block that was used before.

        A block is free only when its cell is gone: nothing of it lives and its files are removed.
        """
        for slot in range(self.facts.ids.slots or limits.CELL_UID_SLOTS):
            if slot not in self._slots:
                self._slots.add(slot)
                return slot
        raise AetherError("CELL_LIMIT", "cannot launch: every block of uids is in use")

    def _host_uid(self, spec: CellSpec, first: int) -> int:
        """Who the executables are to the host in a cell whose ids begin at `first`."""
        return self.facts.ids.host(first + id_map(self.facts, spec, 0).offset(JOB_ID))

    async def _prepare(
        self, link: SpawnerLink, cell_id: str, ids: IdMap, files: list[tuple[InputFile, int]]
    ) -> list[tuple[InputFile, int]]:
        """More files than one message carries go ahead of the cell; the rest travels with it."""
        while len(files) > FILES_PER_MESSAGE:
            batch, files = files[:FILES_PER_MESSAGE], files[FILES_PER_MESSAGE:]
            args = {"cell": cell_id, "owner": _owner(ids), "files": _files(batch)}
            await link.call("work.prepare", args, [fd for _, fd in batch])
        return files

    async def _create(
        self,
        link: SpawnerLink,
        order: Order,
        drawn: Blueprint,
        asked: dict[str, Any],
        slot: int | None,
        files: list[tuple[InputFile, int]],
    ) -> Started:
        bounds = order.spec.limits
        executable = {
            "spec": drawn.executable | {"exec_id": order.exec_id},
            "stdio": list(guests.LOGGED),
            "wall_ms_max": bounds.timeout_ms,
            "grace_ms": bounds.grace_ms,
        }
        guest_only = not order.exec_id
        later = order.listening is not None
        args = asked | {
            "files": _files(files),
            "work": True,
            "once": not guest_only,
            "sched": drawn.sched,
            "exec": None if guest_only or later else executable,
            "grace_ms": bounds.grace_ms,
        }
        ours, theirs = _channel(order.spec)
        placed, wired = [fd for _, fd in files], [theirs.fileno()] if theirs is not None else []
        try:
            reply = await link.call("cell.create", args, placed if later else placed + wired, key=order.cell_id)
            uid, seen = self._host_uid(order.spec, reply.value["uid_first"]), reply.value["report"]
            if later and "existing" not in reply.value:
                if guest_only:
                    await listening.serve(link, order)
                else:
                    seen = await listening.begin(link, order, executable, wired)
            report = sandbox_report(seen, drawn.missing, uid, digest_bytes(drawn.text))
        except BaseException:
            if ours is not None:
                ours.close()
            raise
        finally:
            if theirs is not None:
                theirs.close()
        execs = {order.exec_id} if order.exec_id else set()
        self._cells[order.cell_id] = _Cell(order.exec_id, slot, report, drawn.text, execs)
        try:
            verify_required(order.spec, report)
        except AetherError:
            if ours is not None:
                ours.close()
            await self.free(Handle(order.cell_id))
            raise
        channel = ours.detach() if ours is not None and "existing" not in reply.value else None
        return Started(Handle(order.cell_id), order.exec_id, report, drawn.text, channel)

    async def _blueprint(self, link: SpawnerLink, order: Order, again: bool) -> Blueprint:
        """The blueprint of the order's specification, kept at the spawner; `again` when it has forgotten it.

        A plan is some 4 KiB of JSON: to make, send and check it for each cell would cost more than anything else
        that a launch asks of the authority and the spawner.
        """
        facts = self.facts
        key = facts.instance.encode() + msgspec.msgpack.encode(order.spec)
        drawn = self._blueprints.get(key)
        if drawn is None or again:
            # Block 0 and a cell of no job: the spawner puts others in their place.
            drawn = blueprint(order.spec, OUTLINE, order.exec_id, facts, 0)
            prepare = bool(order.exec_id) and not order.spec.channel
            python = zygote(order.spec, drawn.plan["driver"], DEFAULT_ENV, facts)
            drawn = replace(drawn, digest=await self._keep(link, drawn, prepare, python, again))
            if len(self._blueprints) >= BLUEPRINTS_MAX:
                self._blueprints.clear()
            self._blueprints[key] = drawn
        return drawn

    async def _keep(
        self, link: SpawnerLink, drawn: Blueprint, prepare: bool, python: dict[str, Any] | None, again: bool
    ) -> str:
        """The digest of a plan at the spawner; most commands share one plan."""
        args = {"plan": drawn.plan, "limits": drawn.limits, "prepare": prepare, "zygote": python}
        key = self.facts.instance.encode() + msgspec.msgpack.encode(args)
        digest = self._kept.get(key)
        if digest is None or again:
            digest = str((await link.call("blueprint.keep", args)).value["digest"])
            if len(self._kept) >= BLUEPRINTS_MAX:
                self._kept.clear()
            self._kept[key] = digest
        return digest

    async def adopt(self) -> list[Adopted]:
        return await self._list(self._connector.require())

    async def allocate(
        self, cell_id: str, spec: CellSpec, within: Handle | None = None, listening: Listening | None = None
    ) -> Started:
        check_spec(spec)
        link = self._connector.require()
        known = self.found(Handle(cell_id))
        if known is not None:
            return known
        order = Order(cell_id, "", spec, listening=listening)
        nests = {"nestable": True, "parent": within}
        if self.facts.level == "cell":
            return await self._create_kept(link, order, nests)
        return await self._create_in_slot(link, order, nests)

    async def start_exec(self, handle: Handle, exec_id: str, spec: CellSpec, stdio: Stdio = "logs") -> None:
        executable = exec_to_obj(exec_spec(spec, handle, exec_id, self.facts))
        del executable["stdio"]
        asked = {"spec": executable, "stdio": list(guests.STDIO[stdio]), "wall_ms_max": spec.limits.timeout_ms}
        args = {"cell": handle, "exec": asked | {"grace_ms": spec.limits.grace_ms}}
        await self._connector.require().call("exec.start", args, key=exec_id)
        if (cell := self._cells.get(handle)) is not None:
            cell.execs.add(exec_id)

    def has_exec(self, handle: Handle, exec_id: str) -> bool:
        cell = self._cells.get(handle)
        return cell is not None and exec_id in cell.execs

    async def stop_exec(self, handle: Handle, exec_id: str, grace_ms: int) -> None:
        await guests.stop_exec(self._connector.require(), handle, exec_id, grace_ms)

    async def terminal(self, handle: Handle, exec_id: str) -> tuple[Stdio, int]:
        return await guests.terminal(self._connector.require(), handle, exec_id)

    async def window(self, handle: Handle, exec_id: str, rows: int, columns: int) -> None:
        await guests.window(self._connector.require(), handle, exec_id, rows, columns)

    async def freeze(self, handle: Handle, frozen: bool) -> None:
        await guests.freeze(self._connector.require(), handle, frozen)

    async def resize(self, handle: Handle, limits: Limits) -> None:
        await guests.resize(self._connector.require(), handle, cgroup_limits(limits))

    async def put(self, handle: Handle, path: str, fd: int, executable: bool) -> None:
        await guests.put(self._connector.require(), handle, path, fd, executable)

    async def files(self, handle: Handle, path: str) -> FileListing:
        return await guests.files(self._connector.require(), handle, path)

    async def signal(self, handle: Handle, exec_id: str, signo: int) -> None:
        await self._call("exec.signal", {"cell": handle, "exec": exec_id, "signo": signo})

    async def stop(self, handle: Handle, grace_ms: int) -> None:
        await self._call("cell.stop", {"cell": handle, "grace_ms": grace_ms})

    async def kill(self, handle: Handle) -> None:
        await self._call("cell.kill", {"cell": handle})

    async def wait(self, handle: Handle, exec_id: str) -> ExecEnd:
        key = (str(handle), exec_id)
        if key in self._ends:
            return self._ends[key]
        if handle not in self._cells:
            raise _no_cell(handle)
        future: asyncio.Future[ExecEnd] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(future)
        return await future

    async def trace(self, handle: Handle, duration_ms: int) -> None:
        try:
            await self._call("cell.trace", {"cell": handle, "on": True, "duration_ms": duration_ms})
        except asyncio.CancelledError:  # whoever asked has gone: detach now and not when the time is over
            with contextlib.suppress(AetherError):
                await self._call("cell.trace", {"cell": handle, "on": False})
            raise

    async def usage(self, handle: Handle) -> Usage:
        return usage_of(await self._call("cell.usage", {"cell": handle}))

    async def contention(self, handle: Handle) -> Contention:
        return contention_of(await self._call("cell.usage", {"cell": handle}))

    async def report(self, handle: Handle) -> SandboxReport:
        cell = self._cells.get(handle)
        if cell is None:
            raise _no_cell(handle)
        return cell.report

    async def collect(self, handle: Handle, globs: Sequence[str]) -> CellFiles:
        reply = await self._connector.require().call("work.collect", {"cell": handle, "globs": list(globs)})
        found = reply.json()
        files = tuple(CellFile(path=file["path"], size_bytes=file["size_bytes"]) for file in found["files"])
        return CellFiles(files=files, refused=found["refused"])

    async def diff(self, handle: Handle) -> tuple[int, int]:
        reply = await self._connector.require().call("work.diff", {"cell": handle})
        return reply.fds[0], reply.fds[1]

    async def open(self, handle: Handle, path: str) -> int:
        reply = await self._connector.require().call("work.open", {"cell": handle, "path": path})
        return reply.fds[0]

    async def acknowledge(self, handle: Handle, exec_id: str) -> None:
        await self._call("exit.ack", {"cell": handle, "exec": exec_id})
        cell = self._cells.get(handle)
        if cell is not None and not cell.exec_id:
            cell.execs.discard(exec_id)
            self._ends.pop((str(handle), exec_id), None)

    async def free(self, handle: Handle) -> None:
        await guests.free(self._connector.require(), handle)
        cell = self._cells.pop(handle, None)
        if cell is not None and cell.slot is not None:
            self._slots.discard(cell.slot)
        for key in [key for key in self._ends if key[0] == handle]:
            del self._ends[key]
        for key in [key for key in self._waiting if key[0] == handle]:
            for future in self._waiting.pop(key):
                if not future.done():
                    future.set_exception(_no_cell(handle))

    async def _call(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        reply = await self._connector.require().call(op, args)
        reply.close()
        return reply.value


def _no_cell(cell_id: str) -> AetherError:
    return AetherError("NO_SUCH_CELL", f"cannot find cell {cell_id}")


def _channel(spec: CellSpec) -> tuple[socket.socket | None, socket.socket | None]:
    """Our and their end of the stream that the executable gets as descriptor 3."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) if spec.channel else (None, None)


def _files(files: Sequence[tuple[InputFile, int]]) -> list[dict[str, Any]]:
    return [{"path": file.path, "mode": 0o755 if file.executable else 0o644} for file, _ in files]


def _owner(ids: IdMap) -> dict[str, int]:
    uid, gid = ids.job_host
    return {"uid": uid, "gid": gid, "uid_first": ids.host_uid, "uid_count": ids.count}
