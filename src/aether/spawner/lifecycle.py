"""Cells from launch to end: the spawner is the parent of every PID 1 and keeps exits until acknowledged.

Ends. An executable's exit arrives from PID 1; its event is sent once the keeper has its output (all bytes written
before the exit lie in the pipe, so one flush answers for them), or after OUTPUT_WAIT_S. A cell ends when PID 1 is
reaped: the kernel then has killed and reaped everything in its pid namespace (pid_namespaces(7)); the cgroup is
checked on top and killed again until it is empty. Executables that PID 1 did not report end with SIGKILL.

A cell inside another ends with it: the inner ones first, so that the outer cgroup can go.

Deadlines are kept here and hold while aetherd is dead: SIGTERM, grace, then the whole cell is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from aether.contract import limits
from aether.contract.cellplan import Plan
from aether.spawner.cells import Cell, Exec, counted, last_usage, now_wall_us, proc_io, usage_view
from aether.spawner.disk import Disk
from aether.spawner.guestcpu import note_start, usage_of_ended
from aether.spawner.keeperlink import KeeperLink
from aether.spawner.launcher import InitEvent, Launcher, LaunchFailedError, Running
from aether.spawner.linux.cgroup import CgroupDriver
from aether.spawner.linux.sched import Sched
from aether.spawner.loop import Loop
from aether.spawner.observerlink import ObserverLink
from aether.spawner.orphans import Orphans
from aether.spawner.placing import check_parent, read_sched, schedule, schedule_started, split_limits
from aether.spawner.protocol import RefusedError
from aether.spawner.roster import Reply, Roster
from aether.spawner.rules import owner_of
from aether.spawner.stopping import Stopping
from aether.spawner.wiring import Wired

OUTPUT_WAIT_S = 2.0
EMPTY_WAIT_S = 5.0
EMPTY_POLL_S = 0.002
LINGER_S = 0.005
"""A cell whose one executable has ended is killed so much later, or when it is freed: that takes a millisecond of CPU,
which whoever waits for the outcome should not have to share."""
START_WAIT_S = 10.0
"""PID 1 answers within this time or the cell is killed."""


class Lifecycle:
    """All cells. Methods raise RefusedError before they change anything."""

    def __init__(
        self,
        loop: Loop,
        cgroups: CgroupDriver,
        launcher: Launcher,
        emit: Callable[[str, dict[str, Any]], None],
        discard: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self.roster = Roster()
        self.cells = self.roster.cells
        self.keeper: KeeperLink | None = None
        self.observer: ObserverLink | None = None
        self.disk: Disk | None = None
        self.orphans: Orphans | None = None
        self.stopping = Stopping(loop, cgroups)
        self._loop = loop
        self._cgroups = cgroups
        self.launcher = launcher
        self._emit = emit
        self._discard = discard
        self._of_exec: dict[str, Cell] = {}

    # ---- starting

    def prepare(self, plan: Plan, asked: dict[str, Any], reply: Reply) -> Cell:
        """Make room for a cell of the pool; `launch` it without an executable, `take` it when it stands."""
        cell = self._admit(plan, "", asked, reply)
        cell.warm = cell.has_work = True
        return cell

    def take(self, cell: Cell, cell_id: str, key: str, args: dict[str, Any], reply: Reply) -> None:
        """A prepared cell becomes the one that was asked for, as if it were created now; `begin` it next."""
        self.roster.rename(cell, cell_id)
        cell.key, cell.warm, cell.state = key, False, "starting"
        cell.once, cell.grace_ms = args["once"], args["grace_ms"]
        cell.started_ns, cell.started_wall_us = self._now_ns(), now_wall_us()
        cell.waiting_start.append(reply)
        self._attend(cell)

    def begin(self, cell: Cell, args: dict[str, Any], wired: Wired | None) -> None:
        """The first executable of a taken cell. The cell's replies are answered once it runs."""
        if cell.reason is not None:
            self.abandon(cell, wired, RefusedError("CELL_FAILED", f"cannot start the cell: {cell.reason} meanwhile"))
            return
        self._set_cell_timers(cell, args["wall_ms_max"])
        executable = self._register(cell, cell.key, args["exec"], wired) if wired is not None else None
        try:
            sched = read_sched(args["sched"])
            if sched is not None:
                schedule(cell, sched, self._cgroups)
            if wired is None or executable is None:
                if cell.report:  # else it is on its way, and started when it stands
                    self._cell_started(cell)
                return
            cell.launched.start(wired.spec, wired.fds)
            self._keep_output(cell, executable.exec_id, args["exec"], wired)
            self._on_init(cell)  # an interpreter that waits has nothing more to wait for
        except OSError as error:
            why = f"cannot start the cell: its PID 1 is gone: {error.strerror}"
            self.abandon(cell, None, RefusedError("CELL_FAILED", why))
            return
        except RefusedError as refused:
            self.abandon(cell, None, refused)
            return
        finally:
            if wired is not None:
                wired.close()
        self._set_deadline(cell, executable, args["exec"])

    def admit(self, plan: Plan, key: str, args: dict[str, Any], wired: Wired | None, reply: Reply) -> Cell:
        """Make room for a cell: its id, its block of uids, its cgroup. `reply` is answered by what follows."""
        self.check_free(wired)
        read_sched(args["sched"])
        parent = self.roster.find(args["parent"]) if args["parent"] is not None else None
        if parent is not None:
            check_parent(parent, self._cgroups)
        cell = self._admit(plan, key, args["limits"], reply, parent, args["nestable"])
        cell.once, cell.grace_ms = args["once"], args["grace_ms"]
        cell.has_work = args["work"] or bool(args["files"])
        self._attend(cell)
        return cell

    def _attend(self, cell: Cell) -> None:
        """Whoever looks at what cells do hears of it."""
        if self.observer is not None:
            self.observer.watch(cell)
        if self.disk is not None:
            self.disk.arm()

    def check_free(self, wired: Wired | None) -> None:
        """Whether the id of a first executable is free; raises RefusedError."""
        if wired is not None and wired.spec.exec_id in self._of_exec:
            raise RefusedError("IDEMPOTENCY_CONFLICT", f"cannot start {wired.spec.exec_id}: the id is in use")

    def _admit(
        self,
        plan: Plan,
        key: str,
        asked: dict[str, Any],
        reply: Reply,
        parent: Cell | None = None,
        nestable: bool = False,
    ) -> Cell:
        ids = plan.id_map
        self.roster.check_room(ids)
        bounds, disk_bytes = split_limits(asked)
        try:
            above = parent.cgroup if parent is not None else None
            cgroup = self._cgroups.create(plan.cell_id, bounds, parent=above, nestable=nestable)
        except OSError as error:
            code = "LIMIT_REFUSED" if error.errno in (errno.EINVAL, errno.EBUSY) else "CELL_FAILED"
            raise RefusedError(code, f"cannot make the cell's cgroup: {error.strerror}") from error
        cell = Cell(
            plan.cell_id,
            plan.cell_id,
            key,
            owner_of(ids),
            range(ids.host_uid, ids.host_uid + ids.count),
            cgroup,
            "pid" in plan.namespaces,
            self._now_ns(),
            now_wall_us(),
        )
        if parent is not None:
            cell.parent = parent
            parent.children.append(cell)
        cell.waiting_start.append(reply)
        self.roster.enter(cell)
        if self.disk is not None and disk_bytes is not None:
            self.disk.bound(cell, plan, disk_bytes)
        return cell

    def launch(self, cell: Cell, plan: Plan, args: dict[str, Any] | None, wired: Wired | None) -> None:
        """Start PID 1 and, in the same breath, the first executable. The cell's replies are answered once it runs."""
        if cell.reason is not None:
            self.abandon(cell, wired, RefusedError("CELL_FAILED", f"cannot start the cell: {cell.reason} meanwhile"))
            return
        executable = self._register(cell, cell.key, args["exec"], wired) if args and wired else None
        sched = read_sched(args["sched"]) if args else None
        at_once = wired if sched is None else None
        try:
            launched = self.launcher.launch(
                plan,
                cell.cgroup.attach_fds,
                cell.cgroup.v2_fd,
                at_once.spec if at_once else None,
                at_once.fds if at_once else (),
            )
            self._watch(cell, launched)
            if sched is not None:
                self._start_scheduled(cell, sched, wired)
            if args and wired and executable is not None:
                self._keep_output(cell, executable.exec_id, args["exec"], wired)
        except LaunchFailedError as failure:
            self.abandon(cell, None, RefusedError("CELL_FAILED", str(failure), failure.remedy))
            return
        except RefusedError as refused:
            self.abandon(cell, None, refused)
            return
        finally:
            if wired:
                wired.close()
            cell.cgroup.close_attach()
        self._set_cell_timers(cell, args["wall_ms_max"] if args else None)
        if args and executable is not None:
            self._set_deadline(cell, executable, args["exec"])

    def _watch(self, cell: Cell, launched: Running) -> None:
        cell.launched, cell.pid, cell.pidfd = launched, launched.pid, launched.pidfd
        self._loop.add(launched.fileno(), lambda _: self._on_init(cell))
        self._loop.add(launched.pidfd, lambda _: self._on_pid1_end(cell))

    def _start_scheduled(self, cell: Cell, sched: Sched, wired: Wired | None) -> None:
        """PID 1's class first: what it starts inherits it. Raises RefusedError."""
        schedule(cell, sched, self._cgroups)
        if wired is not None:
            try:
                cell.launched.start(wired.spec, wired.fds)
            except OSError as error:
                why = f"cannot start the cell: its PID 1 is gone: {error.strerror}"
                raise RefusedError("CELL_FAILED", why) from error

    def _set_cell_timers(self, cell: Cell, wall_ms_max: int | None) -> None:
        """The first is that of the start, which `_cell_started` cancels."""
        cell.cancel_timers()
        cell.timers.append(self._loop.after(START_WAIT_S, lambda: self._start_expired(cell)))
        if wall_ms_max is not None:
            cell.timers.append(self._loop.after(wall_ms_max / 1000, lambda: self._cell_expired(cell)))

    def start(self, cell: Cell, key: str, args: dict[str, Any], wired: Wired, reply: Reply) -> None:
        """exec.start: one more executable in a running cell."""
        if cell.state != "running":
            raise RefusedError("NO_SUCH_CELL", f"cannot start an executable: cell {cell.cell_id} is {cell.state}")
        if len(cell.execs) >= limits.EXECUTABLES_PER_CELL_MAX:
            raise RefusedError("CELL_LIMIT", f"cannot start an executable: cell {cell.cell_id} has had its share")
        if wired.spec.exec_id in self._of_exec:
            raise RefusedError("IDEMPOTENCY_CONFLICT", f"cannot start {wired.spec.exec_id}: the id is in use")
        executable = self._register(cell, key, args, wired)
        executable.waiting.append(reply)
        try:
            cell.launched.start(wired.spec, wired.fds)
            self._keep_output(cell, executable.exec_id, args, wired)
        except OSError as error:
            self._end(cell, executable, None, None, f"cannot reach PID 1: {error.strerror}")
        finally:
            wired.close()
        self._set_deadline(cell, executable, args)

    def repeated_exec(self, cell: Cell, exec_id: str, key: str, reply: Reply) -> bool:
        executable = cell.execs.get(exec_id)
        if executable is None:
            return False
        if executable.key != key:
            raise RefusedError("IDEMPOTENCY_CONFLICT", f"cannot start {exec_id}: it exists under another key")
        if executable.state == "starting":
            executable.waiting.append(reply)
        else:
            reply.ok(executable.view())
        return True

    def _register(self, cell: Cell, key: str, args: dict[str, Any], wired: Wired) -> Exec:
        exec_id = wired.spec.exec_id
        executable = Exec(exec_id, key, args["grace_ms"], bool(wired.logs), self._now_ns(), now_wall_us())
        executable.line = wired.take_line()
        if cell.execs or not cell.once:
            note_start(self._cgroups, cell, executable)
        cell.execs[exec_id] = executable
        self._of_exec[exec_id] = cell
        return executable

    def _keep_output(self, cell: Cell, exec_id: str, args: dict[str, Any], wired: Wired) -> None:
        """Hand the pipes over, once the launch is under way: until then what is written waits in them."""
        if wired.logs and self.keeper is not None:
            message = {"op": "watch", "cell": cell.cell_id, "exec": exec_id, "streams": list(wired.logs)}
            self.keeper.watch(message | args["log"], tuple(wired.logs.values()))
            wired.logs = {}

    def _set_deadline(self, cell: Cell, executable: Exec, args: dict[str, Any]) -> None:
        if args["wall_ms_max"] is not None and executable.state != "ended":
            expired = lambda: self._exec_expired(cell, executable)  # noqa: E731
            executable.timers.append(self._loop.after(args["wall_ms_max"] / 1000, expired))

    # ---- what PID 1 says

    def _on_init(self, cell: Cell) -> None:
        try:
            events: list[InitEvent] = cell.launched.events()
        except OSError:
            events = []  # its end shows on the pidfd
        for event in events:
            self._on_event(cell, event)
        if cell.launched is not None and cell.launched.closed:
            self._loop.remove(cell.launched.fileno())
            self.kill(cell, None)

    def _on_event(self, cell: Cell, event: InitEvent) -> None:
        executable = cell.execs.get(event.exec_id) if event.exec_id else None
        if event.kind == "ready":
            cell.report = {**event.report, "limits": cell.enforced()}
            if not cell.execs:
                self._cell_started(cell)
        elif event.kind == "container":
            cell.pid = event.pid or cell.pid  # what counts as PID 1 for all but its parent
        elif event.kind == "step_failed":
            self.abandon(cell, None, RefusedError("CELL_FAILED", event.why, event.remedy))
        elif executable is None:
            return
        elif event.kind == "started":
            executable.state, executable.pid = "running", event.pid
            if cell.sched is not None and not self._scheduled(cell, executable):
                return
            if self.observer is not None:
                self.observer.started(cell, executable)
            cell.report.setdefault("process", event.report)
            self._cell_started(cell)
            for reply in executable.waiting:
                reply.ok({**executable.view(), "report": cell.report})
            executable.waiting.clear()
        elif event.kind == "exec_failed":
            self._exec_failed(cell, executable, event)
        elif event.kind == "exited":
            executable.rusage = event.rusage
            self._end(cell, executable, event.code, event.signal, None)

    def _scheduled(self, cell: Cell, executable: Exec) -> bool:
        try:
            cell.report["sched"] = schedule_started(cell, executable.pid or 0, self._cgroups)
        except RefusedError as refused:
            self.signal(cell, executable, signal.SIGKILL)
            self._exec_failed(cell, executable, InitEvent("exec_failed", why=refused.message, remedy=refused.remedy))
            return False
        return True

    def _cell_started(self, cell: Cell) -> None:
        if cell.state == "starting":
            cell.state = "running"
            cell.timers[0].cancel()
            for reply in cell.waiting_start:
                reply.ok(cell.view())
            cell.waiting_start.clear()

    def _exec_failed(self, cell: Cell, executable: Exec, event: InitEvent) -> None:
        refused = RefusedError("CELL_FAILED", event.why, event.remedy)
        for reply in executable.waiting:
            reply.refuse(refused)
        executable.waiting.clear()
        if cell.state == "starting":
            self.abandon(cell, None, refused)
        else:
            self._forget_exec(cell, executable)

    def _forget_exec(self, cell: Cell, executable: Exec) -> None:
        executable.close()
        cell.execs.pop(executable.exec_id, None)
        self._of_exec.pop(executable.exec_id, None)

    def abandon(self, cell: Cell, wired: Wired | None, refused: RefusedError) -> None:
        """A launch that failed leaves nothing: the cell is killed and forgotten, its client told why."""
        if wired is not None:
            wired.close()
        for reply in cell.waiting_start:
            reply.refuse(refused)
        cell.waiting_start.clear()
        for executable in list(cell.execs.values()):
            self._forget_exec(cell, executable)
        cell.reason = "launch-failed"
        if cell.launched is None:
            self._settle(cell)
        else:
            self.kill(cell, "launch-failed")

    # ---- ends

    def _end(self, cell: Cell, executable: Exec, code: int | None, signo: int | None, reason: str | None) -> None:
        """The executable is over; tell it once its output is kept."""
        if executable.exit is not None:
            return
        executable.cancel_timers()
        executable.wall_us = (self._now_ns() - executable.started_ns) // 1000
        if executable.logged and not executable.output_final and self.keeper is not None:
            self.keeper.flush(executable.exec_id)  # first: it works while the usage is read
        waits = executable.logged and not executable.output_final and self.keeper is not None
        if cell.pidfd >= 0:
            cell.io = proc_io(cell.pid) or cell.io
        found = self._cgroups.usage(cell.cgroup)
        executable.oom = (found.oom_kills or 0) > executable.oom_kills_before
        if signo is not None and reason is None:
            reason = cell.reason
        if not cell.once:
            found = usage_of_ended(self._cgroups, cell, executable, found)
            self.stopping.ended(cell, executable)
        executable.exit = {"code": code, "signal": signo, "reason": reason}
        executable.usage = usage_view(found, wall_us=executable.wall_us, io=cell.io, rusage=executable.rusage)
        if self.observer is not None:
            self.observer.ended(cell, executable)
        if waits:
            executable.timers.append(self._loop.after(OUTPUT_WAIT_S, lambda: self._tell(cell, executable)))
        else:
            self._tell(cell, executable)
        if cell.once and cell.pidfd >= 0:
            cell.timers.append(self._loop.after(LINGER_S, lambda: self.kill(cell, None)))

    def on_output(self, exec_id: str, output: dict[str, Any], final: bool) -> None:
        """The keeper's word: what it keeps of an executable's output so far; `final` when all writers are gone."""
        cell = self._of_exec.get(exec_id)
        if cell is None:
            return
        executable = cell.execs[exec_id]
        executable.output = output
        executable.output_final = final
        if executable.exit is not None:
            self._tell(cell, executable)

    def _tell(self, cell: Cell, executable: Exec) -> None:
        if executable.state == "ended" or executable.usage is None:
            return
        executable.cancel_timers()
        executable.state = "ended"
        output = executable.output or {}
        for name in ("stdout", "stderr"):
            executable.usage[f"{name}_bytes"] = output.get(name, {}).get("bytes")
        dropped = [stream["dropped"] for stream in output.values()]
        executable.usage["output_dropped_bytes"] = sum(dropped) if output else None
        for reply in executable.waiting:
            reply.ok(executable.view())
        executable.waiting.clear()
        self._emit("exec.exited", {"cell": cell.cell_id, **executable.view()})
        if cell.state == "emptied":
            self._gone(cell)

    def _on_pid1_end(self, cell: Cell) -> None:
        """PID 1 is dead and with it its pid namespace; hear its last words, then settle."""
        self._on_init(cell)
        self._loop.remove(cell.pidfd)
        self._loop.remove(cell.launched.fileno())
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, cell.pidfd, os.WEXITED)
        cell.launched.close()
        os.close(cell.pidfd)
        cell.pidfd = -1
        if cell.state == "starting":
            why = "cannot start the cell: its PID 1 was killed before it could answer"
            self.abandon(cell, None, RefusedError("CELL_FAILED", why, "see whether its memory limit is too small"))
        self._settle(cell)

    def _settle(self, cell: Cell, until_s: float | None = None) -> None:
        """Wait until the cgroup is empty, killing on; then the cell is gone."""
        until_s = until_s or self._loop.clock_s() + EMPTY_WAIT_S
        cell.cancel_timers()
        left = self.orphans.kill() if self.orphans is not None and not cell.has_pid_namespace else 0
        for child in tuple(cell.children):
            self.kill(child, "parent-ended")
        if (left or cell.children or self._cgroups.procs(cell.cgroup)) and self._loop.clock_s() < until_s:
            self._cgroups.kill(cell.cgroup)
            self._loop.after(EMPTY_POLL_S, lambda: self._settle(cell, until_s))
            return
        cell.usage = last_usage(cell, self._cgroups, self._now_ns())
        cell.state = "emptied"
        for executable in cell.running():
            self._end(cell, executable, None, signal.SIGKILL, cell.reason or "cell-died")
        self._gone(cell)

    def _gone(self, cell: Cell) -> None:
        """Once every executable is told, the last of which may call this itself."""
        if cell.running() or cell.state == "gone":
            return
        self._remove_cgroup(cell)
        cell.state = "gone"
        if cell.parent is not None:
            cell.parent.children.remove(cell)
        failed = cell.reason == "launch-failed" and not cell.execs
        if self.observer is not None:
            self.observer.end(cell.cell_id, started=not failed)
        if self.disk is not None:
            self.disk.ended(cell)
        if failed or cell.warm:
            self._discard(cell.place, lambda: self._forget(cell))
        else:
            self._emit("cell.gone", {"cell": cell.cell_id, "reason": cell.reason, "usage": cell.usage})
        waiting, cell.waiting_gone = cell.waiting_gone, []
        for call in waiting:
            call()

    def _remove_cgroup(self, cell: Cell, tries: int = 200) -> None:
        """The kernel lets go of a dead process's cgroup a little after its parent may reap it."""
        if not self._cgroups.remove(cell.cgroup) and tries > 0:
            self._loop.after(0.01, lambda: self._remove_cgroup(cell, tries - 1))

    def _forget(self, cell: Cell) -> None:
        self.roster.forget(cell)
        for exec_id, executable in cell.execs.items():
            executable.close()
            self._of_exec.pop(exec_id, None)

    # ---- orders

    def kill(self, cell: Cell, reason: str | None, then: Callable[[], None] | None = None) -> None:
        """SIGKILL to PID 1, which ends its pid namespace, or to the cgroup without one; `then` once it is empty."""
        if cell.state == "gone":
            if then is not None:
                then()
            return
        if then is not None:
            cell.waiting_gone.append(then)
        cell.reason = cell.reason or reason
        if cell.frozen:  # a task that the v1 freezer holds does not even die
            self.freeze(cell, False)
        for child in tuple(cell.children):
            self.kill(child, "parent-ended")
        if cell.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(cell.pidfd, signal.SIGKILL)
            if not cell.has_pid_namespace:
                self._cgroups.kill(cell.cgroup)

    def stop(self, cell: Cell, reason: str, grace_ms: int) -> None:
        """SIGTERM to every executable, and after the grace the end of the cell."""
        if cell.state in ("gone", "emptied"):
            return
        cell.reason = cell.reason or reason
        for child in tuple(cell.children):
            self.stop(child, "parent-ended", grace_ms)
        for executable in cell.running():
            self.signal(cell, executable, signal.SIGTERM)
        cell.timers.append(self._loop.after(grace_ms / 1000, lambda: self.kill(cell, reason)))
        if cell.frozen:
            self.freeze(cell, False)

    def freeze(self, cell: Cell, frozen: bool) -> None:
        """Stop or resume the whole cell; raises OSError where the host cannot."""
        self._cgroups.freeze(cell.cgroup, frozen)
        cell.frozen = frozen

    def signal(self, cell: Cell, executable: Exec, signo: int) -> None:
        if executable.state == "ended" or cell.launched is None:
            return
        with contextlib.suppress(OSError):
            cell.launched.signal(executable.exec_id, signo)
            if self.observer is not None:
                self.observer.signalled(cell, executable, signo)

    def _exec_expired(self, cell: Cell, executable: Exec) -> None:
        executable.timed_out = True
        if not cell.once:
            self.stopping.stop(cell, executable, executable.grace_ms)
            return
        self.signal(cell, executable, signal.SIGTERM)
        executable.timers.append(self._loop.after(executable.grace_ms / 1000, lambda: self.kill(cell, "timed-out")))

    def _cell_expired(self, cell: Cell) -> None:
        for executable in cell.running():
            executable.timed_out = True
        self.stop(cell, "timed-out", cell.grace_ms)

    def _start_expired(self, cell: Cell) -> None:
        why = f"cannot start the cell: no answer in {START_WAIT_S:.0f} s"
        self.abandon(cell, None, RefusedError("CELL_FAILED", why))

    def usage(self, cell: Cell) -> dict[str, Any]:
        """Counters now, with what it waited for; the last ones of a cell that is gone."""
        if cell.usage is not None:
            return cell.usage
        cell.io = proc_io(cell.pid) or cell.io
        return counted(cell, self._cgroups, self._now_ns(), pressure=True)

    def acknowledge(self, cell: Cell, exec_id: str) -> None:
        executable = cell.execs.get(exec_id)
        if executable is not None and executable.state == "ended":
            executable.acked = True
            if not cell.once and cell.state == "running":
                self._forget_exec(cell, executable)

    def free(self, cell: Cell) -> None:
        """Forget a cell that is gone; its id is not used again."""
        self._forget(cell)
        self.roster.note_freed(cell.cell_id)

    def _now_ns(self) -> int:
        return int(self._loop.clock_s() * 1e9)
