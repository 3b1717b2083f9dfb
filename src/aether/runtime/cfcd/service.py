"""Requests in, replies out: batches of what has already arrived, and the loop over one socket.

Batching without waiting: everything that the socket holds is drained, grouped by (model, operation, batch key, shape)
and run in groups of at most MODEL_BATCH_MAX; while a group runs, the next one gathers in the socket. A lone request
runs at once, and none ever waits for company, so the promised 2 ms hold by construction.

Invariants:
- two batch keys (tenant and labels) never share a batch;
- every readable request gets exactly one reply, in whatever order the groups finish;
- a request that fails, in parsing or in a batch, leaves nothing behind: its batch mates are run again one by one.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from aether.contract.codec import FrameBuffer, encode_frame
from aether.contract.errors import AetherError
from aether.contract.limits import FRAME_BYTES_MAX, MODEL_BATCH_MAX
from aether.contract.modelwire import Hello, InferReply, InferRequest
from aether.runtime.inference import Inference
from aether.runtime.queries import Query

_RECEIVE_BYTES: Final = FRAME_BYTES_MAX + 4
_DRAIN_BYTES_MAX: Final = 8 * FRAME_BYTES_MAX
_REQUEST: Final = msgspec.msgpack.Decoder(InferRequest)
_JSON: Final = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class _Pending:
    """A parsed request; times are `time.perf_counter_ns`."""

    request: InferRequest
    inference: Inference
    query: Query
    received_ns: int


_Group = tuple[int, str, str, int]


class Service:
    """Turns payloads into reply frames for a fixed set of models; holds no state between calls but counters."""

    def __init__(self, inferences: Sequence[Inference]) -> None:
        self._models = {(one.package.manifest.id, one.package.manifest.version): one for one in inferences}
        self.answered = 0
        self.refused = 0
        self.batches = 0

    def __repr__(self) -> str:
        return f"<Service answered={self.answered} refused={self.refused} batches={self.batches}>"

    def replies(self, payloads: Sequence[bytes], received_ns: int) -> Iterator[bytes]:
        """Reply frames for ``payloads``, each group's as soon as it has run."""
        groups: dict[_Group, list[_Pending]] = {}
        for payload in payloads:
            try:
                request = _REQUEST.decode(payload)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
                yield self._refusal("", AetherError("PROTOCOL", f"cannot read a request: {error}"))
                continue
            try:
                pending = self._parsed(request, received_ns)
            except AetherError as error:
                yield self._refusal(request.request_id, error)
                continue
            shape = Inference.shape_of(pending.query)
            key = (id(pending.inference), request.op, request.batch_key, shape)
            groups.setdefault(key, []).append(pending)
        for group in groups.values():
            for first in range(0, len(group), MODEL_BATCH_MAX):
                yield from self._run(group[first : first + MODEL_BATCH_MAX])

    def _parsed(self, request: InferRequest, received_ns: int) -> _Pending:
        inference = self._models.get((request.model_id, request.model_version))
        if inference is None:
            name = f"{request.model_id}@{request.model_version}"[:140]
            raise AetherError("NO_SUCH_MODEL", f"cannot run model {name!r}: this runtime does not hold it")
        try:
            query = inference.parse(request.op, request.params, request.inputs)
        except RecursionError as error:
            raise AetherError("BAD_FIELD", "cannot read inputs: they are nested too deeply") from error
        return _Pending(request, inference, query, received_ns)

    def _run(self, batch: Sequence[_Pending]) -> Iterator[bytes]:
        started_ns = time.perf_counter_ns()
        in_time = []
        for one in batch:
            if started_ns - one.received_ns > one.request.deadline_ms * 1_000_000:
                late = AetherError("TIMED_OUT", "cannot run the model request: its deadline passed in the queue")
                yield self._refusal(one.request.request_id, late)
            else:
                in_time.append(one)
        if not in_time:
            return
        try:
            results = in_time[0].inference.run([one.query for one in in_time])
        # ONNX Runtime raises unrelated types; whatever a parsed input can still do ends with that request
        except Exception as error:
            if len(in_time) > 1:
                for one in in_time:
                    yield from self._run([one])
            else:
                why = AetherError("INTERNAL", f"cannot run the model request: {type(error).__name__}")
                yield self._refusal(in_time[0].request.request_id, why)
            return
        infer_us = (time.perf_counter_ns() - started_ns) // 1000
        self.batches += 1
        for one, result in zip(in_time, results, strict=True):
            self.answered += 1
            yield _framed(
                InferReply(
                    request_id=one.request.request_id,
                    ok=True,
                    result=_JSON.encode(result),
                    error=None,
                    batch_size=len(in_time),
                    infer_us=infer_us,
                    queue_us=(started_ns - one.received_ns) // 1000,
                )
            )

    def _refusal(self, request_id: str, error: AetherError) -> bytes:
        self.refused += 1
        return _framed(_refused(request_id, error))


def _refused(request_id: str, error: AetherError) -> InferReply:
    return InferReply(
        request_id=request_id, ok=False, result=None, error=error.body(), batch_size=1, infer_us=0, queue_us=0
    )


def _framed(reply: InferReply) -> bytes:
    try:
        return encode_frame(reply)
    except AetherError as error:
        return encode_frame(_refused(reply.request_id, error))


def serve(link: socket.socket, wake_fd: int, hello: Hello, service: Service) -> None:
    """Answers until EOF, or until ``wake_fd`` says that a signal came and what the socket held is answered.

    Raises AetherError PROTOCOL for an oversized frame: the stream has no boundary to resume at.
    """
    frames = FrameBuffer()
    link.setblocking(True)
    poller = select.poll()
    poller.register(link, select.POLLIN)
    poller.register(wake_fd, select.POLLIN)
    try:
        link.sendall(encode_frame(hello))
        while True:
            stopping = any(fd == wake_fd for fd, _ in poller.poll())
            ended = _exchange(link, frames, service)
            if stopping or ended:
                return
    # the peer went away in the middle of an answer: nobody is left to serve
    except (BrokenPipeError, ConnectionResetError):
        return


def _exchange(link: socket.socket, frames: FrameBuffer, service: Service) -> bool:
    """Drains the socket, answers what is complete; true after EOF."""
    payloads: list[bytes] = []
    drained, ended = 0, False
    while drained < _DRAIN_BYTES_MAX:
        try:
            data = link.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        if not data:
            ended = True
            break
        drained += len(data)
        payloads += frames.feed(data)
        # a stream socket hands over all that it holds up to the buffer's size
        if len(data) < _RECEIVE_BYTES:
            break
    if payloads:
        for frame in service.replies(payloads, time.perf_counter_ns()):
            link.sendall(frame)
    return ended
