"""`Client`: every operation of the table as a typed, synchronous method.

    with Client() as client:
        job = client.run(["python3", "main.py"], files={"main.py": "main.py"}, outputs=["out.csv"])
        data = client.artifact_bytes(job.artifacts[0].digest)

The socket is that of the instance's state directory: `$AETHER_STATE`, else /var/lib/aether/aurora for root and
~/.local/state/aether for others; the ticket is `$AETHER_TICKET` unless given. A submission carries an
Idempotency-Key of its own, so it is repeated safely when the connection breaks. All methods raise AetherError.
"""

from __future__ import annotations

import hashlib
import io
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from aether.api.operations import BY_NAME
from aether.client.approvals import Approvals, approval_query
from aether.client.audit import Audit
from aether.client.bodies import opened
from aether.client.budgets import Budgets
from aether.client.cells import Cells, Session
from aether.client.identity import Identity, Keys, Pki
from aether.client.inputs import gather
from aether.client.policy import PolicyClient
from aether.client.tickets import Tickets
from aether.client.transport import Call, Transport
from aether.client.upgrade import open_stream
from aether.contract import calls, ids, limits, wire
from aether.contract.activity import ActivityEvent, Trace
from aether.contract.cellcalls import STREAM_PROTOCOL
from aether.contract.cellnames import in_path
from aether.contract.cells import Images, InputFile, Interpreter, Limits
from aether.contract.egresswire import EgressPage
from aether.contract.errors import AetherError
from aether.contract.images import LISTING_TYPE, CellDiffReply, CommitCall, DiffListing, ImageInfo, ImageList
from aether.contract.jobs import TERMINAL, CommandInputs, CommandParams, JobRequest, JobState, JobView
from aether.contract.network import Network
from aether.contract.paths import Layout, state_dir
from aether.contract.records import Receipt

T = TypeVar("T")
TIMEOUT_S_DEFAULT: Final = 30.0
WAIT_S_STEP: Final = 20.0
"""One long poll; `wait` repeats it, so a restart of the node in between is survived."""
CHUNK_BYTES: Final = 256 * limits.KIB


class Submission(JobView, frozen=True, kw_only=True):
    """The answer to `job.submit`; `result` is null unless the job is terminal and its result is small."""

    result: Any = None


