"""A witness on disk, and its HTTP: the effects around `witness`.

```
<directory>/
  lock                    held (flock) while the witness runs
  witness.key             PRIVATE+KEY+<name>+<id>+<base64(0x04 || seed)>, made at the first start, mode 0600
  witness.pub             its verifier key, for those who count on it
  logs/<sha256 of origin> the last checkpoint signed, as the log's signed note; replaced by rename, durable before the
                          cosignature leaves
  conflicts/<sha256>      signed checkpoints of one size and another root: proof that the log's key signed a fork
```

The keys of logs are given at start; a kept checkpoint whose log is not among them stays where it is. HTTP/1.1 on a Unix
socket or a loopback address: `POST /add-checkpoint`, one request at a time, bodies within REQUEST_BYTES_MAX.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Final

from aether.contract.errors import AetherError
from aether.substrate.audit.cosign import ALGORITHM, Cosigner
from aether.substrate.audit.files import fsync_dir, write_file
from aether.substrate.audit.note import Checkpoint, NoteError, Verifier, open_checkpoint
from aether.substrate.audit.witness import REQUEST_BYTES_MAX, Answer, add_checkpoint, parse_request

PATH: Final = "/add-checkpoint"
IDLE_S: Final = 15.0
_PREFIX: Final = "PRIVATE+KEY+"


class Witness:
    """One witness. `answer` may be called from several threads; `now_s` is the wall clock in seconds."""

    def __init__(self, directory: Path, name: str, logs: Sequence[Verifier], now_s: Callable[[], int]) -> None:
        """Opens or makes the witness in `directory`. Raises AetherError ALREADY_RUNNING, STATE_UNUSABLE."""
        self._directory = directory
        self._now_s = now_s
        self._turn = threading.Lock()
        try:
            for path in (directory, directory / "logs", directory / "conflicts"):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _take_lock(directory / "lock")
            try:
                self.cosigner = _open_key(directory, name)
                self._logs = {verifier.name: verifier for verifier in logs}
                self.seen = {origin: last for origin in self._logs if (last := self._last(origin)) is not None}
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise AetherError(
                "STATE_UNUSABLE", f"cannot open the witness in {directory}: {error.strerror}", "check owner and mode"
            ) from error

    def close(self) -> None:
        os.close(self._lock)

    def answer(self, body: bytes) -> Answer:
        """What an `add-checkpoint` request gets; a new checkpoint is durable when this returns."""
        with self._turn:
            answer = add_checkpoint(body, self._logs, self.seen, self.cosigner, self._now_s())
            if answer.keep is not None:
                self._store("logs", answer.keep.origin, parse_request(body).note)
                self.seen[answer.keep.origin] = answer.keep
            elif answer.status == 409:
                self._keep_conflict(body)
            return answer

    def _last(self, origin: str) -> Checkpoint | None:
        path = self._directory / "logs" / _file_name(origin)
        try:
            return open_checkpoint(path.read_text(encoding="utf-8"), self._logs[origin])
        except FileNotFoundError:
            return None
        except (NoteError, UnicodeDecodeError) as error:
            why = f"cannot use the last checkpoint of {origin} in {path}: {error}"
            raise AetherError(
                "STATE_UNUSABLE", why, "give the log's own key, or restore the file from a copy"
            ) from error

    def _keep_conflict(self, body: bytes) -> None:
        """The note is signed by the log (else the answer was another); of the size signed here it proves a fork."""
        note = parse_request(body).note
        origin = note.partition("\n")[0]
        claim, last = open_checkpoint(note, self._logs[origin]), self.seen.get(origin)
        if last is not None and claim.size == last.size and claim.root != last.root:
            self._store("conflicts", note, note)

    def _store(self, folder: str, name: str, note: str) -> None:
        path = self._directory / folder / _file_name(name)
        write_file(path, note.encode(), mode=0o644, sync=True)
        fsync_dir(path.parent)


def _file_name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _take_lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise AetherError("ALREADY_RUNNING", f"cannot open the witness in {path.parent}: it is in use") from error
    return fd


def _open_key(directory: Path, name: str) -> Cosigner:
    """The key, made at the first start: then under `name`; a kept key keeps its name."""
    path = directory / "witness.key"
    if not path.exists():
        try:
            made = Cosigner(name, os.urandom(32))
        except ValueError as error:
            raise AetherError("BAD_FIELD", f"cannot make the witness: {error}") from error
        encoded = base64.b64encode(ALGORITHM + made.seed).decode()
        line = f"{_PREFIX}{name}+{made.key.key_id.hex()}+{encoded}\n"
        write_file(path, line.encode(), mode=0o600, sync=True)
    if path.stat().st_mode & 0o077:
        raise AetherError("STATE_UNUSABLE", f"cannot use the key {path}: others can read it", f"chmod 600 {path}")
    kept_name, _, rest = path.read_text().strip().removeprefix(_PREFIX).partition("+")
    try:
        raw = base64.b64decode(rest.partition("+")[2], validate=True)
        kept = Cosigner(kept_name, raw[1:])
        if raw[:1] != ALGORITHM or rest.partition("+")[0] != kept.key.key_id.hex():
            raise ValueError("its id does not match")
    except ValueError as error:
        raise AetherError("STATE_UNUSABLE", f"cannot use the key {path}: it is malformed") from error
    write_file(directory / "witness.pub", f"{kept.key}\n".encode(), mode=0o644)
    fsync_dir(directory)
    return kept


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: _Server

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != PATH:
            self._send(Answer(404, "no such path\n"))
        elif not (length.isascii() and length.isdecimal()) or self.headers.get("Transfer-Encoding"):
            self._send(Answer(411, "send a Content-Length\n"), close=True)
        elif len(length) > 9 or int(length) > REQUEST_BYTES_MAX:
            self._send(Answer(413, f"at most {REQUEST_BYTES_MAX} bytes\n"), close=True)
        else:
            self._send(self.server.witness.answer(self.rfile.read(int(length))))

    def _send(self, answer: Answer, close: bool = False) -> None:
        body = answer.body.encode()
        self.close_connection = self.close_connection or close
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.media_type)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "client"  # a Unix peer has no address to look up

    def log_message(self, form: str, *arguments: Any) -> None:
        """Nothing: what was signed is kept as a file, and requests may come from anybody."""


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    witness: Witness


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def server_close(self) -> None:
        super().server_close()
        Path(str(self.server_address)).unlink(missing_ok=True)


def listen(witness: Witness, address: str) -> socketserver.BaseServer:
    """A server at `unix:<path>` or `127.0.0.1:<port>`; the caller runs and closes it. Raises AetherError BAD_FIELD."""
    path = address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    try:
        if path != address:
            _remove_stale(Path(path))
            # TCPServer passes the address to bind(2) as it is: for AF_UNIX that is a path
            server: _Server = _UnixServer(path, _Handler)  # type: ignore[arg-type]
            Path(path).chmod(0o660)
        elif host in ("127.0.0.1", "localhost") and port.isdecimal():
            server = _Server(("127.0.0.1", int(port)), _Handler)
        else:
            raise AetherError("BAD_FIELD", f"cannot listen at {address!r}: not unix:PATH or 127.0.0.1:PORT")
    except (OSError, OverflowError) as error:
        raise AetherError("BAD_FIELD", f"cannot listen at {address}: {error}", "name a free address") from error
    server.witness = witness
    return server


def _remove_stale(path: Path) -> None:
    """Takes away a socket that nobody listens on, left by a witness that was killed."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink()
