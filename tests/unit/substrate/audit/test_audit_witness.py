"""Witnesses: cosignatures, what `add-checkpoint` answers, that no fork is ever signed, parsers on hostile bytes."""

from __future__ import annotations

import base64
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.substrate.audit import tree
from aether.substrate.audit.cosign import Cosigner, WitnessKey, cosigned_by
from aether.substrate.audit.note import Checkpoint, NoteError, Signer, open_checkpoint
from aether.substrate.audit.quorum import Quorum
from aether.substrate.audit.report import Findings
from aether.substrate.audit.submit import Prove, WitnessAt, read_witnesses, submit
from aether.substrate.audit.witness import SIZE_TYPE, AddCheckpoint, add_checkpoint, parse_request
from aether.substrate.audit.witnessing import Witness, listen
from tests.unit.substrate.audit.audit_kit import ORIGIN, SIGNER

NOW_S = 1_790_000_000
LOGS = {ORIGIN: SIGNER.verifier}
COSIGNER = Cosigner("witness.example/w1", b"\x09" * 32)


class Log:
    """A tree whose checkpoints and proofs are made as asked."""

    def __init__(self, count: int, salt: bytes = b"") -> None:
        self.leaves = [tree.leaf_hash(b"%d" % number + salt) for number in range(count)]

    def node(self, level: int, index: int) -> bytes:
        row = self.leaves[index << level : (index + 1) << level]
        while len(row) > 1:
            row = [tree.node_hash(row[at], row[at + 1]) for at in range(0, len(row), 2)]
        return row[0]

    def checkpoint(self, size: int) -> Checkpoint:
        return Checkpoint(ORIGIN, size, tree.root(size, self.node))

    def note(self, size: int, signer: Signer = SIGNER) -> str:
        return signer.sign(self.checkpoint(size).text())

    def request(self, old: int, new: int) -> bytes:
        proof = tree.consistency_proof(old, new, self.node) if old else []
        return AddCheckpoint(old, tuple(proof), self.note(new)).encode()


LOG = Log(300)


def answer(body: bytes, last: int = 0, log: Log = LOG) -> tuple[int, str]:
    seen = {ORIGIN: log.checkpoint(last)} if last else {}
    given_ = add_checkpoint(body, LOGS, seen, COSIGNER, NOW_S)
    assert (given_.keep is not None) == (given_.status == 200)
    return given_.status, given_.body


def test_a_cosignature_is_that_of_the_specification() -> None:
    """The bytes as C2SP tlog-cosignature says, put together by hand."""
    text = LOG.checkpoint(5).text()
    raw = base64.b64decode(COSIGNER.line(text, NOW_S).split(" ")[2])
    assert raw[:4] == COSIGNER.key.key_id and int.from_bytes(raw[4:12], "big") == NOW_S and len(raw) == 76
    said = f"cosignature/v1\ntime {NOW_S}\n{ORIGIN}\n5\n{base64.b64encode(LOG.checkpoint(5).root).decode()}\n"
    COSIGNER.key._key.verify(raw[12:], said.encode())
    note = LOG.note(5) + COSIGNER.line(text, NOW_S)
    assert open_checkpoint(note, SIGNER.verifier) == LOG.checkpoint(5)  # the log's signature still holds
    assert WitnessKey.parse(str(COSIGNER.key)) == COSIGNER.key
    assert cosigned_by(note, [COSIGNER.key]) == {"witness.example/w1": NOW_S}
    assert cosigned_by(LOG.note(5), [COSIGNER.key]) == {}
    with pytest.raises(NoteError, match="does not verify"):
        cosigned_by(LOG.note(6) + COSIGNER.line(text, NOW_S), [COSIGNER.key])
    with pytest.raises(NoteError, match="witness key"):
        WitnessKey.parse(str(SIGNER.verifier))


@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 300), (1, 2), (128, 256), (7, 300), (299, 300), (300, 300)])
def test_growth_is_cosigned(old: int, new: int) -> None:
    status, body = answer(LOG.request(old, new), old)
    assert status == 200
    assert COSIGNER.key.time_of(LOG.note(new) + body) == NOW_S


