"""A blocking client of cfcd for tests: starts the real process on a socket pair and speaks its frames."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from aether.contract.codec import FrameBuffer, encode_frame
from aether.contract.modelwire import Hello, InferReply, InferRequest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "packages" / "pendulum" / "1.0.0"
PUBLIC_KEY = ROOT / "packages" / "keys" / "aether-samples.pub"


class Client:
    """One connection; `hello` is already read."""

    def __init__(self, link: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.link = link
        self.process = process
        self._frames = FrameBuffer()
        self._payloads: list[bytes] = []
        self._count = 0
        self.hello = msgspec.msgpack.decode(self._payload(), type=Hello)

    def _payload(self) -> bytes:
        while not self._payloads:
            data = self.link.recv(1 << 18)
            if not data:
                raise EOFError("cfcd closed the socket")
            self._payloads += self._frames.feed(data)
        return self._payloads.pop(0)

    def receive(self) -> InferReply:
        return msgspec.msgpack.decode(self._payload(), type=InferReply)

    def request(self, op: Any, params: dict[str, Any], inputs: dict[str, Any], **fields: Any) -> InferRequest:
        self._count += 1
        known = {"request_id": f"r{self._count}", "model_id": "pendulum", "model_version": "1.0.0", "batch_key": "t"}
        return InferRequest(op=op, params={"model": "pendulum", **params}, inputs=inputs, **{**known, **fields})

    def send(self, *requests: InferRequest) -> None:
        self.link.sendall(b"".join(encode_frame(one) for one in requests))

    def call(self, op: Any, params: dict[str, Any], inputs: dict[str, Any], **fields: Any) -> InferReply:
        self.send(self.request(op, params, inputs, **fields))
        return self.receive()


def command(fd: int, package: Path, key: Path) -> list[str]:
    return [sys.executable, "-m", "aether.runtime.cfcd", "--fd", str(fd), "--package", str(package), "--key", str(key)]


@contextmanager
def cfcd(package: Path = PACKAGE, key: Path = PUBLIC_KEY, wrap: Sequence[str] = ()) -> Iterator[Client]:
    """The process runs until the block ends; then it is asked to stop and must have gone within 10 s."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        process = subprocess.Popen(
            [*wrap, *command(theirs.fileno(), package, key)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        try:
            yield Client(ours, process)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
