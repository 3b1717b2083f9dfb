"""The `aether` command as a process against the real server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aether.client import Client
from aether.contract.errors import AetherError
from tests.unit.api.http_node import HttpNode

AETHER = [sys.executable, "-c", "from aether.cli.main import main; main()"]


class Cli:
    def __init__(self, node: HttpNode, cwd: Path) -> None:
        self.cwd = cwd
        self.env = {**os.environ, "AETHER_STATE": str(node.root)}
        self.env.pop("AETHER_TICKET", None)

    def __call__(self, *arguments: str, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*AETHER, *arguments], capture_output=True, text=True, env=self.env, cwd=self.cwd, timeout=60, **options
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self(*arguments, code=code).stdout)


@pytest.fixture
def cli(node: HttpNode, tmp_path: Path) -> Cli:
    (tmp_path / "here").mkdir()
    return Cli(node, tmp_path / "here")


def test_help_is_quick_and_shows_examples() -> None:
    times = []
    for _ in range(5):
        started = time.monotonic()
        done = subprocess.run([*AETHER, "--help"], capture_output=True, text=True, check=True)
        times.append(time.monotonic() - started)
    assert "aether run -- echo hello" in done.stdout
    assert min(times) < 0.2, times


def test_help_of_every_command() -> None:
    from typer.testing import CliRunner

    from aether.cli.main import build

    runner = CliRunner()
    names = [
        ["up"], ["down"], ["run"], ["predict"], ["score"], ["encode"], ["ps"], ["job", "list"], ["job", "show"],
        ["job", "logs"], ["job", "stop"], ["job", "story"], ["job", "result"], ["artifact", "get"],
        ["artifact", "list"], ["artifact", "put"], ["model", "list"], ["receipt", "show"], ["verify"],
        ["audit", "verify"], ["audit", "checkpoint"], ["cell", "explain"], ["doctor"], ["health"], ["metrics"],
    ]  # fmt: skip
    for name in names:
        shown = runner.invoke(build(), [*name, "--help"])
        assert shown.exit_code == 0, name
        assert all(option in shown.output for option in ("--json", "--ticket", "--state", "--socket")), name
    assert "bash" in runner.invoke(build(), ["completion", "--help"]).output


def test_run_passes_streams_and_exit_code(cli: Cli) -> None:
    done = cli("run", "--", "echo", "hello", "--json")
    assert (done.stdout, done.stderr) == ("hello --json\n", "")
    assert cli("run", "stderr", "oops").stderr == "oops\n"
    assert cli("run", "--", "exit", "7", code=7).stderr == ""
    assert "[JOB_FAILED]" in cli("run", "--", "die", "9", code=137).stderr
    assert "[TIMED_OUT]" in cli("run", "--", "timeout", code=124).stderr
    assert cli.json("run", "--json", "--", "exit", "3", code=3)["exit_code"] == 3


def test_run_sends_options(cli: Cli, node: HttpNode) -> None:
    seen = []
    submit = node.service.handlers["job.submit"]

    async def spy(caller: Any, call: Any) -> Any:
        seen.append((caller, call.request))
        return await submit(caller, call)

    node.service.handlers["job.submit"] = spy
    (cli.cwd / "main.py").write_text("print(1)")
    (cli.cwd / "d").mkdir()
    (cli.cwd / "d/x").write_text("x")
    cli(
        "run", "--file", "main.py", "--file", "main.py:in/m.py", "--dir", "d", "--memory", "256M", "--cpu", "0.5",
        "--timeout", "10s", "--env", "K=V", "--require", "cell", "--label", "local-only", "--output", "*.csv",
        "--ticket", "aetk1_x", "--", "echo", "-x",
    )  # fmt: skip
    caller, request = seen[0]
    params = request.params
    assert caller.credential == "aetk1_x"
    assert params["argv"] == ["echo", "-x"] and params["env"] == {"K": "V"} and params["outputs"] == ["*.csv"]
    limits = params["limits"]
    assert (limits["memory_bytes"], limits["cpu_millis"], limits["timeout_ms"]) == (256 << 20, 500, 10_000)
    assert [f["path"] for f in request.inputs["files"]] == ["in/m.py", "main.py", "x"]
    assert request.labels == ("local-only",) and params["require"] == ["cell"]


def test_run_streams_live(cli: Cli) -> None:
    process = subprocess.Popen(
        [*AETHER, "run", "--", "lines", "3", "0.7"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=cli.env,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "line 0\n"
    arrived = time.monotonic()
    assert process.stderr.readline() == "note 0\n"
    assert process.poll() is None
    assert process.wait(10) == 0
    assert time.monotonic() - arrived > 1.0
    assert process.stdout.read() == "line 1\nline 2\n"
    process.stdout.close()
    process.stderr.close()


def test_run_writes_outputs(cli: Cli) -> None:
    cli("run", "--output", "*.txt", "--", "write", "sub/o.txt", "data")
    assert (cli.cwd / "sub/o.txt").read_text() == "data"
    assert "[OUTPUT_REFUSED]" in cli("run", "--", "write", "sub/o.txt", "other", code=120).stderr
    assert (cli.cwd / "sub/o.txt").read_text() == "data"
    cli("run", "--force", "--output-dir", "sub", "--", "write", "o.txt", "other")
    assert (cli.cwd / "sub/o.txt").read_text() == "other"
    assert "[BAD_FIELD]" in cli("run", "--", "write", "../../evil", "x", code=2).stderr
    assert not (cli.cwd.parent.parent / "evil").exists()


def test_interrupt_stops_the_job(cli: Cli, node: HttpNode) -> None:
    process = subprocess.Popen([*AETHER, "run", "--", "sleep", "60"], stderr=subprocess.PIPE, env=cli.env, text=True)
    deadline = time.monotonic() + 10
    while not any(j.view.state == "running" for j in node.service.jobs.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, "[CANCELLED]" in errors) == (143, True), errors
    assert all(j.view.state == "cancelled" for j in node.service.jobs.values())


def test_detach_then_job_commands(cli: Cli) -> None:
    job = cli("run", "--detach", "--", "sleep", "60").stdout.strip()
    assert job in cli("ps").stdout
    assert cli.json("job", "show", job, "--json")["job_id"] == job
    assert cli("job", "stop", job).stdout == "cancelled\n"
    assert job not in cli("ps").stdout and job in cli("ps", "--all").stdout
    assert "signal 15" in cli("job", "show", job).stdout
    assert cli.json("job", "list", "--only", "cancelled", "--json")["jobs"][0]["job_id"] == job
    assert "[BAD_FIELD]" in cli("job", "list", "--only", "nope", code=2).stderr
    assert "submitted" in cli("job", "story", job).stdout
    assert "[NO_RESULT]" in cli("job", "result", job, code=120).stderr
    done = cli("run", "--detach", "--", "echo", "kept").stdout.strip()
    assert cli("job", "logs", "-f", done).stdout == "kept\n"
    assert cli.json("job", "logs", done, "--json")["text"] == "kept\n"
    assert cli.json("job", "result", done) == {"exit_code": 0}


def test_models(cli: Cli) -> None:
    trajectory = {"t": [0.0, 0.1], "obs": [[1, 0], [1, 0]], "action": [[0], [0]]}
    (cli.cwd / "traj.json").write_text(json.dumps(trajectory))
    predicted = cli.json("predict", "pendulum", "--input", "traj.json", "--horizon", "0.1", "0.5")
    assert predicted == {"op": "predict_next_state", "inputs": ["action", "history"]}
    assert cli.json("score", "pendulum", "--input", "traj.json")["inputs"] == ["action", "obs", "t"]
    piped = cli("encode", "pendulum", "--input", "-", input=json.dumps({"obs": [[1, 0]]}))
    assert json.loads(piped.stdout)["op"] == "encode_state"
    assert "pendulum" in cli("model", "list").stdout
    assert "[BAD_FIELD]" in cli("predict", "m", "--input", "nope.json", "--horizon", "1", code=2).stderr
    (cli.cwd / "bad.json").write_text("[1]")
    assert "[BAD_JSON]" in cli("score", "m", "--input", "bad.json", code=2).stderr


def test_artifacts(cli: Cli) -> None:
    (cli.cwd / "f.bin").write_bytes(bytes(range(256)))
    digest = cli("artifact", "put", "f.bin").stdout.strip()
    assert digest in cli("artifact", "list").stdout
    cli("artifact", "get", digest, "-o", "copy.bin")
    assert (cli.cwd / "copy.bin").read_bytes() == bytes(range(256))
    piped = subprocess.run([*AETHER, "artifact", "get", digest], capture_output=True, env=cli.env, check=True)
    assert piped.stdout == bytes(range(256))
    assert "[NOT_FOUND]" in cli("artifact", "get", "sha256:" + "1" * 64, code=120).stderr
    assert "[BAD_ID]" in cli("artifact", "get", "nope", code=2).stderr


def test_node_commands(cli: Cli) -> None:
    assert "aetherd" in cli("health").stdout
    assert cli.json("health", "--json")["status"] == "ok"
    assert cli("metrics").stdout.startswith("# TYPE")
    assert cli.json("doctor", "--json")["checks"][0]["name"] == "userns"
    assert "mount tmpfs" in cli("cell", "explain", "--", "python3", "-c", "pass").stdout
    assert cli("audit", "checkpoint").stdout.startswith("node_x\n")
    assert "_AETHER_COMPLETE" in cli("completion", "bash").stdout
    job = cli("run", "--detach", "--", "echo", "x").stdout.strip()
    assert cli.json("receipt", "show", job, "--json")["job_id"] == job


def test_verify_refuses_a_false_receipt(cli: Cli, node: HttpNode) -> None:
    job = cli("run", "--detach", "--", "echo", "x").stdout.strip()
    (cli.cwd / "audit.pub").write_text("node_x+00000000+AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n")
    assert "NOT VERIFIED" in cli("verify", job, "--key", "audit.pub", code=123).stdout
    (cli.cwd / "r.json").write_text("{}")
    assert cli.json("verify", "r.json", "--key", "audit.pub", "--json", code=123)["ok"] is False
    assert "[NOT_FOUND]" in cli("verify", "missing.json", "--key", "audit.pub", code=120).stderr


def test_errors_read_well(cli: Cli, tmp_path: Path) -> None:
    done = cli("job", "show", "job_01a1fbeb-b57e-70cd-8916-2cadfeb60e92", code=120)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: cannot find job_") and lines[0].endswith("[NOT_FOUND]")
    assert lines[1].startswith("remedy: ")
    as_json = cli("job", "show", "nope", "--json", code=2).stderr
    assert json.loads(as_json)["error"]["code"] == "BAD_ID"
    assert "[UNREACHABLE]" in cli("ps", "--socket", str(tmp_path / "no.sock"), code=122).stderr
    assert "[BAD_FIELD]" in cli("run", "--memory", "lots", "--", "echo", code=2).stderr
    cli("run", "--nope", code=2)


def test_closed_pipe_is_quiet(cli: Cli) -> None:
    job = cli("run", "--detach", "--", "lines", "2000", "0").stdout.strip()
    command = " ".join(["exec", *map(repr, AETHER), "job", "logs", "-f", job])
    done = subprocess.run(f"( {command} ) | head -n 1", shell=True, capture_output=True, text=True, env=cli.env)
    assert done.stdout == "line 0\n" or done.stdout.startswith("line 0")
    assert "Traceback" not in done.stderr


def test_terminal_gets_no_control_sequences(cli: Cli, node: HttpNode) -> None:
    """The same job's output: raw through a pipe, escaped on a terminal."""
    job = cli("run", "--detach", "--", "echo", "a\x1b]0;owned\x07b\x1b[31mred").stdout.strip()
    assert cli("job", "logs", "-f", job).stdout == "a\x1b]0;owned\x07b\x1b[31mred\n"
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*AETHER, "job", "logs", job], stdout=theirs, stderr=theirs, env=cli.env)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # EIO: the other end closed
            break
        if not part:
            break
        shown += part
    process.wait(10)
    os.close(ours)
    assert b"\x1b]0" not in shown and b"^[]0;owned^Gb\x1b[31mred" in shown


def test_run_starts_an_instance_when_none_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aether.cli.instance import ensure_instance
    from aether.cli.session import Session
    from aether.daemons import control

    started = []
    monkeypatch.setattr(control, "ensure_running", lambda state, progress: started.append(state))
    session = Session(as_json=False, ticket=None, state=tmp_path, socket=None)
    with session.client() as client:
        ensure_instance(session, client)
    assert started == [tmp_path]
    with Client(tmp_path / "x.sock") as client:
        ensure_instance(Session(as_json=False, ticket=None, state=None, socket=tmp_path / "x.sock"), client)
    assert started == [tmp_path]
    assert AetherError("UNREACHABLE", "cannot").kind.exit == 122
