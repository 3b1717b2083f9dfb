"""The operations of the spawner, each a thin step from a read request to the lifecycle or the work directories."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from aether.contract import limits
from aether.contract.cellplan import Plan
from aether.spawner import proctree
from aether.spawner.beneath import safe_path
from aether.spawner.cells import Cell, Exec
from aether.spawner.channel import Message
from aether.spawner.launcher import LaunchFailedError
from aether.spawner.layers import layers_of
from aether.spawner.lifecycle import Lifecycle
from aether.spawner.linux.cgroup import CgroupDriver
from aether.spawner.netlisten import listen_inside
from aether.spawner.offload import json_memfd
from aether.spawner.placing import split_limits
from aether.spawner.protocol import PROTOCOL_VERSION, RefusedError, Request
from aether.spawner.rules import Rules, check_owner, exec_spec
from aether.spawner.server import Answer
from aether.spawner.terminal import Line
from aether.spawner.tracing import Tracer
from aether.spawner.warm import Blueprint, Warm
from aether.spawner.wiring import Wired
from aether.spawner.workops import WorkOps
from aether.spawner.zygote import read_zygote

Facts = Callable[[], dict[str, Any]]
Draw = Callable[[str, "Wired | None", Answer], tuple[Cell, Callable[[], None]]]
"""From key, executable and answer to the cell and the step that starts it."""


class Operations:
    """Handlers raise RefusedError; what they own of a request's descriptors they close."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        cgroups: CgroupDriver,
        work: WorkOps,
        warm: Warm,
        rules: Rules,
        facts: Facts,
        probe: Facts,
    ) -> None:
        self._lifecycle = lifecycle
        self._cgroups = cgroups
        self._work = work
        self._warm = warm
        self._rules = rules
        self._facts = facts
        self._probe = probe
        self.tracer: Tracer | None = None
        self._handlers: dict[str, Callable[[Request, Message, Answer], None]] = {
            "hello": self._hello,
            "probe": lambda _, __, answer: answer.ok({"fd": 0}, (json_memfd(self._probe()),)),
            "cell.bundle": self._bundle,
            "blueprint.keep": self._keep,
            "cell.create": self._create,
            "exec.start": self._start,
            "cell.listen": self._listen,
            "exec.signal": self._signal,
            "exec.stop": self._stop_exec,
            "exec.terminal": self._terminal,
            "exec.window": self._window,
            "cell.stop": self._stop,
            "cell.kill": self._kill,
            "cell.freeze": self._freeze,
            "cell.limit": self._limit,
            "cell.usage": lambda request, _, answer: answer.ok(self._lifecycle.usage(self._cell(request))),
            "cell.trace": self._trace,
            "cell.list": self._list,
            "cell.free": self._free,
            "exit.ack": self._ack,
            "work.prepare": self._prepare,
            "work.collect": self._collect,
            "work.open": self._open,
            "work.diff": lambda request, _, answer: self._work.diff(self._cell(request).place, answer),
            "work.put": self._put,
            "work.list": self._list_work,
        }

    def handle(self, request: Request, message: Message, answer: Answer) -> None:
        self._handlers[request.op](request, message, answer)

    def _cell(self, request: Request) -> Cell:
        return self._lifecycle.roster.find(request.args["cell"])

    def _hello(self, request: Request, _: Message, answer: Answer) -> None:
        theirs = request.args["protocol_version"]
        if theirs != PROTOCOL_VERSION:
            why = f"cannot serve protocol {theirs}: this spawner speaks {PROTOCOL_VERSION}"
            raise RefusedError("VERSION_MISMATCH", why)
        answer.connection.events = request.args["events"]
        answer.ok({"protocol_version": PROTOCOL_VERSION, **self._facts()})

    def _bundle(self, request: Request, _: Message, answer: Answer) -> None:
        """What an OCI runtime would be given for a plan; nothing is started."""
        plan = self._rules.plan(request.args["plan"])
        try:
            config = self._lifecycle.launcher.bundle(plan)
        except LaunchFailedError as failure:
            raise RefusedError("CELL_FAILED", str(failure), failure.remedy) from failure
        answer.ok({"fd": 0}, (json_memfd(config),))

    def _keep(self, request: Request, _: Message, answer: Answer) -> None:
        args = request.args
        plan = self._rules.plan(args["plan"])
        if plan.level == "process":
            raise RefusedError("BAD_PLAN", "cannot keep the plan: at this level it names the cell's own work directory")
        zygote = read_zygote(args["zygote"])
        prepare = args["prepare"] and not layers_of(plan)
        if zygote is not None and not prepare:
            raise RefusedError("BAD_PLAN", "cannot keep the plan: a cell with an interpreter in it is a prepared one")
        digest = self._warm.keep(Blueprint(plan, args["limits"], prepare, zygote), args)
        answer.ok({"digest": digest})

    def _create(self, request: Request, message: Message, answer: Answer) -> None:
        args, count = request.args, len(request.args["files"])
        wired: Wired | None = None
        try:
            cell_id, draw = self._drawn(args)
            if self._lifecycle.roster.repeated(cell_id, request.key, answer):
                message.close()
                return
            if args["exec"] is not None:
                spec = exec_spec(args["exec"]["spec"], args["exec"]["stdio"])
                wired = Wired(spec, args["exec"]["stdio"], message.fds[count:])
            elif len(message.fds) != count:
                raise RefusedError("PROTOCOL", "cannot create a cell: it takes one descriptor per file")
            self._lifecycle.check_free(wired)
            cell, go = draw(request.key, wired, answer)
        except BaseException:
            message.close()
            if wired is not None:
                wired.close()
            raise
        if wired is not None:
            wired.own()
        self._work.adopted(cell.place)
        files, sources = args["files"], message.fds[:count]
        if not cell.has_work or (cell.cell_id != cell.place and not files):
            go()
            return
        failed: Callable[[RefusedError], None] = lambda refused: self._lifecycle.abandon(cell, wired, refused)  # noqa: E731
        self._work.fill(cell.place, cell.owner, sources, files, go, failed)

    def _drawn(self, args: dict[str, Any]) -> tuple[str, Draw]:
        """The id that is asked for, and how its cell is come by: cold by a plan, or from the pool."""
        if (args["plan"] is None) == (args["blueprint"] is None):
            raise RefusedError("PROTOCOL", "cannot create a cell: it takes a plan or a blueprint")
        kept = self._warm.find(args["blueprint"]["digest"]) if args["blueprint"] else None
        given = self._rules.plan(args["plan"]) if kept is None else None
        cell_id: str = given.cell_id if given is not None else args["blueprint"]["cell"]

        def draw(key: str, wired: Wired | None, answer: Answer) -> tuple[Cell, Callable[[], None]]:
            nests = args["nestable"] or args["parent"] is not None
            cell = self._warm.take(kept) if kept is not None and not nests else None
            if cell is not None:
                self._lifecycle.take(cell, cell_id, key, args, answer)
                return cell, lambda: self._lifecycle.begin(cell, args, wired)
            plan = given if kept is None else self._warm.plan(kept, cell_id)
            asked = args if kept is None else args | {"limits": kept.limits}
            assert plan is not None
            cold = self._lifecycle.admit(plan, key, asked, wired, answer)
            return cold, lambda: self._launch(cold, plan, args, wired)

        return cell_id, draw

    def _launch(self, cell: Cell, plan: Plan, args: dict[str, Any], wired: Wired | None) -> None:
        try:
            self._work.add_layers(cell.place, cell.owner, plan)
        except OSError as error:
            refused = RefusedError("CELL_FAILED", f"cannot make the layers of cell {cell.cell_id}: {error}")
            self._lifecycle.abandon(cell, wired, refused)
            return
        self._lifecycle.launch(cell, plan, args, wired)

    def _start(self, request: Request, message: Message, answer: Answer) -> None:
        args = request.args["exec"]
        wired: Wired | None = None
        try:
            cell = self._cell(request)
            spec = exec_spec(args["spec"], args["stdio"])
            if self._lifecycle.repeated_exec(cell, spec.exec_id, request.key, answer):
                message.close()
                return
            wired = Wired(spec, args["stdio"], message.fds)
            self._lifecycle.start(cell, request.key, args, wired, answer)
            message.close()
        except BaseException:
            message.close()
            if wired is not None:
                wired.close()
            raise

    def _inside(self, cell: Cell, exec_id: str | None) -> int:
        """A pidfd in the cell's namespaces that this process may look into: without root that is none of PID 1's,
        which is not dumpable (ptrace(2), "Ptrace access mode checking"), but one of its executables'."""
        if os.geteuid() == 0:
            opened: int = cell.launched.open_inside()
            return opened
        executable = cell.execs.get(exec_id) if exec_id is not None else None
        if executable is None or executable.pid is None:
            why = f"cannot listen in cell {cell.cell_id}: without root it takes an executable"
            raise RefusedError("NOT_READY", why)
        pid = proctree.leader(proctree.children(cell.pid), executable.pid)
        if pid is None:
            raise RefusedError("NOT_READY", f"cannot listen in cell {cell.cell_id}: its executable has ended")
        return os.pidfd_open(pid)

    def _listen(self, request: Request, _: Message, answer: Answer) -> None:
        """The one listener of a cell with a network namespace of its own: else it would be the host's loopback."""
        cell = self._cell(request)
        if cell.pidfd < 0 or cell.state != "running":
            raise RefusedError("NO_SUCH_CELL", f"cannot listen in cell {cell.cell_id}: it is {cell.state}")
        if "net" not in cell.report.get("namespaces", {}):
            why = f"cannot listen in cell {cell.cell_id}: it has no network namespace of its own"
            raise RefusedError("LEVEL_UNMET", why)
        if cell.report["level"] == "gvisor":
            why = f"cannot listen in cell {cell.cell_id}: gVisor keeps its network to itself"
            raise RefusedError("LEVEL_UNMET", why, "use another driver for cells with a network")
        try:
            inside = self._inside(cell, request.args["exec"])
            try:
                network = cell.report["namespaces"]["net"]
                listener = listen_inside(inside, limits.EGRESS_PORT, network, join_user=os.geteuid() != 0)
            finally:
                os.close(inside)
        except OSError as error:
            why = f"cannot listen in cell {cell.cell_id}: {error.strerror}"
            raise RefusedError("CELL_FAILED", why) from error
        answer.ok({"fd": 0}, (listener,))

    def _exec(self, request: Request) -> tuple[Cell, Exec]:
        cell, exec_id = self._cell(request), request.args["exec"]
        executable = cell.execs.get(exec_id)
        if executable is None:
            raise RefusedError("NOT_FOUND", f"cannot find {exec_id}: cell {cell.cell_id} has no such executable")
        return cell, executable

    def _signal(self, request: Request, _: Message, answer: Answer) -> None:
        self._lifecycle.signal(*self._exec(request), request.args["signo"])
        answer.ok({})

    def _stop_exec(self, request: Request, _: Message, answer: Answer) -> None:
        self._lifecycle.stopping.stop(*self._exec(request), request.args["grace_ms"])
        answer.ok({})

    def _terminal(self, request: Request, _: Message, answer: Answer) -> None:
        line = self._line(request)
        answer.ok({"kind": line.kind, "fd": 0}, (line.hand_out(),))

    def _window(self, request: Request, _: Message, answer: Answer) -> None:
        self._line(request).resize(request.args["rows"], request.args["columns"])
        answer.ok({})

    def _line(self, request: Request) -> Line:
        _, executable = self._exec(request)
        if executable.line is None:
            why = f"cannot attach to {executable.exec_id}: it has no terminal or standard input"
            raise RefusedError("NOT_READY", why)
        return executable.line

    def _stop(self, request: Request, _: Message, answer: Answer) -> None:
        self._lifecycle.stop(self._cell(request), "killed", request.args["grace_ms"])
        answer.ok({})

    def _kill(self, request: Request, _: Message, answer: Answer) -> None:
        cell = self._cell(request)
        self._lifecycle.kill(cell, "killed", lambda: answer.ok(cell.view()))

    def _freeze(self, request: Request, _: Message, answer: Answer) -> None:
        self._lifecycle.freeze(self._cell(request), request.args["frozen"])
        answer.ok({})

    def _limit(self, request: Request, _: Message, answer: Answer) -> None:
        """A live resize: every limit that is named changes, or none. What this host cannot hold is told."""
        cell, (wanted, disk_bytes) = self._cell(request), split_limits(request.args["limits"])
        if cell.state != "running":
            raise RefusedError("NO_SUCH_CELL", f"cannot resize cell {cell.cell_id}: it is {cell.state}")
        try:
            if disk_bytes is not None and self._lifecycle.disk is not None:
                self._lifecycle.disk.resize(cell, disk_bytes)
            self._cgroups.set_limits(cell.cgroup, wanted)
        except OSError as error:
            why = f"cannot resize cell {cell.cell_id}: {error.strerror}"
            raise RefusedError("LIMIT_REFUSED", why) from error
        cell.report["limits"] = cell.enforced()
        missing = {name: why for name, why in self._cgroups.probe()["missing"].items() if name in wanted.asked()}
        answer.ok({"limits": cell.enforced(), "missing": missing})

    def _trace(self, request: Request, _: Message, answer: Answer) -> None:
        """With `on` it answers when the trace is over and written."""
        cell, args = self._cell(request), request.args
        if self.tracer is None:
            raise RefusedError("LEVEL_UNMET", "cannot trace a cell: nothing observes cells here")
        if args["on"]:
            self.tracer.start(cell, args["duration_ms"], answer)
        else:
            self.tracer.stop(cell.cell_id)
            answer.ok({})

    def _list(self, _: Request, __: Message, answer: Answer) -> None:
        cells = [cell.view() for cell in self._lifecycle.cells.values() if not cell.warm]
        answer.ok({"fd": 0}, (json_memfd({"cells": cells}),))

    def _ack(self, request: Request, _: Message, answer: Answer) -> None:
        cell = self._lifecycle.cells.get(request.args["cell"])
        if cell is not None:
            self._lifecycle.acknowledge(cell, request.args["exec"])
        answer.ok({})

    def _free(self, request: Request, _: Message, answer: Answer) -> None:
        cell_id = request.args["cell"]
        cell = self._lifecycle.cells.get(cell_id)
        if cell is None or cell.warm:
            self._work.discard_prepared(cell_id, lambda: answer.ok({}))
            return
        if cell.place in self._work.busy:
            raise RefusedError("BUSY", f"cannot free cell {cell_id}: its work directory is in use")
        self._lifecycle.kill(cell, "killed", lambda: self._freed(cell, answer))

    def _freed(self, cell: Cell, answer: Answer) -> None:
        def forget() -> None:
            self._lifecycle.free(cell)
            answer.ok({})

        if cell.has_work:
            self._work.remove(cell.place, forget)
        else:
            forget()

    def _prepare(self, request: Request, message: Message, answer: Answer) -> None:
        args = request.args
        cell_id = args["cell"]
        try:
            owner = check_owner(args["owner"])
            if cell_id in self._lifecycle.cells:
                raise RefusedError("IDEMPOTENCY_CONFLICT", f"cannot prepare {cell_id}: the cell exists")
            if len(message.fds) != len(args["files"]):
                raise RefusedError("PROTOCOL", f"cannot prepare {cell_id}: it takes one descriptor per file")
            self._work.note_prepared(cell_id, owner)
        except RefusedError:
            message.close()
            raise
        self._work.fill(cell_id, owner, message.fds, args["files"], lambda: answer.ok({}), answer.refuse)

    def _put(self, request: Request, message: Message, answer: Answer) -> None:
        try:
            cell = self._cell(request)
            if len(message.fds) != 1 or not cell.has_work:
                raise RefusedError("PROTOCOL", "cannot put a file: it takes one descriptor, and a work directory")
        except RefusedError:
            message.close()
            raise
        self._work.put(cell.place, cell.owner, message.fds[0], request.args, answer)

    def _list_work(self, request: Request, _: Message, answer: Answer) -> None:
        self._work.list(self._cell(request).place, request.args["path"], answer)

    def _collect(self, request: Request, _: Message, answer: Answer) -> None:
        cell, args = self._cell(request), request.args
        for glob in args["globs"]:
            if not safe_path(glob):
                raise RefusedError("OUTPUT_REFUSED", f"cannot collect {glob[:80]!r}: it is not a plain relative path")
        self._work.collect(cell.place, cell.owner, args, answer)

    def _open(self, request: Request, _: Message, answer: Answer) -> None:
        cell = self._cell(request)
        fd, size = self._work.open(cell.place, cell.owner, request.args["path"])
        answer.ok({"fd": 0, "size_bytes": size}, (fd,))
