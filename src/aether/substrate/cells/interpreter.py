"""Commands for this installation's Python: the command line, and the interpreter that may be started ahead of it."""

from __future__ import annotations

from typing import Any, Final

from aether.contract.cellplan import ExecSpec, exec_to_obj
from aether.contract.cells import CellSpec
from aether.substrate.cells.facts import Facts

ZYGOTE: Final = "zygote"
"""Its name in its cell (spawner/zygote.py)."""
MODULE: Final = "aether.runtime.zygote"


def command_line(spec: CellSpec, facts: Facts) -> tuple[str, ...]:
    """`argv` as it is run: for `python` the interpreter comes first, by its host path."""
    return spec.argv if spec.python is None else (facts.python.host, *spec.argv)


def zygote(spec: CellSpec, driver: str, env: dict[str, str], facts: Facts) -> dict[str, Any] | None:
    """The interpreter for the cells of `spec`, as the spawner reads it; None where each starts its own: without
    `python`, without a mount namespace (level `process`), and in cells of another driver."""
    if spec.python is None or facts.level != "cell" or driver != "native":
        return None
    argv = (facts.python.cell, "-m", MODULE, *spec.python.imports)
    # PYTHONUNBUFFERED would change the job's streams: it has no effect on an interpreter that runs already.
    found = exec_to_obj(ExecSpec(ZYGOTE, argv, tuple((env | {"PYTHONPATH": facts.python.path}).items()), extra_fds=1))
    del found["stdio"]
    return found
