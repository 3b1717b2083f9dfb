"""Planted secrets are masked before anything is written, by the known forms and by the operator's own patterns."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from aether.contract.errors import ErrorBody
from aether.substrate.audit import redact
from tests.unit.substrate.audit.audit_kit import open_log, plain

PLANTED = (
    "aetk1_QUJDREVGR0hJSktMTU5PUA",
    "sk-proj-AbCdEfGhIjKlMnOpQrSt",
    "ghp_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "hunter2-the-password",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2lnbmF0dXJl",
    "EMP-004711",
    "jane.doe@example.com",
)
PATTERNS = r"""
# employee numbers and mail addresses
\bEMP-[0-9]{6}\b
[a-z.]+@example\.com
"""


@pytest.fixture
def patterns() -> Iterator[None]:
    redact.mask_also(redact.read_patterns(PATTERNS))
    yield
    redact.mask_also(())


def test_no_planted_secret_reaches_the_disk(tmp_path: Path, patterns: None) -> None:
    text = f"{' '.join(PLANTED)} password=hunter2-the-password"
    error = ErrorBody("INTERNAL", f"cannot: {text}", text, {"a": text, "b": {"deep": [text]}})

    async def write() -> None:
        log = open_log(tmp_path)
        last = log.append(lambda index: replace(plain(index), error=error, detail={"number": "0", "said": text}))
        await log.durable(last)
        log.close()

    asyncio.run(write())
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert kept.count(b"[redacted]") > 10
    for planted in PLANTED[:3] + PLANTED[4:]:
        assert planted.encode() not in kept, planted
    assert b"password=hunter2" not in kept


def test_own_patterns_mask_and_nothing_else(patterns: None) -> None:
    assert redact.redact("EMP-004711 wrote to jane.doe@example.com") == "[redacted] wrote to [redacted]"
    assert redact.redact("EMP-47 wrote to jane@example.org") == "EMP-47 wrote to jane@example.org"


@pytest.mark.parametrize("text", ["(", ".*", "x?", "a" * 600, "\n".join(["abc"] * 70), "*"])
def test_patterns_that_cannot_be_used_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="line "):
        redact.read_patterns(text)
