"""Which words of a role become the error of `aether up`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.paths import Layout
from aether.daemons.diagnosis import why_not_up

REFUSAL = json.dumps(
    {"level": "error", "event": "cannot run", "code": "LOG_CORRUPT", "reason": "cannot open the log: x", "remedy": "r"}
)
STARTED = json.dumps({"level": "info", "event": "started"})
FOUND = {"quick_ends": {"aetherd": 2}}


def write(state: Path, role: str, *lines: str) -> None:
    logs = Layout(state).daemon_logs
    logs.mkdir(parents=True, exist_ok=True)
    (logs / f"{role}.log").write_text("".join(f"{line}\n" for line in lines))


def test_a_refusal_has_its_code_and_remedy(tmp_path: Path) -> None:
    write(tmp_path, "aetherd", STARTED, REFUSAL)
    error = why_not_up(tmp_path, FOUND)
    assert error is not None
    assert (error.code, error.remedy) == ("LOG_CORRUPT", "r")
    assert "aetherd: cannot open the log: x" in error.message


def test_one_end_is_no_reason_to_stop_waiting(tmp_path: Path) -> None:
    write(tmp_path, "aetherd", STARTED, REFUSAL)
    assert why_not_up(tmp_path, {"quick_ends": {"aetherd": 1}}) is None
    assert why_not_up(tmp_path, {"quick_ends": {}}) is None
    assert why_not_up(tmp_path, {}) is None
    assert why_not_up(tmp_path, None) is None


def test_words_from_before_the_last_start_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "aetherd", STARTED, REFUSAL, STARTED)
    assert why_not_up(tmp_path, FOUND) is None


def test_the_spawners_line_and_the_end_of_a_traceback(tmp_path: Path) -> None:
    write(tmp_path, "spawner", "aether-spawner: [Errno 28] No space left on device")
    error = why_not_up(tmp_path, {"quick_ends": {"spawner": 3}})
    assert error is not None and error.code == "UNREACHABLE" and "No space left" in error.message
    write(tmp_path, "aetherd", STARTED, "Traceback (most recent call last):", "ImportError: no module x", "")
    error = why_not_up(tmp_path, FOUND)
    assert error is not None and error.message.endswith("aetherd: ImportError: no module x")
    assert "aetherd.log" in error.remedy


@pytest.mark.parametrize(
    "line", [REFUSAL.replace("LOG_CORRUPT", "ALREADY_RUNNING"), "aether-spawner: cannot start: another spawner uses /x"]
)
def test_a_predecessor_that_still_ends_is_waited_for(tmp_path: Path, line: str) -> None:
    write(tmp_path, "aetherd", line)
    assert why_not_up(tmp_path, FOUND) is None


def test_no_log_is_no_word(tmp_path: Path) -> None:
    assert why_not_up(tmp_path, FOUND) is None


@given(data=st.binary(max_size=300))
def test_any_log_is_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    state = tmp_path_factory.mktemp("state")
    write(state, "aetherd")
    (Layout(state).daemon_logs / "aetherd.log").write_bytes(data + b'\n{"level": "error", "code": 7}\n')
    error = why_not_up(state, FOUND)
    assert error is not None and error.code == "UNREACHABLE"
