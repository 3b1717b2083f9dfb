"""The driver contract: what a kind of isolation offers, over opaque handles and never over pids.

A cell owns a list of executables from the start. One made by `launch` ends with its first; one made by `allocate`
lives until it is freed, and its executables come and go by `start_exec` and `acknowledge`. Every verb may be
repeated; `launch` and `allocate` are idempotent by cell id. Errors are AetherError: LEVEL_UNMET and BAD_PLAN before
anything happened, CELL_FAILED with the step, NO_SUCH_CELL for a handle that is no more, UNAVAILABLE when the driver
has lost its means for now.
`tests/conformance/cell_driver` is the contract as tests; `memory.MemoryDriver` is the double.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType, Protocol

from aether.contract.allocations import FileListing
from aether.contract.cells import CellSpec, Contention, ExecEnd, InputFile, Limits, SandboxReport, Usage
from aether.contract.jobs import Stdio
from aether.contract.wire import CellFiles

Handle = NewType("Handle", str)
"""Names a cell of one driver. Opaque: only the driver that made it reads it."""
Listening = Callable[[int], Awaitable[None]]
"""Takes the listener of a cell that stands, before anything runs in it; borrows the descriptor."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What the driver can do here. `missing` maps a mechanism to `(reason, remedy)`."""

    healthy: bool
    reason: str
    levels: tuple[str, ...]
    facts: dict[str, Any]
    missing: dict[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Order:
    """A cell to launch with its first executable; `files` are input files with their descriptors (borrowed).

    `listening`, for a cell with a network, is given the listener of its loopback (borrowed) before the executable
    starts; when it raises, the cell is freed and the launch raises the same.
    """

    cell_id: str
    exec_id: str
    spec: CellSpec
    files: Sequence[tuple[InputFile, int]] = ()
    listening: Listening | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A launched cell. `channel_fd` is the caller's; it is None for a cell that was there already."""

    handle: Handle
    exec_id: str
    report: SandboxReport
    plan_text: bytes
    channel_fd: int | None


@dataclass(frozen=True, slots=True)
class Adopted:
    """A cell found after a restart: its first executable, when it started, and its end if it has ended.

    An allocated cell has none ("" and null); `execs` are all executables that were not acknowledged, with their ends.
    `gone` says why the cell itself is no more, if so.
    """

    handle: Handle
    cell_id: str
    exec_id: str
    started_wall_us: int
    end: ExecEnd | None
    execs: dict[str, ExecEnd | None] = field(default_factory=dict)
    gone: str | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """A plan before it runs: readable lines, the plan as data, what this host lacks."""

    lines: tuple[str, ...]
    plan: dict[str, Any]
    plan_text: bytes
    missing: dict[str, str]


class Driver(Protocol):
    """One kind of isolation."""

    name: str

    async def fingerprint(self) -> Fingerprint: ...

    def explain(self, spec: CellSpec) -> Explained:
        """What `launch` would do; nothing is started."""
        ...

    async def launch(self, order: Order) -> Started: ...

    async def adopt(self) -> list[Adopted]:
        """Every cell that lives or ended without being freed."""
        ...

    async def allocate(
        self, cell_id: str, spec: CellSpec, within: Handle | None = None, listening: Listening | None = None
    ) -> Started:
        """A cell without an executable (`spec.argv` is empty), until it is freed; idempotent by cell id.

        `listening` as in an Order: given the listener when the cell stands.
        `within` is the allocated cell around it, whose limits bound both, and with which it is frozen and ends.
        LIMIT_REFUSED when it asks for more than there is around it.
        """
        ...

    async def start_exec(self, handle: Handle, exec_id: str, spec: CellSpec, stdio: Stdio = "logs") -> None:
        """One more executable in a running cell: `argv`, `env`, `cwd` and `limits.timeout_ms` of `spec`."""
        ...

    def has_exec(self, handle: Handle, exec_id: str) -> bool:
        """Whether the executable is there, living or ended, and was not acknowledged."""
        ...

    async def signal(self, handle: Handle, exec_id: str, signo: int) -> None:
        """To the executable's process group."""
        ...

    async def stop_exec(self, handle: Handle, exec_id: str, grace_ms: int) -> None:
        """SIGTERM, the grace, then SIGKILL to its session and to all that descends from it; returns at once."""
        ...

    async def terminal(self, handle: Handle, exec_id: str) -> tuple[Stdio, int]:
        """`tty` and a descriptor of the terminal's other side, or `pipe` and the one writing end of its standard
        input. The caller's. Raises NOT_READY when there is none (any more)."""
        ...

    async def window(self, handle: Handle, exec_id: str, rows: int, columns: int) -> None:
        """The size of its terminal; raises NOT_READY where it has none."""
        ...

    async def freeze(self, handle: Handle, frozen: bool) -> None:
        """Stop every process of the cell where it stands, or let them go on; raises LEVEL_UNMET."""
        ...

    async def resize(self, handle: Handle, limits: Limits) -> None:
        """Other limits for a live cell; raises LEVEL_UNMET for what this host cannot enforce."""
        ...

    async def stop(self, handle: Handle, grace_ms: int) -> None:
        """SIGTERM to every executable, the grace, then the end of the cell; returns at once."""
        ...

    async def kill(self, handle: Handle) -> None:
        """Returns when nothing of the cell lives any more."""
        ...

    async def wait(self, handle: Handle, exec_id: str) -> ExecEnd:
        """The end of an executable, its output kept; at once when it has ended."""
        ...

    async def usage(self, handle: Handle) -> Usage: ...

    async def contention(self, handle: Handle) -> Contention:
        """What the cell had to wait for until now."""
        ...

    async def trace(self, handle: Handle, duration_ms: int) -> None:
        """Count the system calls of the cell; returns when that is over and written beside its logs. Raises
        LEVEL_UNMET where the host does not let us, BUSY when the cell is being traced."""
        ...

    async def report(self, handle: Handle) -> SandboxReport: ...

    async def collect(self, handle: Handle, globs: Sequence[str]) -> CellFiles: ...

    async def open(self, handle: Handle, path: str) -> int:
        """A read-only descriptor of one output; the caller's."""
        ...

    async def diff(self, handle: Handle) -> tuple[int, int]:
        """What changed in the image that the cell keeps changes of: a JSON listing and an OCI layer, as descriptors
        of the caller's. Raises NO_LAYER where there is no such image."""
        ...

    async def put(self, handle: Handle, path: str, fd: int, executable: bool) -> None:
        """A file of the work directory, replaced whole by what the regular file `fd` (borrowed) holds; parents are
        made. Raises OUTPUT_REFUSED for a path that leads through anything but directories."""
        ...

    async def files(self, handle: Handle, path: str) -> FileListing:
        """The names in a directory of the work directory ("" for itself); raises NOT_FOUND."""
        ...

    async def acknowledge(self, handle: Handle, exec_id: str) -> None:
        """The end is recorded: it need not be told again, and in an allocated cell the executable is forgotten."""
        ...

    async def free(self, handle: Handle) -> None:
        """Kill what lives and remove all traces; unknown handles are freed ones."""
        ...

    def on_end(self, call: Callable[[ExecEnd], None]) -> None:
        """`call` hears of every end, once per connection; ends before a reconnect come by `adopt`."""
        ...

    def on_gone(self, call: Callable[[str, str | None], None]) -> None:
        """`call(cell, reason)` hears of every cell that is no more; of those before a reconnect by `adopt`."""
        ...


class Connected(Driver, Protocol):
    """A driver that speaks to a spawner, which outlives it: what `CellSupervisor` stands on."""

    def start(self) -> None:
        """Connects and stays connected until `close`; until then verbs raise UNAVAILABLE."""
        ...

    async def close(self) -> None:
        """Leaves the cells alone."""
        ...

    def on_connect(self, call: Callable[[list[Adopted]], None]) -> None:
        """`call` hears what lives, or ended without being freed, after every connect."""
        ...

    @property
    def instance(self) -> str | None:
        """The id of the spawner that was last connected; cells die with it."""
        ...

    @property
    def reason(self) -> str:
        """Why there is no connection now; empty when there is one."""
        ...

    def found(self, handle: Handle) -> Started | None:
        """A cell that is there, living or ended; its plan's text is empty when another process asked for it."""
        ...

    def check_required(self, words: Sequence[str]) -> None:
        """Whether this host can do what is required; raises AetherError LEVEL_UNMET, UNAVAILABLE."""
        ...

    async def bundle(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        """The config.json that an OCI runtime would get for a plan of `explain`; None where none is asked."""
        ...

    async def probe(self) -> dict[str, Any]:
        """All that the host can and cannot enforce, asked now."""
        ...