def test_refusals_have_the_status_of_the_specification() -> None:
    good = LOG.request(7, 300)
    assert answer(b"old 9\n\n" + LOG.note(8).encode())[0] == 400
    other = Signer("aether/other/1", b"\x01" * 32)
    foreign = other.sign(Checkpoint(other.name, 1, LOG.checkpoint(1).root).text()).encode()
    assert answer(b"old 0\n\n" + foreign)[0] == 404
    forged = Signer(ORIGIN, b"\x02" * 32)
    assert answer(b"old 0\n\n" + LOG.note(8, forged).encode())[0] == 403
    assert answer(good, 8) == (409, "8\n") and answer(good, 0) == (409, "0\n")
    given_ = add_checkpoint(good, LOGS, {ORIGIN: LOG.checkpoint(8)}, COSIGNER, NOW_S)
    assert given_.media_type == SIZE_TYPE
    fork = Log(300, b"fork")
    assert answer(fork.request(300, 300), 300)[0] == 409
    assert answer(fork.request(7, 300), 7)[0] == 422
    assert answer(AddCheckpoint(7, (), LOG.note(300)).encode(), 7)[0] == 422
    assert answer(AddCheckpoint(0, (b"\0" * 32,), LOG.note(300)).encode())[0] == 422


@pytest.mark.parametrize(
    "body",
    [
        b"", b"old 0", b"old 0\n", b"old 0\n\n", b"old -1\n\nx", b"old 00\n\nx", b"old 1e3\n\nx", b"\xff\n\n",
        b"old " + "٣".encode() + b"\n\nx", b"old 0\nAAAA\n\nx", b"old 0\n" + b"A" * 43 + b"\n\nx",
        b"old 0\n" + (b"A" * 43 + b"=\n") * 64 + b"\nx", b"old " + b"9" * 17 + b"\n\nx", b"old 9999999999999999\n\nx",
        b"new 0\n\nx", b"old 0\r\n\r\nx", b"old 0\n\n" + b"x" * 80_000,
    ],
)  # fmt: skip
def test_bodies_of_another_form_are_400(body: bytes) -> None:
    assert answer(body)[0] == 400


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_body_ends_a_witness_or_gets_a_fork_signed(data: st.DataObject) -> None:
    """A changed request is refused, or asks for what holds anyway."""
    body = bytearray(LOG.request(128, 300))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        what = data.draw(st.sampled_from(["set", "cut", "put"]))
        if what == "set":
            body[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del body[at : at + data.draw(st.integers(1, 40))]
        else:
            body[at:at] = data.draw(st.binary(max_size=8))
        body = body or bytearray(b"x")
    given_ = add_checkpoint(bytes(body), LOGS, {ORIGIN: LOG.checkpoint(128)}, COSIGNER, NOW_S)
    assert given_.status in (200, 400, 403, 404, 409, 422)
    if given_.keep is not None:
        assert given_.keep == LOG.checkpoint(given_.keep.size)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_hostile_bytes_only_raise_what_is_said(raw: bytes) -> None:
    text = raw.decode("utf-8", "surrogateescape")
    for parse in (WitnessKey.parse, COSIGNER.key.time_of):
        with suppress(NoteError):
            parse(text)
    with suppress(ValueError):
        parse_request(raw)
    try:
        read_witnesses(text)
    except AetherError as error:
        assert error.code == "BAD_FIELD"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_what_a_witness_signed_is_never_a_fork(steps: list[tuple[int, bool, bool]]) -> None:
    """A log that offers two histories in turn, and crashes of the witness: all that was signed is of one history."""
    import tempfile

    histories = (Log(60), Log(60, b"fork"))
    signed: list[Checkpoint] = []
    with tempfile.TemporaryDirectory() as folder:
        witness = Witness(Path(folder), "w", [SIGNER.verifier], lambda: NOW_S)
        for size, forked, crash in steps:
            last = witness.seen.get(ORIGIN)
            old = last.size if last is not None else 0
            given_ = witness.answer(histories[forked].request(min(old, size), size))
            if given_.keep is not None:
                signed.append(given_.keep)
            if crash:
                witness.close()
                witness = Witness(Path(folder), "w", [SIGNER.verifier], lambda: NOW_S)
        witness.close()
    assert any(all(claim == log.checkpoint(claim.size) for claim in signed) for log in histories)


def test_a_witness_is_kept_on_disk(tmp_path: Path) -> None:
    witness = Witness(tmp_path, "w", [SIGNER.verifier], lambda: NOW_S)
    assert witness.answer(LOG.request(0, 9)).status == 200
    with pytest.raises(AetherError) as caught:
        Witness(tmp_path, "w", [SIGNER.verifier], lambda: NOW_S)
    assert caught.value.code == "ALREADY_RUNNING"
    witness.close()
    again = Witness(tmp_path, "another-name", [SIGNER.verifier], lambda: NOW_S)
    assert again.cosigner.key == witness.cosigner.key and again.seen[ORIGIN] == LOG.checkpoint(9)
    assert again.answer(LOG.request(0, 9)).body == "9\n"
    fork = Log(300, b"fork")
    assert again.answer(fork.request(9, 9)).status == 409
    assert len(list((tmp_path / "conflicts").iterdir())) == 1  # a signed proof of what the log's key did
    again.close()
    key = tmp_path / "witness.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    key.chmod(0o644)
    with pytest.raises(AetherError, match="others can read it"):
        Witness(tmp_path, "w", [SIGNER.verifier], lambda: NOW_S)
    key.chmod(0o600)
    last = next((tmp_path / "logs").iterdir())
    last.write_text(last.read_text().replace("\n9\n", "\n8\n"))
    with pytest.raises(AetherError, match="cannot use the last checkpoint"):
        Witness(tmp_path, "w", [SIGNER.verifier], lambda: NOW_S)


@contextmanager
def serving(directory: Path, address: str) -> Iterator[tuple[Witness, str]]:
    witness = Witness(directory, "witness.example/w1", [SIGNER.verifier], lambda: NOW_S)
    server = listen(witness, address)
    at = address if address.startswith("unix:") else f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield witness, at
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        witness.close()


def prove(size: int, log: Log = LOG) -> Prove:
    return lambda old: (log.note(size), tuple(tree.consistency_proof(old, size, log.node)) if old else ())


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_over_http(tmp_path: Path, kind: str) -> None:
    with serving(tmp_path / "w", f"unix:{tmp_path}/s" if kind == "unix" else "127.0.0.1:0") as (witness, address):
        at = WitnessAt(witness.cosigner.key, address)
        first = submit(at, prove(9))
        assert first.size == 9 and first.time_s == NOW_S
        assert submit(at, prove(200)).size == 200  # told 200 needs the proof from 9
        assert submit(at, prove(201), known=200).size == 201
        with pytest.raises(AetherError, match="cut back"):
            submit(at, prove(5))
        with pytest.raises(AetherError) as caught:
            submit(at, prove(300, Log(300, b"fork")))
        assert caught.value.code == "VERIFY_FAILED"
        stranger = WitnessAt(Cosigner("other", b"\x03" * 32).key, address)
        with pytest.raises(AetherError, match="no cosignature of its key"):
            submit(stranger, prove(202), known=201)
    with pytest.raises(AetherError) as gone:
        submit(at, prove(300))
    assert gone.value.code == "UNREACHABLE"


def test_hostile_http(tmp_path: Path) -> None:
    path = f"{tmp_path}/s"
    with serving(tmp_path / "w", f"unix:{path}") as (witness, address):
        for request, status in (
            (b"GET / HTTP/1.1\r\n\r\n", b"501"),
            (b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"404"),
            (b"POST /add-checkpoint HTTP/1.1\r\n\r\n", b"411"),
            (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", b"413"),
            (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"411"),
            (b"POST /add-checkpoint HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"400"),
            (b"\x00\xff\r\n\r\n", b"400"),
        ):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(path)
                client.sendall(request)
                assert status in client.recv(4096).split(b"\r\n")[0], request
        assert submit(WitnessAt(witness.cosigner.key, address), prove(9)).size == 9
    assert not Path(path).exists()


def test_a_quorum_counts_witnesses_by_key() -> None:
    other = Cosigner("witness.example/w2", b"\x0a" * 32)
    twin = Cosigner("witness.example/w3", b"\x0a" * 32)
    text = LOG.checkpoint(5).text()
    note = LOG.note(5) + "".join(each.line(text, NOW_S) for each in (COSIGNER, other, twin))
    keys = [str(each.key) for each in (COSIGNER, other, twin)]

    def count(needed: int | None, *names: str, note: str = note) -> tuple[int, bool]:
        found = Findings()
        quorum = Quorum.of(names, needed)
        quorum.check({"note": note.encode()}, found)
        return len(quorum.sizes), found.count == 0

    assert count(None, *keys) == (2, True)
    with pytest.raises(ValueError, match="quorum of 3"):
        count(3, *keys)
    assert count(2, keys[0], keys[1], note=LOG.note(5) + COSIGNER.line(text, NOW_S)) == (1, False)
    assert count(1, keys[0], keys[1], note=LOG.note(5) + COSIGNER.line(text, NOW_S)) == (1, True)
