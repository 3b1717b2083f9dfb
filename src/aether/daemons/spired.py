"""Composition root of spired: asks the SPIFFE Workload API for trust bundles and hands them to aetherd as a file.

A role of its own so that gRPC, a large library that parses what another program sends, is in no process that holds
keys: it has a uid of its own and reads no key. aetherd reads nothing of it but `spire/bundles.json`, checks that again,
and looks only for trust domains that the operator named. It runs where SPIFFE_ENDPOINT_SOCKET is set.

A call is a stream that goes on; each message replaces the file, by rename. A call that ends is made again after a
pause. Meanwhile the file stands, as the standard wants it: a SPIRE agent that restarts is no outage, and what it holds
expires by itself. Two things empty it: a message without bundles, and PERMISSION_DENIED, by which the API says that no
identity is issued to this role any more. What is malformed is not used: such a message changes nothing, such a bundle
is left out.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aether.contract.paths import Layout
from aether.contract.spiffe import ENDPOINT_VARIABLE
from aether.daemons import process, workloadapi

RETRY_S: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Follower:
    """Follows the API from a thread of its own: grpcio's calls block."""

    def __init__(self, channel: Any, path: Path, log: Any) -> None:
        self._channel = channel
        self._path = path
        self._log = log
        self._stopped = threading.Event()
        self._tries = 0
        self._said: str | None = None
        self._thread = threading.Thread(target=self._run, name="workload-api", daemon=True)

    def __repr__(self) -> str:
        return f"<Follower {self._path}>"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the call and waits for the thread."""
        self._stopped.set()
        self._channel.close()
        self._thread.join(RETRY_S[-1])

    def _run(self) -> None:
        while not self._stopped.is_set():
            error = workloadapi.follow(lambda: workloadapi.messages(self._channel), self._heard)
            if self._stopped.is_set():
                return
            why, refused = workloadapi.reason(error) if error is not None else ("the stream ended", False)
            if why != self._said:  # once, not at every try
                self._log.warning("the Workload API gives no bundles", reason=why)
                self._said = why
            if refused:
                self._write({})
            self._stopped.wait(RETRY_S[min(self._tries, len(RETRY_S) - 1)])
            self._tries += 1

    def _heard(self, message: bytes) -> None:
        good, bad = workloadapi.read_bundles(message)
        for domain, why in bad.items():
            self._log.error("a trust bundle is left out", trust_domain=domain, reason=why)
        self._log.info("trust bundles", trust_domains=sorted(good))
        self._write(good)
        self._tries, self._said = 0, None

    def _write(self, bundles: Mapping[str, str]) -> None:
        raw = workloadapi.document(bundles)
        temporary = self._path.with_suffix(".tmp")
        try:
            if self._path.exists() and self._path.read_bytes() == raw:
                return
            temporary.write_bytes(raw)
            temporary.chmod(0o640)
            temporary.replace(self._path)
        except OSError as error:
            self._log.error("cannot write the trust bundles", reason=str(error))


async def serve(layout: Layout, log: Any, stop: asyncio.Event) -> None:
    """Runs the role until `stop`; raises AetherError STATE_UNUSABLE."""
    follower = Follower(workloadapi.channel(os.environ.get(ENDPOINT_VARIABLE, "")), layout.trust_bundles, log)
    follower.start()
    try:
        await stop.wait()
    finally:
        follower.stop()


def main() -> None:
    process.run("spired", serve)


if __name__ == "__main__":
    main()
