"""Asking the kernel: each question in a child of its own, and asked again when the child was killed."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

from aether.spawner.linux import probe


def refuse() -> None:
    raise OSError(errno.EPERM, "no")


def test_the_answer_is_the_childs_errno() -> None:
    assert probe.attempt(lambda: None) == 0
    assert probe.attempt(refuse) == errno.EPERM


def test_a_killed_child_is_asked_again(tmp_path: Path) -> None:
    """Whoever kills the child of a starting spawner must not make its cells weaker."""
    mark = tmp_path / "asked"

    def killed_once() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert probe.attempt(killed_once) == 0


def test_a_child_that_always_dies_is_a_no() -> None:
    assert probe.attempt(lambda: os.kill(os.getpid(), signal.SIGKILL)) == errno.EINTR
