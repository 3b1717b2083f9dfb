"""Which executors there are: our own for the driver `native`, and one for each OCI runtime that is installed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from aether.spawner.linux import oci
from aether.spawner.linux.executor import Executor
from aether.spawner.linux.native import NativeExecutor
from aether.spawner.linux.portable import PortableExecutor
from aether.spawner.linux.userns import Blocks

CHOICES: Final = ("auto", "native", "portable")


def best_executor(source_roots: Sequence[str], choice: str = "auto", blocks: Blocks | None = None) -> Executor:
    """The executor; it closes `blocks`, which whoever makes them ahead may share with it. Raises FileNotFoundError
    for `native` when the binary has not been built."""
    if choice != "portable":
        try:
            return NativeExecutor(source_roots, blocks)
        except FileNotFoundError:
            if choice == "native":
                raise
    return PortableExecutor(source_roots, blocks)


def oci_executors(source_roots: Sequence[str]) -> dict[str, Executor]:
    """One for each runtime that can be used here, by its kind; starts nothing."""
    found = oci.find_runtimes(os.environ)
    return {kind: oci.OciExecutor(each, source_roots) for kind, each in found.items() if not each.reason}


def oci_executor(kind: str, source_roots: Sequence[str]) -> oci.OciExecutor:
    """Raises FileNotFoundError, with the reason, when the runtime cannot be used here."""
    found = oci.find_runtimes(os.environ)[kind]
    if found.reason:
        raise FileNotFoundError(f"cannot use {kind}: {found.reason}")
    return oci.OciExecutor(found, source_roots)
