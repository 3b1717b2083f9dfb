"""The start of a cell with a network: its listener is handed over between the cell and its (first) executable.

Nothing of the job's runs before somebody outside serves the listener; when that fails, the cell is freed.

Without root the listener can only be made by way of a process that the spawner may look into, which PID 1 is not:
then a shell of the cell's comes first, waits on a descriptor until the listener is served, and becomes the executable.
It runs before there is a network, so what the shell is (it may be of the job's own image) does not matter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Final

from aether.contract.errors import AetherError
from aether.substrate.cells.client import SpawnerLink
from aether.substrate.cells.drivers.port import Order

GATE: Final = ("sh", "-c", 'read -r _ <&3; exec 3<&-; exec "$@"', "sh")
"""Waits for the end of descriptor 3."""


async def begin(link: SpawnerLink, order: Order, executable: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
    """Starts the executable of a cell that stands; the spawner's report of both. Raises AetherError."""
    try:
        try:
            await _listen(link, order, None)
        except AetherError as error:
            if error.code != "NOT_READY" or fds:
                raise
            return await _gated(link, order, executable)
        return await _start(link, order, executable, fds)
    except BaseException:
        with contextlib.suppress(AetherError):
            await link.call("cell.free", {"cell": order.cell_id})
        raise


async def serve(link: SpawnerLink, order: Order) -> None:
    """Serves a cell that has no executable yet. LEVEL_UNMET where only an executable can lead in."""
    try:
        try:
            await _listen(link, order, None)
        except AetherError as error:
            if error.code != "NOT_READY":
                raise
            why = "without root its namespaces can be entered by way of an executable alone, and it has none yet"
            remedy = "run the node as root, or give each job a network of its own: `aether run --allow`"
            raise AetherError("LEVEL_UNMET", f"cannot give an allocated cell a network: {why}", remedy) from error
    except BaseException:
        with contextlib.suppress(AetherError):
            await link.call("cell.free", {"cell": order.cell_id})
        raise


async def _listen(link: SpawnerLink, order: Order, exec_id: str | None) -> None:
    assert order.listening is not None
    reply = await link.call("cell.listen", {"cell": order.cell_id, "exec": exec_id})
    try:
        await order.listening(reply.fds[0])
    finally:
        reply.close()


async def _start(link: SpawnerLink, order: Order, executable: dict[str, Any], fds: Sequence[int]) -> dict[str, Any]:
    args = {"cell": order.cell_id, "exec": executable}
    report: dict[str, Any] = (await link.call("exec.start", args, fds, key=order.exec_id)).value["report"]
    return report


async def _gated(link: SpawnerLink, order: Order, executable: dict[str, Any]) -> dict[str, Any]:
    spec = executable["spec"]
    waiting = executable | {"spec": spec | {"argv": [*GATE, *spec["argv"]], "extra_fds": 1}}
    gate, held = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            report = await _start(link, order, waiting, [gate])
        finally:
            os.close(gate)
        await _listen(link, order, order.exec_id)
        return report
    finally:
        os.close(held)
