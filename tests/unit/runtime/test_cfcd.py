"""The real process over its socket: every operation, every refusal, batching, isolation of requests, its ends."""

from __future__ import annotations

import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aether.contract.codec import encode_frame
from aether.contract.limits import FRAME_BYTES_MAX, MODEL_BATCH_MAX
from aether.contract.modelwire import PROTOCOL_VERSION, EncodeResult, InferReply, PredictResult, ScoreResult
from aether.runtime.cfcd.service import Service
from aether.runtime.inference import Inference
from aether.worldmodel.data import generate
from tests.unit.runtime.cfcd_client import PACKAGE, PUBLIC_KEY, Client, cfcd, command

DATA = generate(80, 17, 3)
PARAMS = {"horizons_s": [0.1]}


def inputs(row: int = 0, count: int = 17) -> dict[str, Any]:
    history = {
        "obs": DATA.obs[row, :count].tolist(),
        "action": DATA.action[row, : count - 1].tolist(),
        "dt": DATA.dt[row, : count - 1].tolist(),
    }
    return {"history": history, "action": [0.5]}


def good(client: Client) -> InferReply:
    reply = client.call("predict_next_state", PARAMS, inputs())
    assert reply.ok and reply.error is None
    return reply


def test_hello_names_the_verified_model(client: Client) -> None:
    assert client.hello.protocol_version == PROTOCOL_VERSION and client.hello.pid == client.process.pid
    (model,) = client.hello.models
    assert (model.id, model.version) == ("pendulum", "1.0.0") and model.digest.startswith("sha256:")
    assert [column.name for column in model.schema.observation] == ["cos_theta", "sin_theta"]


def test_predict_answers_json_of_the_documented_shape(client: Client) -> None:
    reply = client.call("predict_next_state", {"horizons_s": [0.1, 0.9]}, inputs())
    assert reply.ok and reply.result is not None and reply.batch_size == 1
    near, far = msgspec.json.decode(reply.result, type=PredictResult).predictions
    assert len(near.mean) == len(near.std) == 2 and np.shape(near.interval90) == (2, 2) and len(near.z_hat) == 8
    assert (near.extrapolating, far.extrapolating) == (False, True)


def test_encode_and_score(client: Client) -> None:
    encoded = client.call("encode_state", {}, {"obs": [[1, 0], [0, 1]]})
    assert encoded.result is not None
    assert np.shape(msgspec.json.decode(encoded.result, type=EncodeResult).z) == (2, 8)
    history = inputs()["history"]
    scored = client.call("score_sequence", {}, history)
    assert scored.result is not None
    assert len(msgspec.json.decode(scored.result, type=ScoreResult).surprise) == 16


@pytest.mark.parametrize(
    ("op", "params", "given", "code"),
    [
        ("predict_next_state", {"horizons_s": [9.0]}, inputs(), "DT_OUT_OF_RANGE"),
        ("predict_next_state", {"horizons_s": [-1.0]}, inputs(), "DT_NONPOSITIVE"),
        ("predict_next_state", PARAMS, {**inputs(), "action": [math.nan]}, "NONFINITE"),
        ("predict_next_state", PARAMS, {**inputs(), "action": []}, "SHAPE"),
        ("predict_next_state", PARAMS, {**inputs(), "units": {"time": "ms"}}, "UNIT"),
        ("predict_next_state", PARAMS, {}, "BAD_FIELD"),
        ("encode_state", {}, {"obs": [[1, 2, 3]]}, "SHAPE"),
    ],
)
def test_a_bad_request_is_refused_and_the_same_process_goes_on(
    client: Client, op: str, params: dict[str, Any], given: dict[str, Any], code: str
) -> None:
    reply = client.call(op, params, given)
    assert not reply.ok and reply.result is None and reply.error is not None and reply.error.code == code
    good(client)


def test_another_model_and_a_past_deadline_are_refused(client: Client) -> None:
    unknown = client.call("predict_next_state", PARAMS, inputs(), model_version="9.9.9")
    assert unknown.error is not None and unknown.error.code == "NO_SUCH_MODEL"
    late = client.call("predict_next_state", PARAMS, inputs(), deadline_ms=-1)
    assert late.error is not None and late.error.code == "TIMED_OUT"


def test_requests_that_arrive_together_share_a_batch_and_keep_their_answers(client: Client) -> None:
    alone = {}
    for row in range(MODEL_BATCH_MAX):
        reply = client.call("predict_next_state", PARAMS, inputs(row))
        assert reply.result is not None
        alone[row] = msgspec.json.decode(reply.result, type=PredictResult).predictions[0].mean
    requests = [client.request("predict_next_state", PARAMS, inputs(row)) for row in range(MODEL_BATCH_MAX)]
    rows = {request.request_id: row for row, request in enumerate(requests)}
    client.send(*requests)
    replies = [client.receive() for _ in requests]
    assert {reply.request_id for reply in replies} == set(rows)
    assert max(reply.batch_size for reply in replies) > 1
    for reply in replies:
        assert reply.result is not None
        mean = msgspec.json.decode(reply.result, type=PredictResult).predictions[0].mean
        assert np.allclose(mean, alone[rows[reply.request_id]], atol=1e-4)


def payload(client: Client, row: int = 0, count: int = 17, **fields: Any) -> bytes:
    return encode_frame(client.request("predict_next_state", PARAMS, inputs(row, count), **fields))[4:]


