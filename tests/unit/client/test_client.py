"""The client against the real server: every method, retries only where safe, errors as the table says."""

from __future__ import annotations

import inspect
import io
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from aether.api.operations import OPERATIONS
from aether.client import Client, approvals, audit, budgets, cells, identity, policy, tickets
from aether.client.inputs import gather
from aether.contract.cells import Limits
from aether.contract.errors import AetherError
from aether.contract.jobs import CommandParams, JobRequest, JobState
from tests.unit.api.http_node import HttpNode

MODEL = JobRequest(kind="model", op="encode_state", params={"model": "pendulum"}, inputs={"obs": [[1.0]]})


def test_every_operation_has_its_method(client: Client) -> None:
    job = client.run(["echo", "hello"])
    assert job.state is JobState.SUCCEEDED and job.principal == f"uid:{os.geteuid()}"
    assert client.get(job.job_id).job_id == job.job_id
    assert client.result(job.job_id) == {"exit_code": 0}
    assert b"".join(client.logs(job.job_id, stream="stdout")) == b"hello\n"
    assert client.receipt(job.job_id).job_id == job.job_id
    assert client.receipt_bytes(job.job_id).startswith(b'{"checkpoint"')
    assert client.story(job.job_id).lines[0].event == "submitted"
    assert client.stop(job.job_id).state is JobState.SUCCEEDED
    assert client.list(states=[JobState.SUCCEEDED], limit=1).jobs[0].job_id == job.job_id
    assert client.health().status == "ok"
    assert client.metrics().startswith("# TYPE")
    assert client.models().models[0].model_id == "pendulum"
    assert client.checkpoint().startswith("node_x\n")
    assert client.explain(CommandParams(argv=("true",))).lines
    assert client.doctor().checks[0]["ok"] is True
    info = client.artifact_put(b"abc", media_type="text/plain")
    assert (client.artifact_bytes(info.digest), info.media_type) == (b"abc", "text/plain")
    assert client.artifact_list().artifacts[0].digest == info.digest
    job = client.get(job.job_id)
    assert client.signal(job.job_id, 15).job_id == client.window(job.job_id, 24, 80).job_id == job.job_id
    source = inspect.getsource(Client) + inspect.getsource(cells) + inspect.getsource(tickets)
    source += inspect.getsource(audit) + inspect.getsource(budgets) + inspect.getsource(approvals)
    source += inspect.getsource(identity) + inspect.getsource(policy)
    assert all(f'"{operation.name}"' in source for operation in OPERATIONS)


def test_models(client: Client) -> None:
    history = {"t": [0.0, 0.1], "obs": [[1.0, 0.0]] * 2, "action": [[0.0]]}
    predicted = client.predict("pendulum", history, [0.1, 0.5], action=[0.0])
    assert predicted == {"op": "predict_next_state", "inputs": ["action", "history"]}
    assert client.score("pendulum", history)["op"] == "score_sequence"
    assert client.encode("pendulum", {"obs": [[1.0, 0.0]]})["op"] == "encode_state"


def test_run_uploads_files_and_directory(node: HttpNode, client: Client, tmp_path: Path) -> None:
    root = tmp_path / "work"
    (root / "sub").mkdir(parents=True)
    (root / "main.py").write_text("print(1)")
    (root / "sub/tool").write_text("#!/bin/sh\n")
    (root / "sub/tool").chmod(0o755)
    (root / "link").symlink_to("main.py")
    job = client.run(["echo"], directory=root, files={"main.py": root / "sub/tool"}, limits=Limits(pids=3))
    assert job.state is JobState.SUCCEEDED
    files = {f.path: f for f in client.upload({}, root)}
    assert sorted(files) == ["link", "main.py", "sub/tool"]
    assert files["sub/tool"].executable and not files["main.py"].executable
    assert files["link"].artifact == files["main.py"].artifact


def test_inputs_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("x")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AetherError, match="not a regular file"):
        gather({"fifo": tmp_path / "fifo"}, None)
    for name in ("/abs", "../up", "a//b", ""):
        with pytest.raises(AetherError, match="relative path"):
            gather({name: outside}, None)
    with pytest.raises(AetherError, match="No such file"):
        gather({"x": tmp_path / "missing"}, None)
    with pytest.raises(AetherError, match="not a directory"):
        gather({}, outside)
    (tmp_path / "d/leak").symlink_to(outside)
    with pytest.raises(AetherError, match="leaves the directory"):
        gather({}, tmp_path / "d")
    (tmp_path / "d/leak").unlink()
    (tmp_path / "d/dir").symlink_to(tmp_path)
    with pytest.raises(AetherError, match="link to a directory"):
        gather({}, tmp_path / "d")


def test_errors_carry_code_remedy_and_request_id(client: Client) -> None:
    with pytest.raises(AetherError) as caught:
        client.get("job_01a1fbeb-b57e-70cd-8916-2cadfeb60e92")
    assert caught.value.code == "NOT_FOUND" and caught.value.remedy
    assert caught.value.details["request_id"].startswith("req_")
    with pytest.raises(AetherError) as caught:
        client.submit(JobRequest(kind="command", op="run", params={"argv": ["x" * 300_000]}))
    assert caught.value.code == "TOO_LARGE"
    with pytest.raises(AetherError) as caught:
        client.submit(JobRequest(kind="command", op="run", params={"argv": ["x" * 50_000_000]}))
    assert caught.value.code == "TOO_LARGE"
    assert client.health().status == "ok"


