"""The main job, end to end: the real command, the real sockets, the real roles, a real model, real cells."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aether.client import Client
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.jobs import JobRequest, JobState
from aether.contract.limits import MIB
from aether.contract.paths import Layout
from bench import sample
from tests.support import instance, machine

AETHER = Path(sys.executable).with_name("aether")
SECRET = "s3cr3t-" + "x" * 24


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def client(layout: Layout) -> Iterator[Client]:
    with instance.client(layout) as found:
        yield found


def aether(layout: Layout, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AETHER_STATE": str(layout.root)}
    return subprocess.run([AETHER, *words], capture_output=True, text=True, timeout=60, env=env, **more)


def model_request(**changes: Any) -> JobRequest:
    body = json.loads(sample.predict_request()[1])
    body["inputs"]["history"].update(changes)
    return JobRequest(kind="model", op=body["op"], params=body["params"], inputs=body["inputs"])


class UnixHTTP(HTTPConnection):
    """Plain HTTP over the API socket, as curl speaks it."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def ask(layout: Layout, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = UnixHTTP(layout.api_socket)
    data = json.dumps(body) if body is not None else None
    connection.request(method, path, data, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    kind = answer.headers.get("Content-Type", "")
    return answer.status, json.loads(text) if "json" in kind else text


# ---- by hand


def test_run_copies_files_in_and_outputs_back(layout: Layout, tmp_path: Path) -> None:
    script = tmp_path / "double.py"
    script.write_text("import sys\nopen('out.txt','w').write(open('in.txt').read()*2)\nprint('done')\nsys.exit(7)\n")
    (tmp_path / "in.txt").write_text("ab")
    words = ("run", "--file", "double.py", "--file", "in.txt", "--output", "*.txt", "--", "python3", "double.py")
    found = aether(layout, *words, cwd=tmp_path)
    assert found.returncode == 7, found.stderr
    assert "done" in found.stdout


def test_the_exit_code_is_the_jobs_own(layout: Layout) -> None:
    assert aether(layout, "run", "--", "/bin/true").returncode == 0
    assert aether(layout, "run", "--", "/bin/sh", "-c", "exit 3").returncode == 3
    assert aether(layout, "run", "--", "/bin/sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    assert aether(layout, "run", "--timeout", "300ms", "--", "/bin/sleep", "30").returncode == 124


def test_outputs_become_artifacts_under_their_digest(client: Client) -> None:
    job = client.run(["/bin/sh", "-c", "printf hello > a.txt; mkdir d; printf x > d/b.bin"], outputs=["*.txt", "d/*"])
    assert job.state is JobState.SUCCEEDED
    assert {ref.name: client.artifact_bytes(ref.digest) for ref in job.artifacts} == {
        "a.txt": b"hello",
        "d/b.bin": b"x",
    }
    listed = client.artifact_list(job_id=job.job_id).artifacts
    assert {info.digest for info in listed} >= {ref.digest for ref in job.artifacts}


def test_json_beside_the_human_table(layout: Layout) -> None:
    found = aether(layout, "run", "--json", "--", "/bin/echo", "hi")
    job = json.loads(found.stdout)
    assert job["state"] == "succeeded" and job["exit_code"] == 0
    for words in (("ps",), ("job", "list"), ("health",), ("doctor",), ("artifact", "list"), ("model", "list")):
        assert json.loads(aether(layout, *words, "--json").stdout) is not None
    assert json.loads(aether(layout, "job", "show", job["job_id"], "--json").stdout)["state"] == "succeeded"
    assert "hi" in aether(layout, "job", "logs", job["job_id"]).stdout
    assert aether(layout, "job", "story", job["job_id"]).stdout


def test_logs_follow_a_running_job_and_stop_ends_its_whole_tree(layout: Layout, client: Client) -> None:
    argv = ["/bin/sh", "-c", "trap '' TERM; (setsid sleep 300 &) ; echo up; sleep 300"]
    job = client.run(argv, wait=False)
    follow = client.logs(job.job_id, follow=True)
    assert b"up" in next(follow)
    client.stop(job.job_id, grace_ms=200)
    ended = client.wait(job.job_id, 10)
    assert ended.state is JobState.CANCELLED
    list(follow)  # ends by itself
    time.sleep(0.2)
    assert not [pid for pid in machine.mentioning("sleep") if machine.argv_of(pid) == ["sleep", "300"]]


def test_a_required_level_that_is_not_there_fails_closed(layout: Layout) -> None:
    found = aether(layout, "run", "--require", "microvm", "--", "/bin/true")
    assert found.returncode not in (0, 124)
    assert "microvm" in found.stderr


def test_explain_prints_the_plan_and_starts_nothing(layout: Layout, client: Client) -> None:
    before = len(client.list(limit=200).jobs)
    found = aether(layout, "cell", "explain", "--", "/bin/true")
    assert found.returncode == 0 and "/work" in found.stdout
    assert len(client.list(limit=200).jobs) == before


# ---- what the kernel did


def test_limits_hold_and_are_visible(client: Client) -> None:
    eater = "b = []\nwhile True: b.append(bytearray(1 << 20))"
    job = client.run(["python3", "-c", eater], limits=Limits(memory_bytes=32 * MIB, timeout_ms=20_000))
    assert job.state is JobState.FAILED and job.error is not None
    assert job.usage is not None
    if job.usage.oom_kills is not None:
        assert job.error.code == "OUT_OF_MEMORY"
        assert job.usage.memory_peak_bytes is not None and job.usage.memory_peak_bytes <= 33 * MIB


def test_the_intruder_meets_walls(client: Client, tmp_path: Path) -> None:
    planted = tmp_path / "secret"
    planted.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        script = {"intruder.py": Path(__file__).parents[2] / "examples/intruder.py"}
        for words in (["secret", str(planted)], ["network", str(port)], ["forks"]):
            small = Limits(memory_bytes=128 * MIB, pids=24, timeout_ms=20_000)
            job = client.run(["python3", "intruder.py", *words], files=script, limits=small)
            output = b"".join(client.logs(job.job_id))
            assert job.exit_code == 13, (words, output)
            assert SECRET.encode() not in output


def test_usage_is_measured(client: Client) -> None:
    job = client.run(["python3", "-c", "x = sum(i * i for i in range(2_000_000))"])
    assert job.usage is not None and job.usage.wall_us is not None and job.usage.wall_us > 0
    assert job.usage.cpu_user_us is not None and job.usage.cpu_user_us > 20_000
    assert job.usage.basis["cpu_user_us"] == "measured"


# ---- over HTTP, as curl would


def test_http_submission_with_a_key_is_done_once(layout: Layout) -> None:
    body = {"kind": "command", "op": "run", "params": {"argv": ["/bin/true"]}}
    status, first = ask(layout, "POST", "/v0/jobs?wait=10s", body, **{"Idempotency-Key": "once"})
    assert status == 200 and first["state"] == "succeeded"
    status, second = ask(layout, "POST", "/v0/jobs?wait=10s", body, **{"Idempotency-Key": "once"})
    assert (status, second["job_id"]) == (200, first["job_id"])
    other = {**body, "params": {"argv": ["/bin/false"]}}
    status, error = ask(layout, "POST", "/v0/jobs", other, **{"Idempotency-Key": "once"})
    assert (status, error["error"]["code"]) == (409, "IDEMPOTENCY_CONFLICT")


def test_http_reads(layout: Layout) -> None:
    body = {"kind": "command", "op": "run", "params": {"argv": ["/bin/echo", "hello"]}}
    _, job = ask(layout, "POST", "/v0/jobs?wait=10s", body)
    path = f"/v0/jobs/{job['job_id']}"
    assert ask(layout, "GET", path)[1]["state"] == "succeeded"
    assert ask(layout, "GET", f"{path}/result")[1]["exit_code"] == 0
    assert ask(layout, "GET", f"{path}/logs")[1] == b"hello\n"
    assert ask(layout, "GET", f"{path}/receipt")[1]["job_id"] == job["job_id"]
    assert ask(layout, "GET", f"/jobs/{job['job_id']}")[1]["job_id"] == job["job_id"]
    assert ask(layout, "GET", "/v0/health")[1]["status"] == "ok"
    assert b"aether_" in ask(layout, "GET", "/v0/metrics")[1]
    assert ask(layout, "GET", "/v0/audit/checkpoint")[1].startswith(b"aether/")
    assert "/v0/jobs" in ask(layout, "GET", "/openapi.json")[1]["paths"]
    assert ask(layout, "GET", "/v0/jobs/job_01a1fc09-7f84-7307-98f5-d23592dd28c0")[0] == 404


def test_every_record_field_is_there(layout: Layout, client: Client) -> None:
    """W2: what does not apply is null, never omitted."""
    job = client.run(["/bin/true"])
    view = ask(layout, "GET", f"/v0/jobs/{job.job_id}")[1]
    for name in ("request_id", "job_id", "model_id", "model_version", "schema_version", "input_hash", "created_at"):
        assert name in view
    assert view["model_id"] is None


# ---- the model


def test_a_bad_tensor_is_refused_and_the_runtime_lives(layout: Layout, client: Client) -> None:
    client.submit(model_request(), wait_s=10)
    before = runtime_pid(layout)
    bad = {
        "DT_NONPOSITIVE": {"dt": [0.05] * 6 + [0.0]},
        "DT_OUT_OF_RANGE": {"dt": [0.05] * 6 + [9.0]},
        "SHAPE": {"obs": [[0.0, 1.0, 2.0]] * 8},
        "NONFINITE": {"obs": {"dtype": "f32", "shape": [8, 2], "b64": nan_tensor(8, 2)}},
    }
    for code, change in bad.items():
        with pytest.raises(AetherError) as caught:
            client.submit(model_request(**change), wait_s=10)
        assert caught.value.code == code
    status, answer = ask(
        layout,
        "POST",
        "/v0/jobs?wait=10s",
        json.loads(__import__("msgspec").json.encode(model_request(**bad["SHAPE"]))),
    )
    assert (status, answer["error"]["code"]) == (422, "SHAPE")
    assert client.submit(model_request(), wait_s=10).state is JobState.SUCCEEDED
    assert runtime_pid(layout) == before


def nan_tensor(*shape: int) -> str:
    return base64.b64encode(np.full(shape, np.nan, dtype="<f4").tobytes()).decode()


def runtime_pid(layout: Layout) -> int:
    spawner = instance.role_pid(layout, "spawner")
    assert spawner is not None
    for pid in machine.family(spawner):
        if "aether.runtime.cfcd" in machine.argv_of(pid):
            return pid
    raise AssertionError("no model runtime")


def test_a_killed_runtime_comes_back(layout: Layout, client: Client) -> None:
    client.submit(model_request(), wait_s=10)
    before = runtime_pid(layout)
    os.kill(before, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert client.submit(model_request(), wait_s=10).state is JobState.SUCCEEDED
            break
        except AetherError as error:
            assert error.code in ("ENGINE_DIED", "UNAVAILABLE"), error
            time.sleep(0.1)
    assert runtime_pid(layout) != before


def test_predict_score_encode_by_the_command(layout: Layout, tmp_path: Path) -> None:
    inputs = json.loads(sample.predict_request()[1])["inputs"]
    trajectory = tmp_path / "traj.json"
    trajectory.write_text(json.dumps(inputs))
    found = aether(layout, "predict", "pendulum", "--input", str(trajectory), "--horizon", "0.1", "0.5", "--json")
    assert len(json.loads(found.stdout)["predictions"]) == 2, found.stderr
    history = inputs["history"]
    sequence = tmp_path / "sequence.json"
    sequence.write_text(json.dumps(history))
    assert "surprise" in json.loads(aether(layout, "score", "pendulum", "--input", str(sequence), "--json").stdout)
    only = tmp_path / "obs.json"
    only.write_text(json.dumps({"obs": history["obs"]}))
    assert len(json.loads(aether(layout, "encode", "pendulum", "--input", str(only), "--json").stdout)["z"]) == 8


def test_unknown_model(client: Client) -> None:
    request = model_request()
    with pytest.raises(AetherError) as caught:
        client.submit(JobRequest(kind="model", op=request.op, params={**request.params, "model": "none"}), wait_s=5)
    assert caught.value.code == "NO_SUCH_MODEL"


def test_a_queued_model_job_ends_too(client: Client) -> None:
    job = client.submit(model_request())
    ended = client.wait(job.job_id, 20)
    assert ended.state is JobState.SUCCEEDED
    assert "predictions" in client.result(job.job_id)


# ---- the proof


def test_receipts_and_the_log_verify_offline(layout: Layout, client: Client, tmp_path: Path) -> None:
    jobs = [client.run(["/bin/true"]).job_id, client.submit(model_request(), wait_s=10).job_id]
    key = str(shutil.copy(layout.audit_public_key, tmp_path))
    second = Path(__file__).parents[2] / "tools/aether_verify.py"
    for job_id in jobs:
        path = tmp_path / f"{job_id}.json"
        path.write_bytes(client.receipt_bytes(job_id))
        assert aether(layout, "verify", str(path), "--key", key).returncode == 0
        assert subprocess.run([sys.executable, "-I", second, "receipt", path, "--key", key]).returncode == 0
        assert aether(layout, "verify", job_id).returncode == 0
        path.write_bytes(path.read_bytes().replace(b"succeeded", b"fucceeded", 1))
        assert aether(layout, "verify", str(path), "--key", key).returncode == 123
    time.sleep(1.2)
    copy = shutil.copytree(layout.audit, tmp_path / "audit", ignore=shutil.ignore_patterns("lock"))
    assert aether(layout, "audit", "verify", str(copy), "--key", key).returncode == 0
    assert subprocess.run([sys.executable, "-I", second, "log", copy, "--key", key]).returncode == 0
    segment = next((copy / "segments").glob("0*"))
    damaged = bytearray(segment.read_bytes())
    damaged[damaged.index(b'"job.outcome"') + 1] ^= 1
    segment.write_bytes(damaged)
    found = aether(layout, "audit", "verify", str(copy), "--key", key)
    assert found.returncode == 123 and "FRAME_BAD" in found.stdout + found.stderr


def test_the_receipt_says_what_was_enforced(client: Client) -> None:
    receipt = client.receipt(client.run(["/bin/true"]).job_id)
    outcome = json.loads(receipt.entries[-1].entry)
    sandbox = json.loads(receipt.documents[outcome["code"]["sandbox_digest"]])
    assert sandbox["enforced"] and sandbox["level"] in ("cell", "process")
    assert outcome["usage"]["wall_us"] > 0
    assert outcome["budget"]["settled"] is True


# ---- secrets and modes


def test_a_secret_in_the_environment_is_in_no_record_log_or_process_list(layout: Layout, client: Client) -> None:
    job = client.run(["/bin/sh", "-c", 'sleep 0.3; test -n "$TOKEN"'], env={"TOKEN": SECRET}, wait=False)
    time.sleep(0.15)
    assert not machine.mentioning(SECRET)
    assert client.wait(job.job_id, 10).state is JobState.SUCCEEDED
    time.sleep(1.1)
    for path in (*layout.audit.rglob("*"), *layout.daemon_logs.rglob("*"), *layout.job_logs.rglob("*")):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_modes_are_tight(layout: Layout) -> None:
    assert stat.S_IMODE(layout.root.stat().st_mode) == 0o750
    assert stat.S_IMODE(layout.api_socket.stat().st_mode) == 0o660
    for path in layout.keys.iterdir():
        if path.is_file() and path.name not in ("audit.pub",):
            assert not stat.S_IMODE(path.stat().st_mode) & 0o007, path
    for name in ("audit.key", "tickets.key"):
        assert stat.S_IMODE((layout.keys / name).stat().st_mode) == 0o600
    for path in layout.root.rglob("*"):
        if not path.is_relative_to(layout.models) and path.is_file():
            assert not path.stat().st_mode & 0o002, path
