"""The escape suite's helper: one probe per way of starting cells, and the listeners that no cell may reach."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import cells

PROBE = Path(__file__).parents[1] / "security" / "escape" / "probe.py"
LIMITS = [["core", 1, 1], ["nproc", 64, 64], ["data", 512 << 20, 512 << 20]]


@dataclass(frozen=True)
class Answers:
    """`inside` is what the probe printed; `user` whether an ordinary user started the cell; `spied` which of the
    host's listeners heard something."""

    inside: dict[str, Any]
    user: bool
    spied: list[str]

    def of(self, group: str) -> Any:
        answer = self.inside[group]
        assert "broken" not in answer, answer
        assert "killed" not in answer, answer
        return answer


class Listeners:
    """Sockets of the host that a cell must not reach."""

    def __init__(self, directory: Path) -> None:
        self.names = {"abstract_stream": secrets.token_hex(8), "abstract_datagram": secrets.token_hex(8)}
        self.paths = {"path_stream": str(directory / "stream"), "path_datagram": str(directory / "datagram")}
        self._sockets: dict[str, socket.socket] = {}
        for name, address in [*((n, "\0" + a) for n, a in self.names.items()), *self.paths.items()]:
            kind = socket.SOCK_STREAM if name.endswith("stream") else socket.SOCK_DGRAM
            self._open(name, socket.AF_UNIX, kind, address)
        for path in self.paths.values():
            Path(path).chmod(0o777)
        self.tcp_port = self._open("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)).getsockname()[1]
        self.udp_port = self._open("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)).getsockname()[1]

    def _open(self, name: str, family: int, kind: int, address: Any) -> socket.socket:
        found = self._sockets[name] = socket.socket(family, kind)
        found.bind(address)
        found.setblocking(False)
        if kind == socket.SOCK_STREAM:
            found.listen()
        return found

    def seen(self) -> list[str]:
        """Names of those that somebody connected or sent to."""
        reached = []
        for name, sock in self._sockets.items():
            with contextlib.suppress(BlockingIOError):
                sock.accept() if sock.type == socket.SOCK_STREAM else sock.recv(1)
                reached.append(name)
        return reached

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def collect(kind: tuple[str, bool], directory: str, planted: Path) -> Answers:
    host = cells.open_host(*kind, directory)
    sockets = planted / secrets.token_hex(4)
    sockets.mkdir()
    sockets.chmod(0o755)
    listeners = Listeners(sockets)
    outsider = subprocess.Popen(["sleep", "120"])
    facts = {
        "outsider": outsider.pid, "secret": str(planted / "secret"), "programs": "/data",
        "tcp_port": listeners.tcp_port, "udp_port": listeners.udp_port, **listeners.names, **listeners.paths,
    }  # fmt: skip
    try:
        result = host.run(
            [cells.PYTHON, "-IS", "-c", PROBE.read_text(), json.dumps(facts)],
            steps=[{"op": "bind_ro", "path": "/data", "source": str(planted / "programs")}],
            roots=[str(planted)],
            rlimits=LIMITS,
        )
        assert outsider.poll() is None, "an outsider was killed"
        return Answers(result.json(), host.user, listeners.seen())
    finally:
        outsider.kill()
        outsider.wait()
        listeners.close()
