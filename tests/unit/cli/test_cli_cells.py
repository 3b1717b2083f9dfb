"""`aether cell` against the real HTTP server with a fake authority behind it: words, tables, JSON, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.cli.parse import signal_number
from aether.contract.errors import AetherError
from tests.unit.api.http_node import HttpNode

AETHER = Path(sys.executable).with_name("aether")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[HttpNode]:
    with HttpNode(tmp_path) as running:
        yield running


def aether(node: HttpNode, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    at = words.index("--") if "--" in words else len(words)
    asked = [*words[:2], "--socket", str(node.socket_path), *words[2:at], *words[at:]]
    return subprocess.run(
        [AETHER, *asked],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
        **more,  # type: ignore[call-overload]
    )


def test_a_cell_from_birth_to_end(node: HttpNode, tmp_path: Path) -> None:
    made = aether(node, "cell", "allocate", "agent", "--memory", "64M", "--idle-timeout", "5m")
    assert made.returncode == 0 and made.stdout.startswith("cell_"), made.stderr
    assert aether(node, "cell", "allocate", "agent").returncode == 120
    rows = aether(node, "cell", "list").stdout.splitlines()
    assert rows[0].startswith("NAME\tSTATE") and rows[1].startswith("agent\trunning\t0\t64.0 MiB")
    assert "idle timeout  300 s" in aether(node, "cell", "show", "agent").stdout
    assert json.loads(aether(node, "cell", "show", "agent", "--json").stdout)["name"] == "agent"
    assert aether(node, "cell", "freeze", "agent").stdout == "frozen\n"
    assert aether(node, "cell", "thaw", "agent").stdout == "running\n"
    assert aether(node, "cell", "resize", "agent", "--memory", "96M").returncode == 0
    assert node.service.cells.cells["agent"].limits.memory_bytes == 96 << 20
    stats = aether(node, "cell", "stats", "agent")
    assert "of 96.0 MiB" in stats.stdout and "pids peak    3" in stats.stdout
    assert "cell.allocated" in aether(node, "cell", "events", "agent").stdout
    (tmp_path / "in").write_text("a file")
    assert aether(node, "cell", "put", "agent", str(tmp_path / "in")).stdout.startswith("sha256:")
    assert aether(node, "cell", "put", "agent", "-", "typed", input="from stdin").returncode == 0
    assert aether(node, "cell", "get", "agent", "in").stdout == "a file"
    assert aether(node, "cell", "get", "agent", "typed", "-o", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_text() == "from stdin"
    assert "0644\t6 B" in aether(node, "cell", "ls", "agent").stdout
    ran = aether(node, "cell", "exec", "agent", "--", "echo", "hello")
    assert (ran.returncode, ran.stdout) == (0, "hello\n")
    assert aether(node, "cell", "exec", "agent", "--", "exit", "3").returncode == 3
    assert aether(node, "cell", "start", "agent", "server", "--", "sleep", "0").stdout.startswith("job_")
    assert aether(node, "cell", "stop", "agent", "nobody").returncode == 120
    assert aether(node, "cell", "free", "agent").stdout == "freed\n"
    assert aether(node, "cell", "show", "agent").returncode == 120


def test_an_empty_command_is_a_wrong_use(node: HttpNode) -> None:
    assert aether(node, "cell", "exec", "agent", "--").returncode == 2


@pytest.mark.parametrize(("text", "number"), [("HUP", 1), ("sigterm", 15), ("SIGKILL", 9), ("10", 10), ("64", 64)])
def test_signals_have_names_and_numbers(text: str, number: int) -> None:
    assert signal_number(text) == number


@given(st.text())
def test_any_signal_is_read_or_refused(text: str) -> None:
    try:
        assert 1 <= signal_number(text) <= 64
    except AetherError as error:
        assert error.code == "BAD_FIELD"
