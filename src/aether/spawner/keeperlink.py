"""The spawner's side of the keeper: hand it pipes, and hand them to the next one when it dies.

The spawner keeps a duplicate of every pipe's read end until its writers are gone, so a dead keeper costs no byte
that was still in a pipe: the next one gets the same pipes and continues the files.

A pipe is handed over HAND_OVER_S after its executable started, or when it has ended; until then what is written waits
in it. Of an executable that is over by then and has written nothing the keeper hears only that: nobody waits for it.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import Any, Final

from aether.spawner.helper import Helper, HelperOptions
from aether.spawner.joblog import STREAMS
from aether.spawner.loop import Loop, Timer

HAND_OVER_S: Final = 0.01
"""Most commands of agents that are short at all are over by then; a pipe holds 64 KiB meanwhile (pipe(7))."""

_COUNT_MAX: Final = (1 << 53) - 1
EndHandler = Callable[[str, dict[str, Any], bool], None]
"""Called with the executable, `{stream: {bytes, dropped}}` and whether every writer is gone."""


class KeeperLink:
    """One running keeper and what it watches."""

    def __init__(self, loop: Loop, options: HelperOptions, on_output: EndHandler) -> None:
        self._loop = loop
        self._on_output = on_output
        self._waiting: dict[str, Timer] = {}
        self._watched: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}
        self._helper = Helper(loop, "aether.spawner.keeper", options, self._started, self._on_message)
        self._helper.start()

    @property
    def pid(self) -> int:
        return self._helper.pid

    def _started(self) -> None:
        for exec_id in self._watched:
            if exec_id not in self._waiting:
                self._put(exec_id)

    def watch(self, message: dict[str, Any], fds: tuple[int, ...]) -> None:
        """Keep the output of `message["exec"]`; takes over `fds`, one read end per stream."""
        exec_id = message["exec"]
        self._watched[exec_id] = (message, fds)
        self._waiting[exec_id] = self._loop.after(HAND_OVER_S, lambda: self._hand_over(exec_id))

    def _hand_over(self, exec_id: str) -> None:
        timer = self._waiting.pop(exec_id, None)
        if timer is not None:
            timer.cancel()
            self._put(exec_id)

    def _put(self, exec_id: str) -> None:
        message, fds = self._watched[exec_id]
        self._helper.put(message, [os.dup(fd) for fd in fds])

    def flush(self, exec_id: str) -> None:
        """Ask for what is in the pipes now; answered through the handler, at once where nothing ever was."""
        if exec_id not in self._watched:
            return
        message, fds = self._watched[exec_id]
        if exec_id in self._waiting and _silent(fds):
            self.forget(exec_id)
            self._on_output(exec_id, {name: {"bytes": 0, "dropped": 0} for name in STREAMS}, True)
            self._loop.after(0.0, lambda: self._helper.put(message | {"streams": []}))  # whoever waits goes first
            return
        self._hand_over(exec_id)
        self._helper.put({"op": "flush", "exec": exec_id})

    def forget(self, exec_id: str) -> None:
        """Its writers are gone: nothing is left to hand to a next keeper."""
        timer = self._waiting.pop(exec_id, None)
        if timer is not None:
            timer.cancel()
        _, fds = self._watched.pop(exec_id, ({}, ()))
        for fd in fds:
            os.close(fd)

    def _on_message(self, event: dict[str, Any], fds: tuple[int, ...]) -> None:
        for fd in fds:
            os.close(fd)
        exec_id, totals, ended = event["exec"], read_totals(event["output"]), event["ev"] == "ended"
        if ended:
            self.forget(exec_id)
        self._on_output(exec_id, totals, ended)

    def close(self, wait_s: float = 1.0) -> None:
        """Let it take the rest and end; it is killed when it does not within `wait_s`."""
        for exec_id in list(self._waiting):
            self._hand_over(exec_id)
        for exec_id in list(self._watched):
            self.forget(exec_id)
        self._helper.close(wait_s)


def read_totals(output: Any) -> dict[str, dict[str, int]]:
    """`{stream: {bytes, dropped}}` as a keeper may say it, which others are told; raises ValueError, LookupError or
    TypeError for anything else."""
    totals = {name: {what: output[name][what] for what in ("bytes", "dropped")} for name in STREAMS}
    for count in (count for stream in totals.values() for count in stream.values()):
        if type(count) is not int or not 0 <= count <= _COUNT_MAX:
            raise ValueError(f"{count!r:.80} is no number of bytes")
    return totals


def _silent(fds: tuple[int, ...]) -> bool:
    """Whether every pipe is empty and has no writer left (poll(2): POLLHUP alone)."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    found = poll.poll(0)
    return len(found) == len(fds) and all(events == select.POLLHUP for _, events in found)
