"""Processes of a dead cell that had no pid namespace: the spawner is their subreaper, so they became its children.

While a cell lives its PID 1 is the subreaper of its own descendants (prctl(2), PR_SET_CHILD_SUBREAPER); once it is
dead they are ours. A child that is nobody we know is therefore what a dead cell left.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

CHILDREN = "/proc/thread-self/children"


class Orphans:
    """`known` gives the children that are not orphans: PID 1s, keeper, launcher, forked helpers."""

    def __init__(self, known: Callable[[], set[int]]) -> None:
        self._known = known

    def kill(self) -> int:
        """SIGKILL and reap; how many were found. Call again until it is 0: their children come next."""
        try:
            with open(CHILDREN) as file:
                children = {int(word) for word in file.read().split()}
        except OSError:  # a kernel without CONFIG_PROC_CHILDREN
            return 0
        strangers = children - self._known()
        for pid in strangers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return len(strangers)
