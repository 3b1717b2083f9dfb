"""Entries are RFC 8785, are read only as they are written, and hold no secrets."""

from __future__ import annotations

import json

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from aether.contract.errors import AetherError, ErrorBody
from aether.contract.jobs import ArtifactRef
from aether.substrate.audit import entry
from aether.substrate.audit.note import NoteError
from aether.substrate.audit.redact import redact
from tests.unit.substrate.audit.audit_kit import intent, plain

TEXT = st.text(max_size=40)
INTEGERS = st.integers(-entry.INTEGER_MAX, entry.INTEGER_MAX)
SECRETS = [
    "aetk1_AmUxB2RlZmF1bHRubm5ubm5ubm5",
    "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEI\n-----END EC PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----\nMHcCAQEEI",
    "Authorization: Bearer abcdef0123456789",
    "sk-ant-api03-abcdefghijklmnop",
    "ghp_0123456789abcdefghijABCDEFGHIJ",
    "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "password=hunter2!",
    'api_key: "0123456789"',
    "postgres://user:s3cr3t@db/x",
    "PRIVATE+KEY+aether+00112233+AQID",
]


@given(
    TEXT, st.dictionaries(st.text(st.characters(max_codepoint=127), max_size=9), INTEGERS, max_size=4), INTEGERS,
    st.dictionaries(TEXT, st.one_of(TEXT, INTEGERS, st.booleans(), st.none(), st.floats(), st.lists(TEXT)), max_size=4),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_entries_are_jcs_and_round_trip(
    text: str, timings: dict[str, int], size: int, details: dict[str, object]
) -> None:
    record = replace(
        intent(5),
        timings_us=timings,
        result_bytes=size,
        error=ErrorBody("X", text, text, details),
        detail={text: text},
        artifacts=(ArtifactRef(name=text, digest=text, size_bytes=size),),
    )
    written = entry.encode(record)
    assert written == rfc8785.dumps(json.loads(written))
    assert entry.encode(entry.decode(written)) == written


@pytest.mark.parametrize("value", [2**53, -(2**53), 2**70])
def test_integers_beyond_two_to_the_53_are_refused(value: int) -> None:
    with pytest.raises(AetherError, match=r"2\^53"):
        entry.encode(replace(plain(0), result_bytes=value))


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(AetherError, match="ASCII"):
        entry.encode(replace(plain(0), timings_us={"é": 1}))
    with pytest.raises(AetherError, match="surrogates"):
        entry.encode(replace(plain(0), principal="\ud800"))
    with pytest.raises(AetherError) as caught:
        entry.encode(replace(plain(0), artifacts=(ArtifactRef(name="n", digest="d" * 70_000, size_bytes=1),)))
    assert caught.value.code == "TOO_LARGE"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda e: e.replace(b'"attempt":1', b'"attempt": 1'), "ENTRY_NOT_CANONICAL"),
        (lambda e: e.replace(b'"attempt":1', b'"attempt":1.0'), "ENTRY_NOT_CANONICAL"),
        (lambda e: e.replace(b'"attempt":1', b'"attempt":1.5'), "ENTRY_SCHEMA"),
        (lambda e: e.replace(b'"attempt":1,', b'"attempt":1,"attempt":1,'), "ENTRY_NOT_CANONICAL"),
        (lambda e: e.replace(b'"attempt":1,', b""), "ENTRY_SCHEMA"),
        (lambda e: e.replace(b'"attempt":1,', b'"attempt":1,"attitude":1,'), "ENTRY_SCHEMA"),
        (lambda e: e.replace(b'"schema_version":"1.0"', b'"schema_version":"9.0"'), "ENTRY_SCHEMA"),
        (lambda e: e.replace(b"job.intent", b"job.dreamt"), "ENTRY_SCHEMA"),
        (lambda e: e.replace(b"uid:1000", b"uid\\u003a1000"), "ENTRY_NOT_CANONICAL"),
        (lambda e: e.replace(b'"attempt":1', b'"attempt":9007199254740992'), "ENTRY_NOT_CANONICAL"),
        (lambda e: e[:-1], "ENTRY_NOT_CANONICAL"),
        (lambda e: b"[" * 5000, "ENTRY_NOT_CANONICAL"),
        (lambda e: b"\xff" + e, "ENTRY_NOT_CANONICAL"),
        (lambda e: b"{}", "ENTRY_SCHEMA"),
    ],
)
def test_other_spellings_are_named(change, code: str) -> None:  # type: ignore[no-untyped-def]
    original = entry.encode(intent(0))
    assert change(original) != original
    with pytest.raises(NoteError) as caught:
        entry.decode(change(original))
    assert caught.value.code == code


@given(st.binary(max_size=60))
def test_reading_hostile_bytes_only_raises_note_errors(data: bytes) -> None:
    with pytest.raises(NoteError):
        entry.decode(data)


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_masked_wherever_text_is_free(secret: str) -> None:
    body = ErrorBody("X", f"cannot: {secret} there", secret, {"k": secret, "l": [secret], secret: 1})
    written = entry.encode(replace(plain(0), error=body, detail={"d": secret})).decode()
    core = secret.split("\n")[-1].split("=")[-1].split(" ")[-1].split(":")[-1].strip('"')
    assert core not in written and "[redacted]" in written


def test_ordinary_text_is_left_alone() -> None:
    for text in (
        "cannot run job: exit 1",
        "the key is missing",
        "a token of thanks",
        "https://x.org/a?b=c",
        "näh",
    ):
        assert redact(text) == text


@given(st.text(max_size=3000))
def test_masking_is_bounded_and_stable(text: str) -> None:
    once = redact(text)
    assert len(once.encode()) <= 12_000
