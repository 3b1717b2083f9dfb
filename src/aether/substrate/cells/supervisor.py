"""The authority's view of cells: launch, stop, collect, free, and every end told once per connection.

A thin layer over one driver: it names executables after their cells, keeps descriptors straight, turns the host's
answers into the documents that are recorded, and says what is healthy. All methods raise AetherError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aether.contract import ids
from aether.contract.allocations import FileListing
from aether.contract.calls import Explanation
from aether.contract.canonical import digest_bytes
from aether.contract.cells import CellSpec, Contention, ExecEnd, InputFile, Limits, SandboxReport, Usage
from aether.contract.jobs import CommandParams, Stdio
from aether.contract.wire import CellFiles, RoleHealth
from aether.substrate.cells.drivers.port import Adopted, Connected, Handle, Listening, Order, Started
from aether.substrate.cells.report import verify_required

ROLE: Final = "spawner"


@dataclass(frozen=True, slots=True)
class Launched:
    """A running cell. `plan_text` is the canonical JSON of what was asked; `channel_fd` is the caller's."""

    cell_id: str
    exec_id: str
    report: SandboxReport
    plan_text: bytes
    channel_fd: int | None


def exec_of(cell_id: str) -> str:
    """The first executable of a cell; derived, so that a repeated launch finds the same one."""
    return ids.sibling(ids.EXECUTABLE, cell_id)


