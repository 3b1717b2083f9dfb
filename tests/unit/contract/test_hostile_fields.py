"""What clients write into fields: jobs, cells, tickets, budgets, quotas, ids, names, frames. A value, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract import (
    allocations,
    apikeys,
    approvals,
    budgetcalls,
    caveats,
    ids,
    images,
    jobs,
    limits,
    secrets,
    spiffe,
    ticketcalls,
)
from aether.contract.codec import FrameBuffer, encode_frame
from aether.contract.errors import AetherError
from tests.support.hostile import changed_json, changed_text, outcome, refusal

UUID = "01a1fbeb-b57e-70cd-8916-2cadfeb60e92"
DIGEST = "sha256:" + "0" * 64
LIMITS = {
    "memory_bytes": 1 << 28, "memory_min_bytes": 0, "memory_low_bytes": 0, "memory_high_bytes": 1 << 27,
    "swap_bytes": 0, "cpu_millis": 500, "cpu_weight": 100, "cpuset_cpus": "0-3,6", "cpuset_mems": "0", "pids": 64,
    "io_weight": 100, "io_read_bps": 1 << 20, "io_write_bps": 1 << 20, "io_read_iops": 10, "io_write_iops": 10,
    "tmp_bytes": 1 << 20, "nofile": 64, "file_bytes": 1 << 30, "disk_bytes": 1 << 30, "timeout_ms": 1_000,
    "grace_ms": 10, "sched": {"policy": "fifo", "priority": 9, "nice": 0, "io_class": "idle", "io_priority": 7},
}  # fmt: skip
NETWORK = {
    "allow": ["api.example.org:443", "*.example.net:80", "192.0.2.1:8080", "[2001:db8::1]:443"],
    "credentials": [{"name": "api", "source": "env:AETHER_SECRET_A", "host": "api.example.org:443", "header": "x-key"}],
    "limits": {"connections": 4, "idle_ms": 1_000},
}
COMMAND = {
    "argv": ["python3", "-c", "print(1)"], "env": {"A": "1"}, "cwd": "/work/a", "limits": LIMITS,
    "outputs": ["out/*.txt"], "require": ["netns"], "network": NETWORK, "secrets": {"KEY": "file:/run/key"},
    "images": {"root": DIGEST, "writable": True, "keep_diff": True},
}  # fmt: skip
JOB = {
    "kind": "command", "op": "run", "params": COMMAND, "labels": ["local-only", "a.b"],
    "inputs": {"files": [{"path": "in/a", "artifact": DIGEST}]},
}  # fmt: skip
MODEL = {"kind": "model", "op": "predict_next_state", "params": {"model": "m@1", "horizons_s": [1.0, 60.0]}}
CELL = {
    "name": "agent/worker-1", "limits": LIMITS, "labels": ["a"], "require": [], "isolate_network": True,
    "idle_timeout_ms": 60_000, "network": NETWORK, "images": {"root": DIGEST, "work": None},
}  # fmt: skip
NARROWING = {
    "role": "user", "operations": ["job.*"], "kinds": ["command"], "models": ["m@1"], "labels": ["a"],
    "hosts": ["*.example.org:443"], "paths": ["rw:/srv/data"], "cells": ["agent/*"], "budget": {"ops": 3, "cpu_ms": 9},
}  # fmt: skip
FIELD = ("BAD_FIELD", "BAD_ID")
PARSERS: dict[str, tuple[Callable[[str], Any], str, tuple[str, ...]]] = {
    "job id": (lambda text: ids.parse(ids.JOB, text), f"job_{UUID}", ("BAD_ID",)),
    "digest": (ids.parse_digest, DIGEST, ("BAD_ID",)),
    "image": (images.reference, "base:1.0", ("BAD_ID",)),
    "name of an image": (images.check_name, "base:1.0", ("BAD_ID",)),
    "approval": (approvals.approval_id, f"job_{UUID}", ("BAD_ID",)),
    "expiry of an approval": (approvals.parse_expiry, "30m", ("BAD_REQUEST",)),
    "link of a ticket": (ticketcalls.link, "0" * 32, ("BAD_ID",)),
    "id of an API key": (apikeys.check_id, "0" * 16, ("BAD_ID",)),
    "name in a SPIFFE ID": (spiffe.check_name, "team/agent-1", ("BAD_FIELD",)),
    "trust domain": (spiffe.check_trust_domain, "aether.internal", ("BAD_FIELD",)),
    "SPIFFE ID": (spiffe.parse, "spiffe://aether.internal/acme/agent", ("BAD_CREDENTIAL",)),
    "secret reference": (lambda text: secrets.check_source("it", text), "vault:kv/a/b#field", ("BAD_FIELD",)),
    "label": (lambda text: jobs.check_labels((text,)), "local-only", ("BAD_FIELD",)),
    "path": (lambda text: jobs.check_relative_path(text, "file"), "out/a.txt", ("BAD_FIELD",)),
    "requirement": (lambda text: jobs.check_require((text,)), "netns", ("BAD_FIELD",)),
}


@pytest.mark.parametrize("what", PARSERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_is_taken_or_refused(what: str, data: st.DataObject) -> None:
    parse, sample, codes = PARSERS[what]
    parse(sample)
    text = data.draw(changed_text(sample) | st.text(max_size=40))
    value = outcome(lambda: parse(text), *codes)
    if isinstance(value, str):
        assert parse(value) == value, "what was read reads as itself"


def test_the_samples_are_good() -> None:
    """A mutated sample tests little if the sample itself is refused at its first field."""
    jobs.parse_command(msgspec.convert(JOB, jobs.JobRequest))
    jobs.parse_model(msgspec.convert(MODEL, jobs.JobRequest))
    allocations.check_request(msgspec.convert(CELL, allocations.CellRequest))
    assert ticketcalls.caveats_of(msgspec.convert(NARROWING, ticketcalls.Narrowing), 1)


def _convert(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None


@settings(max_examples=250, deadline=None)
@given(changed_json(JOB) | changed_json(MODEL))
def test_any_job_is_parsed_or_refused(value: Any) -> None:
    """Its limits, sched fields, network, images, secrets, environment, input files, outputs and labels."""
    request = _convert(value, jobs.JobRequest)
    if request is None:
        return
    with refusal(*FIELD):
        jobs.check_labels(request.labels)
        if request.kind == "model":
            jobs.parse_model(request)
            return
        params, inputs = jobs.parse_command(request)
        again = jobs.JobRequest(
            kind="command", op="run", params=msgspec.to_builtins(params), inputs=msgspec.to_builtins(inputs)
        )
        assert jobs.parse_command(again) == (params, inputs)


@settings(max_examples=200, deadline=None)
@given(changed_json(CELL))
def test_any_cell_is_allocated_or_refused(value: Any) -> None:
    request = _convert(value, allocations.CellRequest)
    if request is not None:
        with refusal(*FIELD):
            allocations.check_request(request)
            assert "name" not in allocations.specification(request)


@settings(max_examples=200, deadline=None)
@given(changed_json(NARROWING), st.none() | st.integers(0, 1 << 50))
def test_any_narrowing_is_caveats_or_refused(value: Any, expires_at_ms: int | None) -> None:
    said = _convert(value, ticketcalls.Narrowing)
    if said is None:
        return
    with refusal("BAD_FIELD"):
        found = ticketcalls.caveats_of(said, expires_at_ms)
        assert caveats.decode(caveats.encode(found)) == found


@settings(max_examples=150, deadline=None)
@given(
    changed_json({"tenant_id": "acme", "limits": {"ops": 3, "micro_usd": None}}),
    changed_json({"account": "tenant:acme", "amounts": {"ops": 3}}),
    changed_json({"subject": "tenant:acme", "quotas": {"cells": 3}}),
)
def test_any_order_on_budgets_and_quotas_is_taken_or_refused(budget: Any, top_up: Any, quota: Any) -> None:
    checks: tuple[tuple[Any, Any, Callable[[Any], None]], ...] = (
        (budget, budgetcalls.SetBudget, budgetcalls.check_set),
        (top_up, budgetcalls.TopUp, budgetcalls.check_top_up),
        (quota, budgetcalls.SetQuota, budgetcalls.check_quota),
    )
    for value, kind, check in checks:
        order = _convert(value, kind)
        if order is not None:
            with refusal("BAD_FIELD"):
                check(order)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5), st.lists(st.integers(1, 9), max_size=60))
def test_frames_are_cut_as_they_were_joined(values: list[bytes], pieces: list[int]) -> None:
    stream = b"".join(encode_frame(value) for value in values)
    frames, found = FrameBuffer(), []
    for size in pieces:
        found += frames.feed(stream[:size])
        stream = stream[size:]
    found += frames.feed(stream)
    assert [msgspec.msgpack.decode(payload) for payload in found] == values


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_stream_is_cut_into_bounded_frames_or_refused(pieces: list[bytes]) -> None:
    frames = FrameBuffer()
    for piece in pieces:
        try:
            found = frames.feed(piece)
        except AetherError as error:
            assert error.code == "PROTOCOL"
            return
        assert all(len(payload) <= limits.FRAME_BYTES_MAX for payload in found)
