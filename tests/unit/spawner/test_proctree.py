"""Which processes belong to an executable: a pure choice over a picture of /proc, and the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.proctree import Process, belonging, below, kill, look


def test_session_children_and_what_was_seen() -> None:
    picture = [
        Process(10, 1, 10, 5),  # the leader
        Process(11, 10, 10, 6),  # of its session
        Process(12, 11, 12, 7),  # left the session
        Process(13, 12, 13, 8),  # a child of that one
        Process(20, 1, 20, 5),  # somebody else's
        Process(21, 20, 20, 6),
        Process(14, 1, 14, 9),  # lost its parents
    ]
    assert {pid for pid, _ in belonging(picture, 10, frozenset())} == {10, 11, 12, 13}
    assert {pid for pid, _ in belonging(picture, 10, frozenset({(14, 9)}))} == {10, 11, 12, 13, 14}
    assert 14 not in {pid for pid, _ in belonging(picture, 10, frozenset({(14, 8)}))}, "the number was used again"


def test_below_is_every_descendant() -> None:
    child = subprocess.Popen(["sh", "-c", "setsid sleep 60 & sleep 60"], start_new_session=True)
    try:
        deadline = time.monotonic() + 5
        while len(found := below(child.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert child.pid not in found and os.getpid() not in found
        kill(process.identity for process in look(found))
    finally:
        child.kill()
        child.wait()


PROCESSES = st.lists(
    st.builds(Process, st.integers(2, 12), st.integers(1, 12), st.integers(2, 12), st.integers(0, 3)),
    max_size=12,
    unique_by=lambda process: process.pid,
)


@given(PROCESSES, st.integers(2, 12))
def test_what_belongs_is_closed_under_descent(picture: list[Process], session: int) -> None:
    found = belonging(picture, session, frozenset())
    pids = {pid for pid, _ in found}
    for process in picture:
        if process.parent in pids or process.session == session or process.pid == session:
            assert process.identity in found


def test_a_real_process_is_seen_and_killed_but_not_its_successor() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        (seen,) = look([child.pid])
        assert (seen.parent, seen.session) == (os.getpid(), child.pid)
        kill([(child.pid, seen.start + 1)])
        time.sleep(0.1)
        assert child.poll() is None, "another process of that number is left alone"
        kill([seen.identity])
        assert child.wait(5) == -signal.SIGKILL
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    assert look([child.pid]) == []
