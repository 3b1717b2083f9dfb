"""The HTTP application on its real server: statuses, headers, bodies, streams, and what happens on a hang-up."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.client.transport import UnixConnection
from aether.contract import calls, limits
from aether.contract.errors import AetherError
from tests.unit.api.http_node import HttpNode, read_answer

MODEL_JOB = {
    "kind": "model",
    "op": "predict_next_state",
    "params": {"model": "pendulum", "horizons_s": [0.1]},
    "inputs": {"history": {"obs": [[1.0, 0.0]]}, "action": [0.0]},
}

OVERSIZED = b" " * (limits.HTTP_BODY_BYTES_MAX + 1)
POST_JSON = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n"


def command(*argv: str, **params: Any) -> dict[str, Any]:
    return {"kind": "command", "op": "run", "params": {"argv": list(argv), **params}}


class Http:
    """One keep-alive connection."""

    def __init__(self, node: HttpNode) -> None:
        self._connection = UnixConnection(node.socket_path, 10)

    def __call__(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        self._connection.request(method, path, body, sent)
        response = self._connection.getresponse()
        return response.status, response.headers, response.read()

    def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        status, _, text = self(method, path, body, **headers)
        reply = json.loads(text)
        assert set(reply) == {"error", "request_id"}
        assert set(reply["error"]) == {"code", "message", "remedy", "details"}
        assert reply["error"]["message"].startswith("cannot ")
        return status, reply["error"]["code"]

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def http_(node: HttpNode) -> Iterator[Http]:
    connection = Http(node)
    yield connection
    connection.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_submit_answers_202_then_200(http_: Http) -> None:
    status, headers, text = http_("POST", "/v0/jobs", command("sleep", "0.2"), x_request_id="mine-1")
    job = json.loads(text)
    assert (status, job["state"], headers["X-Request-Id"], job["request_id"]) == (202, "queued", "mine-1", "mine-1")
    assert headers["Location"] == f"/v0/jobs/{job['job_id']}"
    assert job["exit_code"] is None and "exit_code" in job
    status, _, text = http_("GET", f"/jobs/{job['job_id']}?wait=10s")
    assert (status, json.loads(text)["state"]) == (200, "succeeded")
    status, _, text = http_("POST", "/jobs?wait=10s", command("exit", "3"))
    assert (status, json.loads(text)["exit_code"]) == (200, 3)
    status, _, text = http_("POST", "/v0/jobs?wait=10s", MODEL_JOB)
    assert (status, json.loads(text)["result"]["op"]) == (200, "predict_next_state")


def test_caller_is_peer_and_headers(node: HttpNode, http_: Http) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    http_("POST", "/v0/jobs", MODEL_JOB, authorization="Bearer aetk1_x", traceparent=trace, idempotency_key="k1")
    caller = node.service.callers[-1]
    assert (caller.uid, caller.gid, caller.pid) == (os.geteuid(), os.getegid(), os.getpid())
    assert (caller.credential, caller.traceparent, caller.idempotency_key) == ("aetk1_x", trace, "k1")
    _, _, first = http_("POST", "/v0/jobs", MODEL_JOB, idempotency_key="k1")
    _, _, second = http_("POST", "/v0/jobs", MODEL_JOB, idempotency_key="k1")
    assert json.loads(first)["job_id"] == json.loads(second)["job_id"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "expected"),
    [
        ("GET", "/nope", None, {}, (404, "NO_SUCH_ROUTE")),
        ("GET", "/v0/jobs/", None, {}, (404, "NO_SUCH_ROUTE")),
        ("GET", "/v0/jobs/..%2f..%2fetc", None, {}, (404, "NO_SUCH_ROUTE")),
        ("GET", "/v0/jobs/job_x", None, {}, (400, "BAD_ID")),
        ("GET", "/v0/jobs/%00%ff", None, {}, (400, "BAD_ID")),
        ("GET", "/v0/artifacts/sha256:abc", None, {}, (400, "BAD_ID")),
        ("DELETE", "/v0/jobs", None, {}, (405, "METHOD_NOT_ALLOWED")),
        ("GET", "/v0/jobs?limt=5", None, {}, (400, "BAD_REQUEST")),
        ("GET", "/v0/jobs?limit=0", None, {}, (400, "BAD_REQUEST")),
        ("POST", "/v0/jobs", b"{", {"content_type": "application/json"}, (400, "BAD_JSON")),
        ("POST", "/v0/jobs", b"", {"content_type": "application/json"}, (400, "BAD_JSON")),
        ("POST", "/v0/jobs", b"{}", {"content_type": "application/json"}, (422, "BAD_FIELD")),
        ("POST", "/v0/jobs", {**MODEL_JOB, "extra": 1}, {}, (422, "BAD_FIELD")),
        ("POST", "/v0/jobs", {**MODEL_JOB, "kind": "magic"}, {}, (422, "BAD_FIELD")),
        ("POST", "/v0/jobs", b"a=b", {"content_type": "application/x-www-form-urlencoded"}, (415, "MEDIA_TYPE")),
        ("POST", "/v0/jobs", b"{}", {}, (415, "MEDIA_TYPE")),
        ("POST", "/v0/jobs", MODEL_JOB, {"content_encoding": "gzip"}, (415, "MEDIA_TYPE")),
        ("POST", "/v0/jobs", MODEL_JOB, {"idempotency_key": "x" * 129}, (400, "BAD_REQUEST")),
        ("POST", "/v0/jobs", MODEL_JOB, {"authorization": "Basic eDp5"}, (401, "UNAUTHENTICATED")),
        ("POST", "/v0/jobs", OVERSIZED, {"content_type": "application/json"}, (413, "TOO_LARGE")),
        ("GET", "/v0/health", None, {"x_long": "y" * limits.HTTP_HEADER_BYTES_MAX}, (431, "HEADERS_TOO_LARGE")),
        ("POST", "/v0/jobs", b"[" * 100_000, {"content_type": "application/json"}, (400, "BAD_JSON")),
    ],
)  # fmt: skip
def test_refusals(http_: Http, method: str, path: str, body: Any, headers: dict[str, str], expected: Any) -> None:
    assert http_.error(method, path, body, **headers) == expected


def test_refusal_headers(node: HttpNode, http_: Http) -> None:
    assert http_("PATCH", "/v0/jobs")[1]["Allow"] == "GET, HEAD, OPTIONS, POST"
    assert http_("GET", "/v0/health", authorization="Basic x")[1]["WWW-Authenticate"] == "Bearer"
    node.service.fail_next.append(AetherError("BUSY", "cannot take more", retry_after_s=7))
    status, headers, _ = http_("GET", "/v0/health")
    assert (status, headers["Retry-After"]) == (429, "7")


def test_head_and_options(http_: Http) -> None:
    status, headers, body = http_("HEAD", "/v0/health")
    assert status == 200 and body == b"" and int(headers["Content-Length"]) > 100
    status, headers, body = http_("OPTIONS", "/v0/jobs")
    assert (status, headers["Allow"], body) == (204, "GET, HEAD, OPTIONS, POST", b"")
    assert http_.error("OPTIONS", "/nope") == (404, "NO_SUCH_ROUTE")


def test_unexpected_exception_is_internal_and_harms_nobody(node: HttpNode, http_: Http) -> None:
    node.service.fail_next.append(RuntimeError("secret detail"))
    status, _, text = http_("GET", "/v0/health")
    assert status == 500 and b"secret" not in text and b"INTERNAL" in text
    assert http_("GET", "/v0/health")[0] == 200


def test_stop_with_and_without_body(http_: Http) -> None:
    for body in (None, {"grace_ms": 1}):
        job = json.loads(http_("POST", "/v0/jobs", command("sleep", "60"))[2])
        status, _, text = http_("POST", f"/v0/jobs/{job['job_id']}/stop", body)
        assert (status, json.loads(text)["state"]) == (200, "cancelled")
    assert http_.error("POST", f"/v0/jobs/{job['job_id']}/stop", {"grace": 1}) == (422, "BAD_FIELD")


def test_artifacts_roundtrip(node: HttpNode, http_: Http) -> None:
    http_("GET", "/v0/health")
    open_before = open_files()
    for size in (0, 1, 65_536, 3_000_001):
        data = os.urandom(size)
        status, _, text = http_("PUT", "/v0/artifacts", data, content_type="text/csv")
        info = json.loads(text)
        assert (status, info["digest"]) == (201, "sha256:" + hashlib.sha256(data).hexdigest())
        status, headers, got = http_("GET", f"/v0/artifacts/{info['digest']}")
        assert (status, got, headers["Content-Type"]) == (200, data, "text/csv")
        assert headers["ETag"] == f'"{info["digest"]}"' and headers["Repr-Digest"].startswith("sha-256=:")
        status, headers, got = http_("HEAD", f"/v0/artifacts/{info['digest']}")
        assert (status, got, headers["Content-Length"]) == (200, b"", str(size))
    assert not list((node.root / "spool").iterdir())
    eventually(lambda: open_files() <= open_before)


def test_upload_above_the_bound_is_refused_before_it_is_read(node: HttpNode) -> None:
    head = b"PUT /v0/artifacts HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (limits.UPLOAD_BYTES_MAX + 1)
    answer = node.exchange(head)
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer


def test_logs_follow_and_close_on_hang_up(node: HttpNode, http_: Http) -> None:
    job = json.loads(http_("POST", "/v0/jobs", command("lines", "3", "0.05"))[2])
    status, _, text = http_("GET", f"/v0/jobs/{job['job_id']}/logs?follow=1&stream=stdout")
    assert (status, text) == (200, b"line 0\nline 1\nline 2\n")
    assert http_("GET", f"/v0/jobs/{job['job_id']}/logs?stream=stdout&cursor=7")[2] == b"line 1\nline 2\n"
    silent = json.loads(http_("POST", "/v0/jobs", command("sleep", "60"))[2])
    with node.connect() as follower:
        follower.sendall(b"GET /v0/jobs/%s/logs?follow=1 HTTP/1.1\r\nhost: x\r\n\r\n" % silent["job_id"].encode())
        assert follower.recv(4096).startswith(b"HTTP/1.1 200")
        assert node.service.streams_open == 1
    eventually(lambda: node.service.streams_open == 0)
    eventually(lambda: node.app.statistics()["running"] == 0)


def test_slow_reader_slows_the_source(node: HttpNode, http_: Http) -> None:
    produced = 0

    async def endless(caller: calls.Caller, call: calls.LogsCall) -> calls.StreamReply:
        async def chunks() -> Any:
            nonlocal produced
            while True:
                produced += 65536
                yield bytes(65536)

        return calls.StreamReply(chunks(), "application/octet-stream")

    node.service.handlers["job.logs"] = endless
    with node.connect() as reader:
        reader.sendall(b"GET /v0/jobs/job_01a1fbeb-b57e-70cd-8916-2cadfeb60e92/logs HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(0.5)
        assert 0 < produced < 4 * limits.MIB
        started = time.monotonic()
        assert http_("GET", "/v0/health")[0] == 200
        assert time.monotonic() - started < 1
    eventually(lambda: node.app.statistics()["running"] == 0)


def test_a_read_ends_with_its_connection_a_submission_does_not(node: HttpNode, http_: Http) -> None:
    job = json.loads(http_("POST", "/v0/jobs", command("sleep", "60"))[2])
    with node.connect() as waiter:
        waiter.sendall(b"GET /v0/jobs/%s?wait=60s HTTP/1.1\r\nhost: x\r\n\r\n" % job["job_id"].encode())
        eventually(lambda: node.app.statistics()["running"] == 1)
    eventually(lambda: node.app.statistics()["running"] == 0)
    body = json.dumps(command("sleep", "0.3")).encode()
    before = len(node.service.jobs)
    with node.connect() as submitter:
        submitter.sendall(POST_JSON % (b"/v0/jobs?wait=60s", len(body), b"") + body)
        eventually(lambda: len(node.service.jobs) == before + 1)
    assert node.app.statistics()["running"] == 1
    eventually(lambda: node.app.statistics()["running"] == 0)
    assert sorted(j.view.state for j in node.service.jobs.values())[-1] == "succeeded"


def test_body_that_ends_early_submits_nothing(node: HttpNode) -> None:
    with node.connect() as client:
        client.sendall(
            b"POST /v0/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90\r\n\r\n{"
        )
    eventually(lambda: node.app.statistics()["running"] == 0)
    assert node.service.jobs == {}


def test_expect_continue_is_not_invited_to_a_refused_body(node: HttpNode) -> None:
    expect = b"expect: 100-continue\r\n"
    assert node.exchange(POST_JSON % (b"/v0/jobs", 100_000_000, expect)).startswith(b"HTTP/1.1 413")
    with node.connect() as client:
        body = json.dumps(MODEL_JOB).encode()
        client.sendall(POST_JSON % (b"/v0/jobs", len(body), expect))
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert read_answer(client).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_order(node: HttpNode) -> None:
    with node.connect() as client:
        one = b"GET /v0/health HTTP/1.1\r\nhost: x\r\nx-request-id: n%d\r\n\r\n"
        client.sendall(b"".join(one % n for n in range(8)))
        received = b""
        while received.count(b"HTTP/1.1 200") < 8 or not received.endswith(b"}"):
            received += client.recv(65536)
    assert [received.find(b"x-request-id: n%d" % n) for n in range(8)] == sorted(
        received.find(b"x-request-id: n%d" % n) for n in range(8)
    )