def answered(service: Service, payloads: list[bytes]) -> list[InferReply]:
    frames = service.replies(payloads, time.perf_counter_ns())
    return [msgspec.msgpack.decode(frame[4:], type=InferReply) for frame in frames]


def test_batches_never_mix_keys_shapes_or_more_than_the_bound(client: Client, inference: Inference) -> None:
    service = Service([inference])
    mixed = [payload(client, row, 17 - row % 2, batch_key=f"tenant{row % 3}") for row in range(60)]
    assert {reply.batch_size for reply in answered(service, mixed)} == {10} and service.batches == 6
    many = [payload(client, row % 80) for row in range(MODEL_BATCH_MAX + 6)]
    assert {reply.batch_size for reply in answered(service, many)} == {MODEL_BATCH_MAX, 6}


def test_a_failing_batch_is_run_one_by_one(client: Client, inference: Inference, monkeypatch: Any) -> None:
    run = Inference.run

    def fragile(self: Inference, queries: Any) -> Any:
        if any(query.held[0] == 1.5 for query in queries):
            raise RuntimeError("native failure")
        return run(self, queries)

    monkeypatch.setattr(Inference, "run", fragile)
    bad = client.request("predict_next_state", PARAMS, {**inputs(), "action": [1.5]}, request_id="bad")
    replies = answered(Service([inference]), [payload(client), encode_frame(bad)[4:], payload(client)])
    assert [(reply.ok, reply.batch_size) for reply in replies if reply.request_id != "bad"] == [(True, 1)] * 2
    (refused,) = [reply for reply in replies if reply.request_id == "bad"]
    assert refused.error is not None and refused.error.code == "INTERNAL"


def test_the_largest_requests_fit_their_replies(client: Client) -> None:
    limits = client.hello.models[0].limits
    count = limits.sequence_max
    long = {"obs": [[1, 0]] * count, "action": [[0]] * (count - 1), "dt": [0.1] * (count - 1)}
    for reply in (
        client.call("score_sequence", {}, long),
        client.call("encode_state", {}, {"obs": [[0.1, 0.2]] * limits.encode_rows_max}),
        client.call("predict_next_state", {"horizons_s": [0.9] * limits.horizons_max}, inputs()),
    ):
        assert reply.ok, reply.error


def test_unreadable_payloads_are_answered_and_the_stream_goes_on(client: Client) -> None:
    for raw in (b"\xc1", b"", msgspec.msgpack.encode({"request_id": 5}), b"\x91" * 5000 + b"\x00"):
        client.link.sendall(struct.pack(">I", len(raw)) + raw)
        reply = client.receive()
        assert reply.error is not None and reply.error.code == "PROTOCOL" and reply.request_id == ""
    good(client)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_payload_gets_one_reply(inference: Inference, raw: bytes) -> None:
    assert len(answered(Service([inference]), [raw])) == 1


def test_an_oversized_frame_ends_the_process_with_a_message() -> None:
    with cfcd() as running:
        running.link.sendall(struct.pack(">I", FRAME_BYTES_MAX + 1))
        assert running.process.wait(10) not in (0, -signal.SIGSEGV)


def test_eof_ends_the_process() -> None:
    with cfcd() as running:
        running.link.shutdown(socket.SHUT_WR)
        assert running.process.wait(10) == 0


def test_sigterm_answers_what_was_received_and_exits_0() -> None:
    with cfcd() as running:
        good(running)
        running.process.send_signal(signal.SIGSTOP)
        running.send(*[running.request("predict_next_state", PARAMS, inputs(row)) for row in range(20)])
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGCONT)
        assert all(running.receive().ok for _ in range(20))
        assert running.process.wait(10) == 0


def test_a_package_that_does_not_verify_never_says_hello(tmp_path: Path) -> None:
    broken = tmp_path / "pendulum" / "1.0.0"
    shutil.copytree(PACKAGE, broken)
    with (broken / "step.onnx").open("ab") as file:
        file.write(b"x")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            command(theirs.fileno(), broken, PUBLIC_KEY), pass_fds=[theirs.fileno()], capture_output=True, timeout=30
        )
        theirs.close()
        assert ours.recv(1) == b""
    assert done.returncode not in (0, 1)
    assert b"cannot load model pendulum/1.0.0: step.onnx" in done.stderr and b"Traceback" not in done.stderr


def test_keys_come_from_a_directory_too() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [*command(theirs.fileno(), PACKAGE, PUBLIC_KEY)[:-2], "--keys", str(PUBLIC_KEY.parent)]
        with subprocess.Popen(argv, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            assert Client(ours, process).hello.models
            ours.close()
            assert process.wait(10) == 0


def test_a_slow_reader_blocks_only_its_own_runtime(client: Client) -> None:
    """More replies than the socket holds: the runtime waits, then every reply arrives."""
    requests = [client.request("encode_state", {}, {"obs": [[0.1, 0.2]] * 512}) for _ in range(40)]
    sender = threading.Thread(target=client.send, args=requests)
    sender.start()
    time.sleep(0.3)
    assert all(client.receive().ok for _ in requests)
    sender.join(10)
    assert not sender.is_alive()


def test_start_imports_no_training_library() -> None:
    code = (
        "import sys, aether.runtime.cfcd.__main__ as m;"
        "print([n for n in ('torch', 'onnx', 'asyncio', 'aether.worldmodel') if n in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, env=os.environ)
    assert out.stdout.strip() == "[]"