class Client:
    """Talks to one instance. May be used from several threads. `close` (or `with`) frees its connections.

    `idempotency_key` goes with every call that changes something; the second call of an operation gets it with `#2`,
    and so on: a program that does the same again under the same key does it once.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        *,
        state: str | os.PathLike[str] | None = None,
        ticket: str | None = None,
        identity: Identity | str | os.PathLike[str] | None = None,
        idempotency_key: str | None = None,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`ticket` is a ticket, an API key or a token; `identity` the directory of a certificate, which is shown on the
        second socket. Raises AetherError BAD_CREDENTIAL."""
        env = os.environ if environment is None else environment
        shown = Identity.chosen(identity, env)
        self.state = Path(state).absolute() if state is not None else state_dir(env, os.geteuid(), Path.home())
        named = Layout(self.state).tls_socket if shown is not None else Layout(self.state).api_socket
        path = Path(socket_path) if socket_path is not None else named
        self._ticket = ticket if ticket is not None else env.get("AETHER_TICKET") or None
        self._key, self._keyed = idempotency_key, Counter[str]()
        self._transport = Transport(path, timeout_s, secured=shown.context() if shown is not None else None)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({str(self._transport.socket_path)!r})"

    def close(self) -> None:
        """Closes the kept connections; the client stays usable."""
        self._transport.close()

    def reachable(self) -> bool:
        """Whether an instance listens."""
        return self._transport.reachable()

    # ---- jobs

    def submit(
        self,
        request: JobRequest,
        *,
        wait_s: float = 0.0,
        idempotency_key: str | None = None,
        approval_ms: int | None = None,
    ) -> Submission:
        """Submits a job; with `wait_s` answers when it is terminal or the time is over. `approval_ms` is how long it
        may wait for an approval, if the policy demands one."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or ids.new(ids.REQUEST)}
        body = msgspec.json.encode(request)
        query = [*_wait(wait_s), *approval_query(approval_ms)]
        return self._json("job.submit", Submission, query=query, body=body, headers=headers, extra_s=wait_s)

    def run(
        self,
        argv: Sequence[str],
        *,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        directory: str | os.PathLike[str] | None = None,
        outputs: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: str = "/work",
        limits: Limits | None = None,
        require: Sequence[str] = (),
        labels: Sequence[str] = (),
        python: Interpreter | None = None,
        network: Network | None = None,
        secrets: Mapping[str, str] | None = None,
        images: Images | None = None,
        approval_ms: int | None = None,
        wait: bool = True,
    ) -> JobView:
        """Runs a command in a cell. `files` maps paths in the work directory to files here; `directory` is
        copied into it whole; with `python` the command is a script, `-c CODE` or `-m MODULE`. Returns the terminal
        job, or with `wait=False` the accepted one."""
        inputs = CommandInputs(files=tuple(self.upload(files or {}, directory)))
        params = CommandParams(
            argv=tuple(argv),
            env=dict(env or {}),
            cwd=cwd,
            limits=limits or Limits(),
            outputs=tuple(outputs),
            require=tuple(require),
            python=python,
            network=network,
            secrets=dict(secrets or {}),
            images=images,
        )
        request = JobRequest(
            kind="command",
            op="run",
            params=msgspec.to_builtins(params),
            inputs=msgspec.to_builtins(inputs),
            labels=tuple(labels),
        )
        job = self.submit(request, approval_ms=approval_ms)
        return self.wait(job.job_id) if wait else job

    def upload(
        self, files: Mapping[str, str | os.PathLike[str]], directory: str | os.PathLike[str] | None = None
    ) -> Iterator[InputFile]:
        """Uploads files and names them as a job's inputs."""
        for local in gather(files, directory):
            info = self.artifact_put(local.source)
            yield InputFile(path=local.path, artifact=info.digest, executable=local.executable)

    def predict(self, model: str, history: Mapping[str, Any], horizons_s: Sequence[float], *, action: Any) -> Any:
        """`predict_next_state`: the state at each horizon (s) after the last observation of `history`
        {obs[n], action[n-1], t[n] or dt[n-1]}, while `action` is held."""
        inputs = {"history": dict(history), "action": action}
        return self.infer("predict_next_state", model, inputs, horizons_s=horizons_s)

    def score(self, model: str, inputs: Mapping[str, Any]) -> Any:
        """`score_sequence` over `{obs[n], action[n-1], t[n] or dt[n-1]}`."""
        return self.infer("score_sequence", model, inputs)

    def encode(self, model: str, inputs: Mapping[str, Any]) -> Any:
        """`encode_state` of `{obs}`."""
        return self.infer("encode_state", model, inputs)

    def infer(
        self, op: str, model: str, inputs: Mapping[str, Any], *, horizons_s: Sequence[float] | None = None
    ) -> Any:
        """Runs a model job and returns its result; raises the job's error when it failed."""
        params: dict[str, Any] = {"model": model}
        if horizons_s is not None:
            params["horizons_s"] = list(horizons_s)
        request = JobRequest(kind="model", op=op, params=params, inputs=dict(inputs))
        submitted = self.submit(request, wait_s=WAIT_S_STEP)
        job: JobView = submitted
        if job.state not in TERMINAL:
            job = self.wait(job.job_id)
        if job.state is not JobState.SUCCEEDED:
            raise job_error(job)
        if submitted.result is not None:
            return submitted.result
        return self.result(job.job_id)

    def get(self, job_id: str, *, wait_s: float = 0.0) -> JobView:
        """The job as it stands; with `wait_s` when it is terminal or the time is over."""
        return self._json("job.get", JobView, job_id, query=_wait(wait_s), extra_s=wait_s)

    def wait(self, job_id: str, timeout_s: float | None = None) -> JobView:
        """The terminal job; after `timeout_s` the job as it stands."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = WAIT_S_STEP if deadline is None else min(WAIT_S_STEP, deadline - time.monotonic())
            job = self.get(job_id, wait_s=max(left_s, 0.0))
            if job.state in TERMINAL or left_s <= 0:
                return job

    def list(
        self, *, states: Iterable[JobState] = (), cursor: str | None = None, limit: int = limits.PAGE_ITEMS_DEFAULT
    ) -> wire.JobPage:
        """One page, newest first."""
        query = [*(("state", JobState(state).value) for state in states), ("limit", str(limit)), ("cursor", cursor)]
        return self._json("job.list", wire.JobPage, query=query)

    def result(self, job_id: str, *, wait_s: float = 0.0) -> Any:
        """The result of a succeeded job, decoded."""
        return msgspec.json.decode(self.result_bytes(job_id, wait_s=wait_s))

    def result_bytes(self, job_id: str, *, wait_s: float = 0.0) -> bytes:
        """The result's JSON text."""
        return self._send(self._call("job.result", job_id, query=_wait(wait_s), extra_s=wait_s))

    def logs(self, job_id: str, *, stream: str = "all", follow: bool = False, cursor: int = 0) -> Iterator[bytes]:
        """What the executable wrote, chunk by chunk as it comes; with `follow` until it ends."""
        query = [("stream", stream), ("cursor", str(cursor)), ("follow", "1" if follow else "0")]
        # A followed job may be silent as long as it runs.
        call = self._call("job.logs", job_id, query=query, extra_s=float(limits.TIMEOUT_MS_MAX) if follow else 0.0)
        with self._transport.open(call) as response:
            while chunk := _read1(response):
                yield chunk

    def egress(self, job_id: str, *, cursor: int = 0, limit: int = limits.PAGE_ITEMS_DEFAULT) -> EgressPage:
        """What the job reached or tried to reach, newest first; `cursor` is the previous page's `next_cursor`."""
        query = [("cursor", str(cursor)), ("limit", str(limit))]
        return self._json("job.egress", EgressPage, job_id, query=query)

    def activity(self, job_id: str, *, follow: bool = False, cursor: int = 0) -> Iterator[tuple[ActivityEvent, int]]:
        """What the processes of the job's cell did, and the cursor behind each event; with `follow` until it ends."""
        return self.activity_of("job.activity", job_id, follow, cursor)

    def trace(self, job_id: str, *, duration_ms: int = limits.TRACE_MS_DEFAULT) -> Trace:
        """Counts the system calls of the job's cell; returns when that is over."""
        return self.trace_of("job.trace", job_id, duration_ms)

    def activity_of(self, name: str, of: str, follow: bool, cursor: int) -> Iterator[tuple[ActivityEvent, int]]:
        """The events that an operation streams, each with the cursor behind it."""
        query = [("cursor", str(cursor)), ("follow", "1" if follow else "0")]
        call = self._call(name, of, query=query, extra_s=float(limits.TIMEOUT_MS_MAX) if follow else 0.0)
        with self._transport.open(call) as response:
            rest = b""
            while chunk := _read1(response):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    event = _decoded(name, line, ActivityEvent)
                    cursor = event.count or 0 if event.kind == "gap" else cursor + len(line) + 1
                    yield event, cursor

    def trace_of(self, name: str, of: str, duration_ms: int) -> Trace:
        """The answer of an operation that traces."""
        body = msgspec.json.encode({"duration_ms": duration_ms})
        headers = {"Content-Type": "application/json"}
        return self._json(name, Trace, of, body=body, headers=headers, extra_s=duration_ms / 1000)

    def stop(self, job_id: str, *, grace_ms: int = limits.STOP_GRACE_MS_DEFAULT) -> JobView:
        """Stops a job; a terminal one stays as it is."""
        body = msgspec.json.encode({"grace_ms": grace_ms})
        headers = {"Content-Type": "application/json"}
        return self._json("job.stop", JobView, job_id, body=body, headers=headers, extra_s=grace_ms / 1000)

    def replay(self, job_id: str, *, allow_effects: bool = False, approval_ms: int | None = None) -> JobView:
        """Runs a finished job's input once more; the new job, accepted. `client.compare.compare` tells what differs.
        Raises NOT_REPEATABLE, GONE."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": ids.new(ids.REQUEST)}
        body, query = msgspec.json.encode({"allow_effects": allow_effects}), approval_query(approval_ms)
        return self._json("job.replay", Submission, job_id, query=query, body=body, headers=headers)

    def receipt(self, job_id: str, *, wait_s: float = 0.0) -> Receipt:
        """The job's receipt."""
        return self._json("job.receipt", Receipt, job_id, query=_wait(wait_s), extra_s=wait_s)

    def receipt_bytes(self, job_id: str, *, wait_s: float = 0.0) -> bytes:
        """The receipt's JSON text as the authority gave it, to be kept and verified offline."""
        return self._send(self._call("job.receipt", job_id, query=_wait(wait_s), extra_s=wait_s))

    def story(self, job_id: str) -> wire.Story:
        """What happened to the job, step by step."""
        return self._json("job.story", wire.Story, job_id)

    def signal(self, job_id: str, signal: int) -> JobView:
        """Sends a signal to a running command and its process group."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": ids.new(ids.REQUEST)}
        return self._json("job.signal", JobView, job_id, body=msgspec.json.encode({"signal": signal}), headers=headers)

    def window(self, job_id: str, rows: int, columns: int) -> JobView:
        """Tells an executable the size of its terminal."""
        body = msgspec.json.encode({"rows": rows, "columns": columns})
        return self._json("job.window", JobView, job_id, body=body, headers={"Content-Type": "application/json"})

    def attach(self, job_id: str) -> socket.socket:
        """A connection to the terminal or the standard input of an executable: raw bytes, the caller's to close."""
        call = self._call("job.attach", job_id, extra_s=WAIT_S_STEP)
        connection = self._transport.connection(call.timeout_s or TIMEOUT_S_DEFAULT)
        return open_stream(connection, call, STREAM_PROTOCOL)

    # ---- allocated cells

    @property
    def cells(self) -> Cells:
        """The operations on allocated cells."""
        return Cells(self)

    def cell(self, name: str, **fields: Any) -> Session:
        """A session in the cell of that name: the one that is there, or a new one. With `fields` (those of
        `Cells.allocate`) always a new one; raises NAME_TAKEN."""
        return Session(self, self.cells, name, fields)

    @property
    def keys(self) -> Keys:
        """The operations on API keys."""
        return Keys(self)

    @property
    def pki(self) -> Pki:
        """The operations on certificates."""
        return Pki(self)

    @property
    def tickets(self) -> Tickets:
        """The operations on tickets."""
        return Tickets(self)

    @property
    def policy(self) -> PolicyClient:
        """The policy: its versions, its decisions, and another one in its place."""
        return PolicyClient(self)

    @property
    def approvals(self) -> Approvals:
        """What waits for somebody's leave."""
        return Approvals(self)

    @property
    def budgets(self) -> Budgets:
        """The operations on budgets, usage and quotas."""
        return Budgets(self)

    @property
    def audit(self) -> Audit:
        """The operations that read the audit log."""
        return Audit(self)

    def lines(self, name: str, query: Sequence[tuple[str, str]], follow: bool) -> Iterator[bytes]:
        """Any operation that answers lines, without their newlines; one that was cut off is left out."""
        call = self._call(name, query=query, extra_s=float(limits.TIMEOUT_MS_MAX) if follow else 0.0)
        with self._transport.open(call) as response:
            rest = b""
            while chunk := _read1(response):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines

    def call_json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T:
        """Any operation that answers JSON."""
        return self._json(name, reply, argument, **rest)

    def copy(self, name: str, argument: str, query: Sequence[tuple[str, str]], out: BinaryIO) -> int:
        """Any operation that answers bytes, written to `out`; returns how many."""
        size = 0
        with self._transport.open(self._call(name, argument, query=query)) as response:
            while chunk := _read1(response):
                size += len(chunk)
                out.write(chunk)
        return size

    def upload_to(self, name: str, reply: type[T], argument: str, query: Sequence[tuple[str, str]], source: Any) -> T:
        """Any operation that takes bytes: of a path, a seekable binary file, or as they are."""
        with opened(source) as (body, size):
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            return self._json(name, reply, argument, query=query, body=body, headers=headers)

    # ---- artifacts

    def artifact_put(
        self,
        source: str | os.PathLike[str] | bytes | BinaryIO,
        *,
        media_type: str = "application/octet-stream",
        labels: Sequence[str] = (),
    ) -> wire.ArtifactInfo:
        """Uploads a file (path or seekable binary file) or bytes; `labels` go where it goes from now on."""
        with opened(source) as (body, size):
            headers = {"Content-Type": media_type, "Content-Length": str(size)}
            query = [("label", label) for label in labels]
            return self._json("artifact.put", wire.ArtifactInfo, query=query, body=body, headers=headers)

    def artifact_get(self, digest: str, out: BinaryIO) -> int:
        """Writes an artifact to `out` as it comes; returns its size. Raises VERIFY_FAILED when its bytes do not
        have the digest: discard what was written then."""
        hashed, size = hashlib.sha256(), 0
        with self._transport.open(self._call("artifact.get", digest)) as response:
            while chunk := _read1(response):
                hashed.update(chunk)
                size += len(chunk)
                out.write(chunk)
        found = f"sha256:{hashed.hexdigest()}"
        if found != digest:
            raise AetherError("VERIFY_FAILED", f"cannot accept artifact {digest}: its bytes have {found}")
        return size

    def artifact_bytes(self, digest: str) -> bytes:
        """A small artifact as bytes, verified."""
        out = io.BytesIO()
        self.artifact_get(digest, out)
        return out.getvalue()

    def artifact_list(
        self, *, job_id: str | None = None, cursor: str | None = None, limit: int = limits.PAGE_ITEMS_DEFAULT
    ) -> wire.ArtifactPage:
        """One page of the tenant's artifacts, or of one job's."""
        query = [("limit", str(limit)), ("cursor", cursor), ("job", job_id)]
        return self._json("artifact.list", wire.ArtifactPage, query=query)

    # ---- images

    def image_import(self, source: str | os.PathLike[str], *, name: str | None = None) -> ImageInfo:
        """Sends an OCI layout (its tar, or its directory) or any directory, and has it unpacked."""
        from aether.client.imagefile import opened_image

        with opened_image(source) as archive, opened(archive) as (body, size):
            headers = {"Content-Type": "application/x-tar", "Content-Length": str(size)}
            query = [("name", name)]
            extra_s = float(limits.IMAGE_UNPACK_S_MAX)
            return self._json("image.import", ImageInfo, query=query, body=body, headers=headers, extra_s=extra_s)

    def images(self) -> ImageList:
        """The tenant's images, newest first."""
        return self._json("image.list", ImageList)

    def image_show(self, image: str) -> ImageInfo:
        """An image by name or digest."""
        return self._json("image.show", ImageInfo, image)

    def image_remove(self, image: str) -> ImageInfo:
        """Takes a name away, or by digest the image with all its names."""
        return self._json("image.remove", ImageInfo, image)

    def _cell_diff(self, cell: str) -> CellDiffReply:
        return self._json("cell.diff", CellDiffReply, in_path(cell), extra_s=float(limits.IMAGE_UNPACK_S_MAX))

    def image_diff(self, of: str) -> DiffListing:
        """What a job that kept its diff changed in its image, or a cell so far; raises NO_LAYER for any other."""
        if not of.startswith("job_"):
            return msgspec.json.decode(self.artifact_bytes(self._cell_diff(of).listing), type=DiffListing)
        job_id = of
        for ref in self.get(job_id).artifacts:
            if ref.media_type == LISTING_TYPE:
                return msgspec.json.decode(self.artifact_bytes(ref.digest), type=DiffListing)
        raise AetherError("NO_LAYER", f"cannot tell what {job_id} changed: it kept no diff", "run it with --keep-diff")

    def image_commit(self, of: str, *, name: str | None = None) -> ImageInfo:
        """A new image: what a job, or a cell so far, changed on top of the image that it ran in."""
        headers = {"Content-Type": "application/json"}
        call = CommitCall(job_id=of, name=name)
        if not of.startswith("job_"):
            found = self._cell_diff(of)
            call = CommitCall(base=found.base, layer=found.layer, name=name)
        body, extra_s = msgspec.json.encode(call), float(limits.IMAGE_UNPACK_S_MAX)
        return self._json("image.commit", ImageInfo, body=body, headers=headers, extra_s=extra_s)

    # ---- the node

    def health(self) -> calls.Health:
        """Versions and the state of every role."""
        return self._json("health", calls.Health)

    def metrics(self) -> str:
        """Prometheus text."""
        return self._send(self._call("metrics")).decode()

    def models(self) -> wire.ModelList:
        """The installed models."""
        return self._json("model.list", wire.ModelList)

    def checkpoint(self) -> str:
        """The signed checkpoint of the audit log."""
        return self._send(self._call("audit.checkpoint")).decode()

    def explain(self, params: CommandParams) -> calls.Explanation:
        """The plan that a command would get."""
        body = msgspec.json.encode(calls.ExplainCall(params=params))
        headers = {"Content-Type": "application/json"}
        return self._json("cell.explain", calls.Explanation, body=body, headers=headers)

    def doctor(self) -> calls.Doctor:
        """What the machine can enforce."""
        return self._json("node.doctor", calls.Doctor)

    # ---- inside

    def _json(self, name: str, reply: type[T], argument: str | None = None, **rest: Any) -> T:
        return _decoded(name, self._send(self._call(name, argument, **rest)), reply)

    def _send(self, call: Call) -> bytes:
        return self._transport.send(call)

    def _call(
        self,
        operation_name: str,
        argument: str | None = None,
        *,
        query: Sequence[tuple[str, str | None]] = (),
        body: bytes | BinaryIO | None = None,
        headers: Mapping[str, str] | None = None,
        extra_s: float = 0.0,
    ) -> Call:
        operation = BY_NAME[operation_name]
        target = operation.path
        if operation.path_argument is not None:
            target = target.replace("{" + operation.path_argument + "}", quote(argument or "", safe=":"))
        asked = [(name, text) for name, text in query if text]
        if asked:
            target += "?" + urlencode(asked)
        sent = {"Accept-Encoding": "identity", "X-Request-Id": ids.new(ids.REQUEST), **(headers or {})}
        if self._ticket:
            sent["Authorization"] = f"Bearer {self._ticket}"
        if self._key is not None and operation.keyed:
            self._keyed[operation_name] += 1
            count = self._keyed[operation_name]
            sent["Idempotency-Key"] = self._key if count == 1 else f"{self._key}#{count}"
        repeatable = operation.idempotent or "Idempotency-Key" in sent
        return Call(operation.method, target, sent, body, repeatable, self._transport.timeout_s + extra_s)


def job_error(job: JobView) -> AetherError:
    """The error that a job ended with."""
    if job.error is not None:
        return AetherError.of(job.error)
    return AetherError("JOB_FAILED", f"cannot use the result of {job.job_id}: it is {job.state.value}")


def _decoded(name: str, body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AetherError("PROTOCOL", f"cannot read the answer to {name}: {error}") from error


def _wait(wait_s: float) -> Sequence[tuple[str, str]]:
    return [("wait", f"{int(wait_s * 1000)}ms")] if wait_s > 0 else []


def _read1(response: HTTPResponse) -> bytes:
    try:
        chunk = response.read1(CHUNK_BYTES)
    except (OSError, ValueError, HTTPException) as error:
        raise AetherError("PROTOCOL", f"cannot read on: the connection ended early ({error})") from error
    if not chunk:
        # `read1` does not tell a short answer from a whole one; `read` does (IncompleteRead).
        _finish(response)
    return chunk


def _finish(response: HTTPResponse) -> None:
    try:
        rest = response.read()
    except (OSError, HTTPException) as error:
        raise AetherError("PROTOCOL", f"cannot read on: the connection ended early ({error})") from error
    if rest:
        raise AetherError("PROTOCOL", "cannot read on: the connection ended early")