class CellSupervisor:
    """`on_end(call)` and `on_connect(call)` are set before `start`."""

    def __init__(self, driver: Connected, version: str) -> None:
        self._driver = driver
        self._version = version
        self._listed = False

    def start(self) -> None:
        self._driver.start()

    async def close(self) -> None:
        """Leaves the cells alone."""
        await self._driver.close()

    def on_end(self, call: Callable[[ExecEnd], None]) -> None:
        """`call` hears of every end, again after each reconnect until the cell is freed."""
        self._driver.on_end(call)

    def on_gone(self, call: Callable[[str, str | None], None]) -> None:
        """`call(cell, reason)` hears of every cell that is no more, until it is freed."""
        self._driver.on_gone(call)

    def on_connect(self, call: Callable[[list[Adopted]], None]) -> None:
        """`call` gets all that lives or was not freed, after each connect."""

        def connected(found: list[Adopted]) -> None:
            self._listed = True
            call(found)

        self._driver.on_connect(connected)

    async def launch(
        self,
        cell_id: str,
        spec: CellSpec,
        files: Sequence[tuple[InputFile, int]],
        listening: Listening | None = None,
    ) -> Launched:
        """Start the cell; repeated for the same id it answers with the cell that is there. Borrows the files.

        `listening` gets the listener of a cell with a network before its executable starts.
        """
        order = Order(cell_id, exec_of(cell_id), spec, files, listening)
        return _launched(cell_id, await self._driver.launch(order))

    async def allocate(
        self, cell_id: str, spec: CellSpec, within: str | None = None, listening: Listening | None = None
    ) -> Launched:
        """Make a cell without an executable; repeated for the same id it answers with the cell that is there."""
        around = Handle(within) if within is not None else None
        return _launched(cell_id, await self._driver.allocate(cell_id, spec, around, listening))

    async def join(
        self, cell_id: str, exec_id: str, spec: CellSpec, stdio: Stdio, files: Sequence[tuple[InputFile, int]]
    ) -> Launched:
        """Start one more executable in an allocated cell, its input files put first; the same when repeated."""
        handle = Handle(cell_id)
        report = await self._driver.report(handle)
        verify_required(spec, report)
        if not self._driver.has_exec(handle, exec_id):
            for file, fd in files:
                await self._driver.put(handle, file.path, fd, file.executable)
        await self._driver.start_exec(handle, exec_id, spec, stdio)
        return Launched(cell_id, exec_id, report, b"", None)

    @property
    def instance(self) -> str | None:
        """The spawner that is connected; cells die with it. None before the first connection."""
        return self._driver.instance

    def found(self, cell_id: str) -> Launched | None:
        """A cell that is there, living or ended; without its plan's text when another process asked for it."""
        started = self._driver.found(Handle(cell_id))
        return None if started is None else _launched(cell_id, started)

    def found_exec(self, cell_id: str, exec_id: str) -> Launched | None:
        """The same of an executable in an allocated cell."""
        started = self._driver.found(Handle(cell_id))
        if started is None or not self._driver.has_exec(Handle(cell_id), exec_id):
            return None
        return Launched(cell_id, exec_id, started.report, b"", None)

    def gone(self, cell_id: str) -> bool:
        """Whether the spawner was asked, and does not know the cell."""
        return self._listed and self.found(cell_id) is None

    async def stop(self, cell_id: str, grace_ms: int) -> None:
        await self._driver.stop(Handle(cell_id), grace_ms)

    async def stop_exec(self, cell_id: str, exec_id: str, grace_ms: int) -> None:
        """SIGTERM, the grace, then all of the executable that can be seen is killed; its cell lives on."""
        await self._driver.stop_exec(Handle(cell_id), exec_id, grace_ms)

    async def signal(self, cell_id: str, exec_id: str, signo: int) -> None:
        await self._driver.signal(Handle(cell_id), exec_id, signo)

    async def trace(self, cell_id: str, duration_ms: int) -> None:
        """Returns when the trace is over and lies beside the cell's logs; raises LEVEL_UNMET, BUSY, NO_SUCH_CELL."""
        await self._driver.trace(Handle(cell_id), duration_ms)

    async def acknowledge(self, cell_id: str, exec_id: str) -> None:
        """The end is recorded; in an allocated cell the executable is forgotten."""
        await self._driver.acknowledge(Handle(cell_id), exec_id)

    async def terminal(self, cell_id: str, exec_id: str) -> tuple[Stdio, int]:
        return await self._driver.terminal(Handle(cell_id), exec_id)

    async def window(self, cell_id: str, exec_id: str, rows: int, columns: int) -> None:
        await self._driver.window(Handle(cell_id), exec_id, rows, columns)

    async def freeze(self, cell_id: str, frozen: bool) -> None:
        await self._driver.freeze(Handle(cell_id), frozen)

    async def resize(self, cell_id: str, limits: Limits) -> None:
        await self._driver.resize(Handle(cell_id), limits)

    async def put(self, cell_id: str, path: str, fd: int, executable: bool) -> None:
        await self._driver.put(Handle(cell_id), path, fd, executable)

    async def files(self, cell_id: str, path: str) -> FileListing:
        return await self._driver.files(Handle(cell_id), path)

    async def kill(self, cell_id: str) -> None:
        await self._driver.kill(Handle(cell_id))

    async def wait(self, cell_id: str) -> ExecEnd:
        """The end of the cell's first executable."""
        return await self._driver.wait(Handle(cell_id), exec_of(cell_id))

    async def wait_exec(self, cell_id: str, exec_id: str) -> ExecEnd:
        """The end of any executable."""
        return await self._driver.wait(Handle(cell_id), exec_id)

    async def usage(self, cell_id: str) -> Usage:
        return await self._driver.usage(Handle(cell_id))

    async def contention(self, cell_id: str) -> Contention:
        return await self._driver.contention(Handle(cell_id))

    async def collect(self, cell_id: str, globs: Sequence[str]) -> CellFiles:
        return await self._driver.collect(Handle(cell_id), globs)

    async def diff(self, cell_id: str) -> tuple[int, int]:
        """What changed in the cell's image: a listing and a layer, as descriptors of the caller's."""
        return await self._driver.diff(Handle(cell_id))

    async def open(self, cell_id: str, path: str) -> int:
        """A read-only descriptor of one output; the caller's."""
        return await self._driver.open(Handle(cell_id), path)

    async def free(self, cell_id: str) -> None:
        """Kill what lives, remove cgroups and work directory, forget; freeing twice is freeing once."""
        await self._driver.free(Handle(cell_id))

    # ---- what this host can do

    def check_required(self, words: Sequence[str]) -> None:
        """Refuses at once what no cell here can give; raises AetherError LEVEL_UNMET."""
        self._driver.check_required(words)

    async def explain(self, params: CommandParams) -> Explanation:
        """The plan a command would get; nothing is started."""
        spec = CellSpec(argv=params.argv, env=params.env, cwd=params.cwd, limits=params.limits, require=params.require)
        found = self._driver.explain(spec)
        told = params.network.lines() if params.network is not None else ()
        return Explanation(
            plan_digest=digest_bytes(found.plan_text),
            lines=found.lines + told,
            plan=found.plan,
            missing=found.missing,
            bundle=await self._driver.bundle(found.plan),
        )

    def health(self) -> RoleHealth:
        reason = self._driver.reason
        return RoleHealth(role=ROLE, ok=not reason, version=self._version, reason=reason or None)

    async def probe(self) -> tuple[dict[str, Any], ...]:
        """Checks for `aether doctor`: `{name, ok, value, reason, remedy}`."""
        probed = await self._driver.probe()
        checks = list(probed["checks"])
        cgroup = probed["cgroup_driver"]
        for limit in ("memory_bytes", "cpu_millis", "pids"):
            reason = cgroup["missing"].get(limit)
            checks.append(
                {
                    "name": f"cgroup limit {limit}",
                    "ok": reason is None,
                    "value": cgroup["kind"],
                    "reason": reason or "",
                    "remedy": cgroup["remedy"] if reason else "",
                }
            )
        return tuple(checks)


def _launched(cell_id: str, started: Started) -> Launched:
    return Launched(cell_id, started.exec_id, started.report, started.plan_text, started.channel_fd)
