"""Where references may point, and that no answer carries a secret."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.egresswire import EgressConnection
from aether.contract.errors import AetherError
from aether.contract.limits import EGRESS_BATCH_ROWS_MAX
from aether.contract.network import Credential
from aether.egress.journal import Journal
from aether.egress.secrets import Mask, Sources


def credential(source: str) -> Credential:
    return Credential(name="api", host="a.test:443", header="X-Key", source=source, prefix="Key ")


ENVIRONMENT = {"AETHER_SECRET_KEY": "value-1", "AETHER_SECRET_EMPTY": "", "AETHER_SECRET_LINES": "a\nb"}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    (tmp_path / "state/secrets").mkdir(parents=True)
    return Sources(
        tmp_path / "state",
        tmp_path / "state/secrets",
        ENVIRONMENT,
    )


def refused(sources: Sources, source: str) -> str:
    with pytest.raises(AetherError) as caught:
        sources.load(credential(source))
    assert caught.value.code == "BAD_FIELD"
    return caught.value.message


def test_values_come_from_files_and_variables(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("value-2\n")
    (tmp_path / "state/secrets/key").write_text("value-3")
    for source, value in [
        ("env:AETHER_SECRET_KEY", "value-1"),
        (f"file:{tmp_path}/key", "value-2"),
        (f"file:{tmp_path}/state/secrets/key", "value-3"),
    ]:
        injection = sources.load(credential(source))
        assert (injection.header, injection.value) == (b"x-key", b"Key " + value.encode())
        assert value not in repr(injection) and value not in repr(sources)


def test_the_state_directory_is_no_source(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "state/keys").mkdir()
    (tmp_path / "state/keys/tickets.key").write_text("root secret")
    (tmp_path / "link").symlink_to(tmp_path / "state/keys/tickets.key")
    (tmp_path / "state/secrets/link").symlink_to(tmp_path / "state/keys/tickets.key")
    for path in ("state/keys/tickets.key", "link", "state/secrets/link"):
        message = refused(sources, f"file:{tmp_path}/{path}")
        assert "state directory" in message and "root secret" not in message


def test_what_cannot_be_a_header(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * 10_000)
    os.mkfifo(tmp_path / "fifo")
    for source in (
        "env:AETHER_SECRET_NONE",
        "env:AETHER_SECRET_EMPTY",
        "env:AETHER_SECRET_LINES",
        f"file:{tmp_path}/none",
        f"file:{tmp_path}/long",
        f"file:{tmp_path}/fifo",
        f"file:{tmp_path}",
    ):
        refused(sources, source)


@given(st.lists(st.binary(max_size=12), max_size=12), st.binary(min_size=6, max_size=10), st.data())
def test_a_mask_lets_no_secret_through(parts: list[bytes], secret: bytes, data: st.DataObject) -> None:
    for at in data.draw(st.lists(st.integers(0, len(parts)), max_size=4)):
        cut = data.draw(st.integers(0, len(secret)))
        parts[at:at] = [secret[:cut], secret[cut:]]
    mask = Mask(secret)
    seen = b"".join([*(mask.feed(part) for part in parts), mask.rest()])
    whole = b"".join(parts)
    assert len(seen) == len(whole)
    assert secret not in seen or secret == b"*" * len(secret)
    assert seen == whole.replace(secret, b"*" * len(secret))


def row(number: int, **changes: object) -> EgressConnection:
    fields: dict[str, object] = {
        "cell_id": "c", "job_id": "j", "host": f"h{number}", "port": 1, "address": None, "rule": None,
        "verdict": "refused", "reason": "not-allowed", "credential": None,
        "sent_bytes": 1, "received_bytes": 2, "ms": 3,
    }  # fmt: skip
    return EgressConnection(**(fields | changes))  # type: ignore[arg-type]


def test_a_journal_is_bounded_and_loses_no_count() -> None:
    journal = Journal()
    assert not journal
    for number in range(EGRESS_BATCH_ROWS_MAX + 50):
        for _ in range(3):
            journal.add(row(number))
    rows = journal.take()
    assert len(rows) == EGRESS_BATCH_ROWS_MAX and journal.unlisted == 150
    assert (rows[0].count, rows[0].sent_bytes, rows[0].received_bytes, rows[0].ms) == (3, 3, 6, 9)
    assert not journal and journal.take() == ()
