"""The spawner's requests: strict, total, and idempotency where it is promised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.spawner.protocol import KEYED, OPERATIONS, RefusedError, parse_request

GOOD: dict[str, dict[str, Any]] = {
    "hello": {"protocol_version": 1},
    "probe": {},
    "cell.bundle": {"plan": {}},
    "blueprint.keep": {"plan": {}, "limits": {"memory_bytes": 1 << 26}},
    "cell.create": {"plan": {}, "limits": {"memory_bytes": 1 << 26}, "work": True},
    "exec.start": {"cell": "cell_1", "exec": {"spec": {}, "stdio": ["null", "log", "log"]}},
    "exec.signal": {"cell": "c", "exec": "e", "signo": 15},
    "cell.listen": {"cell": "c"},
    "cell.stop": {"cell": "c"},
    "cell.kill": {"cell": "c"},
    "cell.freeze": {"cell": "c", "frozen": True},
    "cell.limit": {"cell": "c", "limits": {"pids": 5}},
    "cell.usage": {"cell": "c"},
    "cell.trace": {"cell": "c", "on": True},
    "cell.list": {},
    "cell.free": {"cell": "c"},
    "exit.ack": {"cell": "c", "exec": "e"},
    "work.prepare": {"cell": "c", "owner": {"uid": 1, "gid": 1, "uid_first": 1, "uid_count": 1}, "files": []},
    "work.collect": {"cell": "c", "globs": ["*"]},
    "work.diff": {"cell": "c"},
    "work.open": {"cell": "c", "path": "a"},
    "work.put": {"cell": "c", "path": "a", "mode": 0o644},
    "work.list": {"cell": "c", "path": ""},
    "exec.stop": {"cell": "c", "exec": "e", "grace_ms": 100},
    "exec.terminal": {"cell": "c", "exec": "e"},
    "exec.window": {"cell": "c", "exec": "e", "rows": 24, "columns": 80},
}


def request(op: str, args: Any, **more: Any) -> bytes:
    return json.dumps({"id": 7, "op": op, "key": "k", "args": args} | more).encode()


def test_every_operation_has_a_good_request() -> None:
    assert set(GOOD) == set(OPERATIONS)
    for op, args in GOOD.items():
        parsed = parse_request(request(op, args))
        assert (parsed.id, parsed.op, parsed.key) == (7, op, "k")


@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_unknown_fields_and_missing_ones_are_refused(op: str) -> None:
    with pytest.raises(RefusedError, match="unknown field") as refused:
        parse_request(request(op, GOOD[op] | {"surprise": 1}))
    assert refused.value.request_id == 7 and refused.value.code == "PROTOCOL"
    for name in ("cell", "plan", "protocol_version"):
        if name in GOOD[op] and op != "cell.create":  # it takes a plan or a blueprint
            with pytest.raises(RefusedError, match="missing"):
                parse_request(request(op, {k: v for k, v in GOOD[op].items() if k != name}))


def test_keys_are_required_where_something_starts() -> None:
    assert {"cell.create", "exec.start"} == KEYED
    for op in KEYED:
        with pytest.raises(RefusedError, match="key"):
            parse_request(json.dumps({"id": 1, "op": op, "args": GOOD[op]}).encode())


@pytest.mark.parametrize("cell", ["../x", "", ".", "a/b", "a\0", "x" * 65, 5, None, ".hidden"])
def test_cell_ids_are_names(cell: Any) -> None:
    with pytest.raises(RefusedError):
        parse_request(request("cell.kill", {"cell": cell}))


def test_no_operation_outside_the_list() -> None:
    for op in ("cell.exec", "", None, 5, "__class__"):
        with pytest.raises(RefusedError, match="operation"):
            parse_request(request(op, {}))  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(RefusedError):
        parse_request(data)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(OPERATIONS)), st.data())
def test_any_fields_are_read_or_refused(op: str, data: st.DataObject) -> None:
    names = [*GOOD[op], "x"]
    args = dict(GOOD[op]) | data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=3))
    try:
        assert parse_request(request(op, args)).op == op
    except RefusedError as refused:
        assert refused.code == "PROTOCOL"


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RefusedError):
        parse_request(b'{"id":1,"op":"probe","args":' + b"[" * 100_000)
