"""When the watcher looks, and what it says."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.diskwatch import RECHECK_S, Held, Look, Watcher, must_look

SIZES = st.integers(0, 1 << 50)


def test_a_new_cell_is_looked_at() -> None:
    assert must_look(None, Held(0, 0), 0.0)


@given(SIZES, SIZES, SIZES, SIZES, st.floats(0, RECHECK_S - 0.01))
def test_no_look_is_missed_by_who_writes_more_than_its_room(
    held: int, room: int, own: int, others: int, passed_s: float
) -> None:
    """As long as nobody frees anything: a cell above its bound has risen by more than its room, and so has the disk."""
    last = Look(10.0, Held(held, held), room, room)
    if own > room:
        assert must_look(last, Held(held + own + others, held), 10.0 + passed_s)
        assert must_look(last, Held(held, held + own + others), 10.0 + passed_s)


@given(SIZES, SIZES)
def test_while_the_disk_is_no_fuller_looks_wait(held: int, room: int) -> None:
    last = Look(10.0, Held(held, 5), room, 5)
    assert not must_look(last, Held(held, 5), 10.0 + RECHECK_S / 2)
    assert must_look(last, Held(held, 5), 10.0 + RECHECK_S)


def test_who_is_above_is_named_once(tmp_path: Path) -> None:
    for name, size in (("small", 1000), ("large", 1 << 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    root = os.open(tmp_path, os.O_RDONLY)
    cells = [
        {"cell": name, "trees": [name], "pids": [], "uids": [0, 1], "bytes_max": 100_000} for name in ("small", "large")
    ]
    ours.send(json.dumps({"op": "watch", "cells": cells}).encode())
    ours.shutdown(socket.SHUT_WR)  # the spawner is gone: it ends once it has read
    Watcher(theirs, root).run()
    theirs.close()
    said = json.loads(ours.recv(10_000))
    assert said["ev"] == "over" and said["cell"] == "large" and said["size_bytes"] > 100_000
    assert ours.recv(10_000) == b""
    ours.close()
    os.close(root)
