"""Helpers of the spawner: started again when they die, killed when they break the protocol, ended with their owner."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from aether.spawner.helper import Helper, HelperOptions
from aether.spawner.keeperlink import read_totals
from aether.spawner.loop import Loop
from tests.support import machine
from tests.support.hostile import JSON, changed_json

# Answers {"say": text} with that text as it stands, closes on {"end": 1}, and ends when its owner is gone.
MODULE = """
import json, socket
def main():
    link = socket.socket(fileno=3)
    while data := link.recv(4096):
        asked = json.loads(data)
        if "end" in asked:
            return 0
        link.send(asked["say"].encode())
    return 0
"""


class Owner:
    def __init__(self, directory: Path) -> None:
        (directory / "odd_helper.py").write_text(MODULE)
        sys.path.insert(0, str(directory))
        self.loop = Loop()
        self.starts = 0
        self.heard: list[Any] = []
        self.helper = Helper(self.loop, "odd_helper", HelperOptions(str(directory)), self.started, self.hear)
        self.helper.start()

    def started(self) -> None:
        self.starts += 1

    def hear(self, event: dict[str, Any], fds: tuple[int, ...]) -> None:
        self.heard.append(event["ev"])

    def until(self, true: Any) -> None:
        deadline_s = time.monotonic() + 10
        while not true():
            assert time.monotonic() < deadline_s, "it did not happen"
            self.loop.turn(0.02)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    before = set(machine.children(os.getpid()))
    made = Owner(tmp_path)
    yield made
    made.helper.close()
    sys.path.remove(str(tmp_path))
    assert set(machine.children(os.getpid())) <= before, "neither a process nor a zombie is left"


def test_one_that_ends_is_started_again(owner: Owner) -> None:
    first = owner.helper.pid
    owner.helper.put({"end": 1})
    owner.until(lambda: owner.starts == 2)
    assert owner.helper.pid != first
    owner.helper.put({"say": '{"ev": "here"}'})
    owner.until(lambda: owner.heard == ["here"])


@pytest.mark.parametrize(
    "said", ["not JSON", "[1]", "{}", "7", '{"ev"', "\u00ff", "[" * 2_000], ids=lambda said: said[:9]
)
def test_one_that_breaks_the_protocol_is_replaced(owner: Owner, said: str) -> None:
    owner.helper.put({"say": said})
    owner.until(lambda: owner.starts == 2)
    owner.helper.put({"say": '{"ev": "here"}'})
    owner.until(lambda: owner.heard == ["here"])


TOTALS = {name: {"bytes": 7, "dropped": 0} for name in ("stdout", "stderr")}


@settings(max_examples=150, deadline=None)
@given(changed_json(TOTALS) | JSON)
def test_what_a_keeper_counts_are_numbers_or_refused(said: Any) -> None:
    """It is passed on to the authority: a keeper that was taken over says nothing there but numbers."""
    try:
        totals = read_totals(said)
    except (ValueError, LookupError, TypeError):
        return
    assert totals.keys() == TOTALS.keys()
    assert all(0 <= count < 1 << 53 and type(count) is int for one in totals.values() for count in one.values())
