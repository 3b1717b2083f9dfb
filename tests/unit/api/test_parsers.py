"""Everything that meets a client's bytes before a handler does: total, bounded, and only AetherError comes out."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.api import head as heads
from aether.api import params
from aether.api.body import decode_json
from aether.api.head import Head, read_head
from aether.api.operations import OPERATIONS
from aether.api.router import Router
from aether.contract import limits
from aether.contract.errors import AetherError

ANY = msgspec.json.Decoder(Any)
ROUTER = Router(OPERATIONS, ("/openapi.json",))
JOB = "job_01a1fbeb-b57e-70cd-8916-2cadfeb60e92"
APPROVAL = JOB.replace("job", "approval")
ALL_PARAMS = tuple({p.name: p for o in OPERATIONS for p in o.query}.values())


@given(st.text())
def test_param_parsers_are_total(text: str) -> None:
    for param in ALL_PARAMS:
        try:
            param.parse(text)
        except AetherError as error:
            assert error.code in ("BAD_REQUEST", "BAD_ID")


@given(st.binary(max_size=200))
def test_queries_are_total(query: bytes) -> None:
    try:
        fields = params.parse_query(query, ALL_PARAMS)
    except AetherError as error:
        assert error.code in ("BAD_REQUEST", "BAD_ID")
    else:
        assert set(fields) <= {p.field for p in ALL_PARAMS}


@pytest.mark.parametrize(
    ("text", "ms"), [("10s", 10_000), ("500ms", 500), ("1m", 60_000), ("2", 2000), ("0.5s", 500), ("999999m", 60_000)]
)
def test_wait(text: str, ms: int) -> None:
    assert params.parse_wait(text) == ms


@pytest.mark.parametrize("text", ["", "-1s", "1 s", "1h", "١s", "1e3", "s"])
def test_wait_refuses(text: str) -> None:
    with pytest.raises(AetherError):
        params.parse_wait(text)


def test_query_refuses_unknown_and_repeated() -> None:
    for query in (b"nope=1", b"wait=1s&wait=2s", b"wait=%ff", b"&".join([b"wait=1s"] * 50)):
        with pytest.raises(AetherError, match="cannot"):
            params.parse_query(query, (params.WAIT,))
    assert params.parse_query(b"state=running&state=queued", (params.STATE,)) == {"state": ("running", "queued")}


def test_cached_query_is_not_shared() -> None:
    params.parse_query(b"wait=1s", (params.WAIT,))["wait_ms"] = 7
    assert params.parse_query(b"wait=1s", (params.WAIT,)) == {"wait_ms": 1000}


@given(st.text(max_size=60), st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", ""]))
def test_router_is_total(path: str, method: str) -> None:
    for candidate in (path, f"/{path}", f"/v0/jobs/{path}", f"/v0/artifacts/{path}", f"/v0/jobs/{path}/result"):
        try:
            operation, fields = ROUTER.find(method, candidate)
        except AetherError as error:
            assert error.code in ("NO_SUCH_ROUTE", "METHOD_NOT_ALLOWED", "BAD_ID")
        else:
            assert method in (operation.method, "HEAD")
            assert set(fields) <= {"job_id", "digest", "cell"}


def test_router_finds_every_operation() -> None:
    digest = "sha256:" + "0" * 64
    for operation in OPERATIONS:
        for path in (operation.path, *operation.aliases):
            asked = (
                path.replace("{job_id}", JOB)
                .replace("{digest}", digest)
                .replace("{cell}", "a:b")
                .replace("{image}", "base:1")
                .replace("{link_id}", "0" * 32)
                .replace("{approval_id}", APPROVAL)
            )
            found, fields = ROUTER.find(operation.method, asked)
            assert found is operation
            values = {"job_id": JOB, "digest": digest, "cell": "a/b", "image": "base:1", "link_id": "0" * 32}
            values["approval_id"] = APPROVAL
            assert fields == {name: values[name] for name in fields}
            assert set(fields) == {operation.path_argument} - {None}
            assert operation.method in ROUTER.allowed(asked)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


JSON_VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | st.text(alphabet='[]{}"\\a,:é', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='[{"\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=60,
)


@given(JSON_VALUES, st.integers(0, 40))
def test_depth_is_exact(value: Any, wrap: int) -> None:
    for _ in range(wrap):
        value = [value, {"a": [[], {}]}]
    body = json.dumps(value).encode()
    if _depth(value) > limits.JSON_DEPTH_MAX:
        with pytest.raises(AetherError) as caught:
            decode_json(body, ANY)
        assert caught.value.code == "BAD_JSON"
    else:
        assert decode_json(body, ANY) == value


@given(st.binary(max_size=300))
def test_decode_is_total(body: bytes) -> None:
    try:
        decode_json(body, ANY)
    except AetherError as error:
        assert error.code in ("BAD_JSON", "BAD_FIELD")


@pytest.mark.parametrize(
    "piece", [b'"', b'\\"', b'"\\"', b"[", b"{", b"[]", b'["', b"\\", b'{"a":', b"]"], ids=lambda p: p.decode()
)
def test_decode_is_linear(piece: bytes) -> None:
    body = (b"[" * 40 + b'"' + piece * limits.HTTP_BODY_BYTES_MAX)[: limits.HTTP_BODY_BYTES_MAX]
    started = time.thread_time()
    with pytest.raises(AetherError):
        decode_json(body, ANY)
    assert time.thread_time() - started < 0.25


HEADER_NAMES = st.sampled_from(
    [b"authorization", b"x-request-id", b"traceparent", b"idempotency-key", b"content-type", b"content-length",
     b"content-encoding", b"transfer-encoding", b"x-other"]
)  # fmt: skip


@given(st.lists(st.tuples(HEADER_NAMES, st.binary(max_size=80)), max_size=8))
def test_heads_are_total(headers: list[tuple[bytes, bytes]]) -> None:
    head, _ = read_head(headers)
    assert head.request_id.isascii() and 0 < len(head.request_id) <= 128
    readers = (
        heads.credential, heads.idempotency_key, heads.traceparent, heads.content_length, heads.require_json,
        heads.raw_media_type,
    )  # fmt: skip
    for reader in readers:
        try:
            reader(head)
        except AetherError as error:
            assert 400 <= error.kind.http < 500


def _head(**values: bytes) -> Head:
    return read_head([(name.replace("_", "-").encode(), value) for name, value in values.items()])[0]


def test_doubled_header_is_refused() -> None:
    _, error = read_head([(b"authorization", b"Bearer aetk1_a"), (b"authorization", b"Bearer aetk1_b")])
    assert error is not None and error.code == "BAD_REQUEST"


def test_head_values() -> None:
    assert heads.credential(_head(authorization=b"bearer aetk1_x")) == "aetk1_x"
    assert heads.credential(_head()) is None
    with pytest.raises(AetherError, match="BAD_CREDENTIAL"):
        heads.credential(_head(authorization=b"Bearer eyJhbGciOi"))
    with pytest.raises(AetherError, match="UNAUTHENTICATED"):
        heads.credential(_head(authorization=b"Basic eDp5"))
    good = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert heads.traceparent(_head(traceparent=good)) == good.decode()
    assert heads.traceparent(_head(traceparent=good.replace(b"4bf92f3577b34da6a3ce929d0e0e4736", b"0" * 32))) is None
    assert _head(x_request_id=b"mine-1").request_id == "mine-1"
    assert _head(x_request_id=b"bad id\r\n").request_id.startswith("req_")
    for accepted in (b"application/json", b"application/json; charset=utf-8", b'Application/JSON;charset="UTF-8"'):
        heads.require_json(_head(content_type=accepted))
    for refused in (b"text/json", b"application/json; charset=utf-16", b"", b"application/x-www-form-urlencoded"):
        with pytest.raises(AetherError, match="MEDIA_TYPE"):
            heads.require_json(_head(content_type=refused))
    with pytest.raises(AetherError, match="MEDIA_TYPE"):
        heads.require_json(_head(content_type=b"application/json", content_encoding=b"gzip"))