def test_unreachable(tmp_path: Path) -> None:
    client = Client(tmp_path / "nobody.sock")
    client._transport._retries = 0
    assert not client.reachable()
    with pytest.raises(AetherError) as caught:
        client.health()
    assert caught.value.code == "UNREACHABLE" and "aether up" in caught.value.remedy


def test_defaults_come_from_the_environment(node: HttpNode) -> None:
    with Client(environment={"AETHER_STATE": str(node.root), "AETHER_TICKET": "aetk1_abc"}) as client:
        client.health()
    assert node.service.callers[-1].credential == "aetk1_abc"
    assert Client(environment={}).state in (Path("/var/lib/aether/aurora"), Path.home() / ".local/state/aether")


def test_busy_is_retried_when_safe(node: HttpNode, client: Client) -> None:
    node.service.fail_next += [AetherError("UNAVAILABLE", "cannot now"), AetherError("BUSY", "cannot now")]
    client._transport._retries = 2
    assert client.health().status == "ok"
    node.service.fail_next.append(AetherError("UNAVAILABLE", "cannot now"))
    assert client.submit(MODEL).state is JobState.SUCCEEDED
    node.service.fail_next += [AetherError("POLICY_DENIED", "cannot")]
    with pytest.raises(AetherError, match="POLICY_DENIED"):
        client.submit(MODEL)
    assert node.service.fail_next == []


def test_submission_is_made_once_when_the_answer_is_lost(tmp_path: Path) -> None:
    """A proxy cuts the connection after the request went through; the repeat has the same key."""
    with HttpNode(tmp_path / "state") as node:
        path = tmp_path / "proxy.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def proxy() -> None:
            for turn in range(2):
                client_side, _ = listener.accept()
                with client_side, node.connect() as server_side:
                    request = client_side.recv(65536)
                    while b"encode_state" not in request:
                        request += client_side.recv(65536)
                    server_side.sendall(request)
                    answer = server_side.recv(65536)
                    while not answer.endswith(b"}}"):
                        answer += server_side.recv(65536)
                    if turn:
                        client_side.sendall(answer)
                        client_side.recv(1)

        thread = threading.Thread(target=proxy)
        thread.start()
        with Client(path) as client:
            job = client.submit(MODEL)
        thread.join(5)
        listener.close()
        assert list(node.service.jobs) == [job.job_id]


def test_kept_connection_closed_by_the_server_is_replaced(node: HttpNode, client: Client) -> None:
    client.health()
    node.loop.call_soon_threadsafe(lambda: [c.transport.abort() for c in node.server._state.connections])
    time.sleep(0.1)
    assert client.health().status == "ok"
    assert client.artifact_put(io.BytesIO(b"x" * 100_000)).size_bytes == 100_000


def test_connection_is_reused(node: HttpNode, client: Client) -> None:
    for _ in range(5):
        client.health()
        client.run(["echo", "x"])
        with pytest.raises(AetherError):
            client.get("job_01a1fbeb-b57e-70cd-8916-2cadfeb60e92")
    assert node.server.statistics()["connections"] == 1


def test_logs_can_be_left_early_and_follow_streams(node: HttpNode, client: Client) -> None:
    job = client.run(["lines", "5", "0.05"], wait=False)
    stream = client.logs(job.job_id, stream="stdout", follow=True)
    assert next(stream) == b"line 0\n"
    stream.close()
    whole = b"".join(client.logs(job.job_id, stream="stderr", follow=True))
    assert whole == b"".join(b"note %d\n" % n for n in range(5))
    deadline = time.monotonic() + 5
    while node.service.streams_open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert node.service.streams_open == 0


def test_wrong_bytes_of_an_artifact_are_noticed(node: HttpNode, client: Client) -> None:
    digest = client.artifact_put(b"right").digest
    node.service.artifacts[digest] = (b"wrong", node.service.artifacts[digest][1])
    with pytest.raises(AetherError) as caught:
        client.artifact_bytes(digest)
    assert caught.value.code == "VERIFY_FAILED"


def test_truncated_answer_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for body in (b"5\r\nhello\r\n", b"", b"garbage"):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    head = b"transfer-encoding: chunked\r\n\r\n" if body else b"content-length: 10\r\n\r\nabc"
                    if body == b"garbage":
                        connection.sendall(b"not http at all\r\n\r\n")
                    else:
                        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + body)

        thread = threading.Thread(target=serve)
        thread.start()
        client = Client(path)
        client._transport._retries = 0
        with pytest.raises(AetherError, match="PROTOCOL"):
            list(client.logs("job_01a1fbeb-b57e-70cd-8916-2cadfeb60e92"))
        with pytest.raises(AetherError, match="PROTOCOL"):
            client.health()
        with pytest.raises(AetherError, match=r"UNREACHABLE|PROTOCOL"):
            client.health()
        thread.join(5)
        client.close()
