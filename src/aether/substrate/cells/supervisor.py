"""The authority's view of cells: launch, stop, collect, free, and every end told once per connection.

A thin layer over one driver: it names executables after their cells, keeps descriptors straight, turns the host's
answers into the documents that are recorded, and says what is healthy. All methods raise AetherError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aether.contract import ids
from aether.contract.calls import Explanation
from aether.contract.canonical import digest_bytes
from aether.contract.cells import CellSpec, ExecEnd, InputFile, SandboxReport, Usage
from aether.contract.jobs import CommandParams
from aether.contract.wire import CellFiles, RoleHealth
from aether.substrate.cells.drivers.port import Adopted, Connected, Handle, Order, Started

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

    def on_connect(self, call: Callable[[dict[str, str]], None]) -> None:
        """`call` gets `{cell: its first executable}` of all that lives or was not freed, after each connect."""

        def connected(found: list[Adopted]) -> None:
            self._listed = True
            call({adopted.cell_id: adopted.exec_id for adopted in found})

        self._driver.on_connect(connected)

    async def launch(self, cell_id: str, spec: CellSpec, files: Sequence[tuple[InputFile, int]]) -> Launched:
        """Start the cell; repeated for the same id it answers with the cell that is there. Borrows the files."""
        order = Order(cell_id, exec_of(cell_id), spec, files)
        return _launched(cell_id, await self._driver.launch(order))

    @property
    def instance(self) -> str | None:
        """The spawner that is connected; cells die with it. None before the first connection."""
        return self._driver.instance

    def found(self, cell_id: str) -> Launched | None:
        """A cell that is there, living or ended; without its plan's text when another process asked for it."""
        started = self._driver.found(Handle(cell_id))
        return None if started is None else _launched(cell_id, started)

    def gone(self, cell_id: str) -> bool:
        """Whether the spawner was asked, and does not know the cell."""
        return self._listed and self.found(cell_id) is None

    async def stop(self, cell_id: str, grace_ms: int) -> None:
        await self._driver.stop(Handle(cell_id), grace_ms)

    async def kill(self, cell_id: str) -> None:
        await self._driver.kill(Handle(cell_id))

    async def wait(self, cell_id: str) -> ExecEnd:
        """The end of the cell's first executable."""
        return await self._driver.wait(Handle(cell_id), exec_of(cell_id))

    async def usage(self, cell_id: str) -> Usage:
        return await self._driver.usage(Handle(cell_id))

    async def collect(self, cell_id: str, globs: Sequence[str]) -> CellFiles:
        return await self._driver.collect(Handle(cell_id), globs)

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

    def explain(self, params: CommandParams) -> Explanation:
        """The plan a command would get; nothing is started."""
        spec = CellSpec(argv=params.argv, env=params.env, cwd=params.cwd, limits=params.limits, require=params.require)
        found = self._driver.explain(spec)
        return Explanation(
            plan_digest=digest_bytes(found.plan_text), lines=found.lines, plan=found.plan, missing=found.missing
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
