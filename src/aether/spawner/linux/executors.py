"""Choosing the executor: the native one when its binary is there, else the portable one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aether.spawner.linux.executor import Executor
from aether.spawner.linux.native import NativeExecutor
from aether.spawner.linux.portable import PortableExecutor

CHOICES: Final = ("auto", "native", "portable")


def best_executor(source_roots: Sequence[str], choice: str = "auto") -> Executor:
    """Raises FileNotFoundError for `native` when the binary has not been built."""
    if choice != "portable":
        try:
            return NativeExecutor(source_roots)
        except FileNotFoundError:
            if choice == "native":
                raise
    return PortableExecutor(source_roots)
