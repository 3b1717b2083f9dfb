"""The spawner's side of the keeper: hand it pipes, and hand them to the next one when it dies.

The spawner keeps a duplicate of every pipe's read end until its writers are gone, so a dead keeper costs no byte
that was still in a pipe: the next one gets the same pipes and continues the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from aether.spawner.helper import Helper, HelperOptions
from aether.spawner.loop import Loop

EndHandler = Callable[[str, dict[str, Any], bool], None]
"""Called with the executable, `{stream: {bytes, dropped}}` and whether every writer is gone."""


class KeeperLink:
    """One running keeper and what it watches."""

    def __init__(self, loop: Loop, options: HelperOptions, on_output: EndHandler) -> None:
        self._on_output = on_output
        self._watched: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
        self._helper = Helper(loop, "aether.spawner.keeper", options, self._started, self._on_message)
        self._helper.start()

    @property
    def pid(self) -> int:
        return self._helper.pid

    def _started(self) -> None:
        for message, fds in list(self._watched.values()):
            self._helper.put(message, [os.dup(fd) for fd in fds])

    def watch(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Keep the output of `message["exec"]`; takes over `fds`, one read end per stream."""
        self._watched[message["exec"]] = (message, fds)
        self._helper.put(message, [os.dup(fd) for fd in fds])

    def flush(self, exec_id: str) -> None:
        """Ask for what is in the pipes now; answered through the handler."""
        if exec_id in self._watched:
            self._helper.put({"op": "flush", "exec": exec_id})

    def forget(self, exec_id: str) -> None:
        """Its writers are gone: nothing is left to hand to a next keeper."""
        _, fds = self._watched.pop(exec_id, ({}, ()))
        for fd in fds:
            os.close(fd)

    def _on_message(self, event: dict[str, Any], fds: tuple[int, ...]) -> None:
        for fd in fds:
            os.close(fd)
        ended = event["ev"] == "ended"
        if ended:
            self.forget(event["exec"])
        self._on_output(event["exec"], event["output"], ended)

    def close(self, wait_s: float = 1.0) -> None:
        """Let it take the rest and end; it is killed when it does not within `wait_s`."""
        for exec_id in list(self._watched):
            self.forget(exec_id)
        self._helper.close(wait_s)
