"""Abuse of a real instance: crowds, malformed bytes, huge bodies, slow clients; the others' work goes on.

The same attacks on the HTTP layer alone, with its own bounds, are in `tests/security/test_http_hostile.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from aether.api.openapi import document
from aether.client import Client
from aether.contract.jobs import TERMINAL, JobState
from aether.contract.limits import MIB
from aether.contract.paths import Layout
from aether.substrate.audit.verify import verify_receipt
from tests.security.test_http_hostile import CORPUS, JSON_HEAD, OK
from tests.support import instance
from tests.unit.api.http_node import read_answer
from tests.unit.api.test_http_contract import SCHEMA, UnixAdapter, says_a_name_twice

GROWTH_BYTES_MAX = 48 * MIB
"""What aetherd may grow by under an attack: its pools fill, and stay."""
ANSWER_S_MAX = 2.0
"""An honest client's short call on a busy machine of two cores."""


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with instance.running() as found:
        yield found


@pytest.fixture
def unharmed(layout: Layout) -> Iterator[None]:
    """Nobody died, nothing was left open, and an honest job works afterwards."""
    before = {role: instance.role_pid(layout, role) for role in ("spawner", "aetherd", "aurorad")}
    yield
    assert {role: instance.role_pid(layout, role) for role in before} == before
    with instance.client(layout) as client:
        job = client.run(["/bin/echo", "still here"])
        assert job.state is JobState.SUCCEEDED and b"".join(client.logs(job.job_id)) == b"still here\n"


def pss_bytes(layout: Layout) -> int:
    """What aetherd holds for itself (proc_pid_smaps(5), Pss)."""
    pid = instance.role_pid(layout, "aetherd")
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except PermissionError:  # its memory is not dumpable, so only root may look
        pytest.skip("the memory of aetherd cannot be looked at by an ordinary user")
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:"))


def connect(layout: Layout, timeout_s: float = 20.0) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    connection.connect(str(layout.api_socket))
    return connection


