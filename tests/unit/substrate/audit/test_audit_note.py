"""Signed notes: a known answer of another implementation, round trips, and everything that must be refused."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.substrate.audit import note
from aether.substrate.audit.keyfile import open_signer
from aether.substrate.audit.note import Checkpoint, NoteError, Signer, Verifier
from tests.unit.substrate.audit.audit_kit import ORIGIN, SIGNER

# From the documentation of golang.org/x/mod/sumdb/note.
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = """If you think cryptography is the answer to your problem,
then you don't know what your problem is.

\u2014 PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=
"""
TEXT = Checkpoint(ORIGIN, 3, bytes(32)).text()


def test_known_note() -> None:
    assert Verifier.parse(GO_KEY).open(GO_NOTE).startswith("If you think")
    assert str(Verifier.parse(GO_KEY)) == GO_KEY


def test_round_trip() -> None:
    signed = SIGNER.sign(TEXT)
    assert SIGNER.verifier.open(signed) == TEXT
    assert note.open_checkpoint(signed, Verifier.parse(str(SIGNER.verifier))) == Checkpoint(ORIGIN, 3, bytes(32))
    assert "seed" not in repr(SIGNER)


def test_other_keys_lines_are_ignored_and_own_must_hold() -> None:
    signed = SIGNER.sign(TEXT)
    witness = Signer("witness", b"w" * 32).sign(TEXT)
    both = signed + witness.rpartition("\n\n")[2]
    assert SIGNER.verifier.open(both) == TEXT
    bad = base64.b64encode(SIGNER.verifier.key_id + bytes(64)).decode()
    with pytest.raises(NoteError, match="does not verify"):
        SIGNER.verifier.open(f"{both}\u2014 {ORIGIN} {bad}\n")
    with pytest.raises(NoteError, match="no signature"):
        SIGNER.verifier.open(witness)


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "\n",
        TEXT,
        TEXT + "\n",
        SIGNER.sign(TEXT).rstrip("\n"),
        SIGNER.sign(TEXT).replace("\u2014", "-"),
        SIGNER.sign(TEXT).replace("\n\u2014", "\r\n\u2014"),
        SIGNER.sign(TEXT) + "\n",
        SIGNER.sign(TEXT) + "trailing\n",
        "x" * note.NOTE_BYTES_MAX + SIGNER.sign(TEXT),
        SIGNER.sign(TEXT).replace("=\n", "\n"),
    ],
)
def test_malformed_notes(broken: str) -> None:
    with pytest.raises(NoteError) as caught:
        SIGNER.verifier.open(broken)
    assert caught.value.code == "NOTE_FORMAT"


@given(st.data())
def test_any_changed_character_is_noticed(data: st.DataObject) -> None:
    signed = SIGNER.sign(TEXT)
    at = data.draw(st.integers(0, len(signed) - 1))
    other = data.draw(st.characters(max_codepoint=0x2FF).filter(lambda c: c != signed[at]))
    with pytest.raises(NoteError):
        SIGNER.verifier.open(signed[:at] + other + signed[at + 1 :])


@given(st.text(max_size=200))
def test_reading_hostile_text_only_raises_note_errors(text: str) -> None:
    for read in (SIGNER.verifier.open, note.parse_checkpoint, Verifier.parse):
        with pytest.raises(NoteError):
            read(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{ORIGIN}\n03\n{base64.b64encode(bytes(32)).decode()}\n",
        f"{ORIGIN}\n-3\n{base64.b64encode(bytes(32)).decode()}\n",
        f"{ORIGIN}\n\u0663\n{base64.b64encode(bytes(32)).decode()}\n",
        f"{ORIGIN}\n3\n{base64.b64encode(bytes(31)).decode()}\n",
        f"{ORIGIN}\n3\n{base64.b64encode(bytes(32)).decode()}\nextension\n",
        f"\n3\n{base64.b64encode(bytes(32)).decode()}\n",
    ],
)
def test_malformed_checkpoints(text: str) -> None:
    with pytest.raises(NoteError, match=r"checkpoint"):
        note.parse_checkpoint(text)


def test_a_checkpoint_of_another_log_is_refused() -> None:
    with pytest.raises(NoteError) as caught:
        note.open_checkpoint(SIGNER.sign(Checkpoint("other", 3, bytes(32)).text()), SIGNER.verifier)
    assert caught.value.code == "CHECKPOINT_ORIGIN"


def test_key_file(tmp_path: Path) -> None:
    private, public = tmp_path / "keys/audit.key", tmp_path / "keys/audit.pub"
    made = open_signer(private, public, ORIGIN)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.read_text() == f"{made.verifier}\n"
    public.unlink()
    assert open_signer(private, public, ORIGIN) == made and public.exists()
    with pytest.raises(AetherError, match="not the key of"):
        open_signer(private, public, "aether/other/1")
    private.chmod(0o640)
    with pytest.raises(AetherError, match="others can read"):
        open_signer(private, public, ORIGIN)
    private.chmod(0o600)
    private.write_text("PRIVATE+KEY+x+00000000+!!!\n")
    with pytest.raises(AetherError, match="malformed"):
        open_signer(private, public, ORIGIN)
    assert not list(tmp_path.rglob("*.tmp"))