def crowd(number: int, work: Callable[[int], None]) -> list[BaseException]:
    """Runs `work(0..number-1)` at once; what failed."""
    failures: list[BaseException] = []

    def one(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return failures


class Honest:
    """A client beside an attack: short calls and small jobs, timed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.calls_s: list[float] = []
        self.jobs = 0
        self.failures: list[BaseException] = []

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self.failures and self.jobs > 0
        slowest = statistics.quantiles(self.calls_s, n=20)[-1] if len(self.calls_s) > 20 else max(self.calls_s)
        assert slowest < ANSWER_S_MAX, slowest

    def _work(self) -> None:
        try:
            with Client(state=self._layout.root) as client:
                while not self._stop.is_set() or not self.jobs:
                    started = time.monotonic()
                    assert client.health().status == "ok"
                    self.calls_s.append(time.monotonic() - started)
                    assert client.run(["/bin/true"]).state is JobState.SUCCEEDED
                    self.jobs += 1
        except BaseException as error:
            self.failures.append(error)


def test_a_hundred_clients_at_once_each_get_their_own(layout: Layout, unharmed: None) -> None:
    key = layout.audit_public_key.read_text()
    before = pss_bytes(layout) if os.geteuid() == 0 else 0

    def work(number: int) -> None:
        with Client(state=layout.root, timeout_s=60) as client:
            for turn in range(2):
                job = client.run(["/bin/echo", f"{number}-{turn}"])
                assert job.state is JobState.SUCCEEDED, job.error
                assert b"".join(client.logs(job.job_id)) == f"{number}-{turn}\n".encode()
            assert verify_receipt(client.receipt_bytes(job.job_id), key).ok

    assert crowd(100, work) == []
    assert not before or pss_bytes(layout) - before < GROWTH_BYTES_MAX


def test_malformed_bytes_are_refused_and_nobody_notices(layout: Layout, unharmed: None) -> None:
    rng = random.Random(7)
    pieces = [*CORPUS, OK, b"\r\n\r\n", b"0\r\n\r\n", b"content-length: 5\r\n"]

    def work(number: int) -> None:
        for _ in range(30):
            data = b"".join(rng.choice(pieces)[: rng.randrange(1, 300)] for _ in range(rng.randrange(1, 6)))
            broken = contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError)
            with connect(layout, 0.3) as connection, broken:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(4096)

    with Honest(layout):
        assert crowd(8, work) == []
        for data in CORPUS:
            with connect(layout) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = read_answer(connection)
            status = int(answer.split(b" ")[1]) if answer else 0
            assert status < 500, (data, answer)


def test_bodies_of_100_megabytes_are_refused_in_bounded_memory(layout: Layout, unharmed: None) -> None:
    before = pss_bytes(layout)
    peak = 0
    answers: list[bytes] = []

    def work(number: int) -> None:
        chunked = number % 2 == 1
        piece = (b"10000\r\n" + b"x" * 65536 + b"\r\n") if chunked else b"x" * 65536
        length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (100 * MIB)
        with connect(layout) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(b"POST /v0/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
                connection.sendall(length + b"\r\n\r\n")
                for _ in range(100 * 16):
                    connection.sendall(piece)
            answers.append(read_answer(connection))

    def watch(done: threading.Event) -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, pss_bytes(layout))

    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(done,))
    watcher.start()
    try:
        with Honest(layout):
            assert crowd(16, work) == []
    finally:
        done.set()
        watcher.join()
    assert len(answers) == 16 and all(answer.startswith(b"HTTP/1.1 413") for answer in answers)
    assert peak - before < GROWTH_BYTES_MAX, (before, peak)


def test_slow_clients_hold_nobody_up(layout: Layout, unharmed: None) -> None:
    """300 connections that say little or nothing, read nothing, or hang on a job that they asked for."""
    starts = [b"", b"GET /v0/heal", JSON_HEAD + b"content-length: 50\r\n\r\n{", OK * 40]
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(layout)) for _ in range(300)]
        for number, connection in enumerate(slow):
            connection.sendall(starts[number % len(starts)])
        with Honest(layout) as honest:
            for _ in range(20):
                for connection in slow[1::4]:
                    with contextlib.suppress(OSError):
                        connection.sendall(b"x")
                time.sleep(0.1)
        assert honest.jobs > 5


def test_clients_that_leave_do_not_take_their_jobs_along(layout: Layout, unharmed: None) -> None:
    """A submission whose connection is cut is accepted or not; accepted, it ends like any other."""
    body = json.dumps({"kind": "command", "op": "run", "params": {"argv": ["/bin/true"]}}).encode()
    for number in range(60):
        with connect(layout) as connection:
            connection.sendall(b"POST /v0/jobs?wait=5s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
            connection.sendall(b"content-length: %d\r\n\r\n" % len(body) + body[: len(body) - number % 2])
    with instance.client(layout) as client:
        deadline = time.monotonic() + 30
        while client.list(states=(JobState.QUEUED, JobState.RUNNING)).jobs and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {job.state for job in client.list(limit=60).jobs} <= TERMINAL


def test_the_document_of_the_instance_is_the_one_that_is_tested(layout: Layout) -> None:
    with connect(layout) as connection:
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
        served = read_answer(connection).partition(b"\r\n\r\n")[2]
    assert json.loads(served) == json.loads(json.dumps(document()))


@pytest.fixture(scope="module")
def session(layout: Layout) -> requests.Session:
    found = requests.Session()
    found.mount("http://localhost", UnixAdapter(str(layout.api_socket)))
    return found


@SCHEMA.exclude(operation_id="audit.rotate-key").parametrize()  # the authority begins again under its new key
@settings(
    max_examples=12,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_schemathesis_finds_nothing(case: schemathesis.Case, session: requests.Session) -> None:
    """Some requests are judged by more than a document can say, so that neither what it allows nor what it does not
    tells whether they are taken: a model's inputs (the runtime's to check, after the job was accepted), an image (its
    archive), an upgrade, days and cursors of the log, what the lists of a ticket may hold, what a secret of a cell
    names, the text of a policy and its cases, which witnesses there are."""
    assume(not says_a_name_twice(case.body))
    if case.query:
        case.query.pop("follow", None)  # the log's tail has no end
    judged = ("/jobs", "/tasks", "/images", "/attach", "/audit/records", "/audit/tail", "/audit/export", "/tickets",
              "/cells", "/cosignatures")  # fmt: skip
    path = case.operation.path
    writes = case.operation.method.upper() in ("POST", "PUT") or "/audit/" in path
    excluded = [positive_data_acceptance, negative_data_rejection]
    case.call_and_validate(
        session=session,
        base_url="http://localhost",
        excluded_checks=excluded if writes and (path.endswith(judged) or "/policy/" in path) else [],
    )
