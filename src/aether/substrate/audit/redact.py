"""Masks secrets in free text before it is written to the log: the log is append-only, so a secret in it stays.

Rules, applied in this order; each match becomes `[redacted]`:
- PEM private keys, from BEGIN to END or to the end of the text;
- tickets: `aetk1_` and what follows of its alphabet;
- `Bearer`/`Basic` credentials;
- API keys with a known prefix (OpenAI, Anthropic, GitHub, GitLab, Slack, AWS, Google, Hugging Face, Stripe);
- JSON web tokens;
- `password=`, `token=`, `secret=`, `api_key=` and the like: the value;
- the password in `scheme://user:password@host`;
- what the operator's own patterns match (`read_patterns`, `mask_also`; the file `policy/mask`).

A rule may mask too much, never the name of what was masked. Text is cut at TEXT_CHARS_MAX first, and characters that
JSON cannot carry (lone surrogates, from undecodable file names) are replaced.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from aether.contract.errors import ErrorBody

MASK: Final = "[redacted]"
TEXT_CHARS_MAX: Final = 2_000
ITEMS_MAX: Final = 32
PATTERNS_MAX: Final = 64
PATTERN_CHARS_MAX: Final = 512
_DEPTH_MAX: Final = 4

_RULES: Final = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.S), MASK),
    (re.compile(r"PRIVATE\+KEY\+\S+"), MASK),
    (re.compile(r"aetk1_[A-Za-z0-9_-]+"), MASK),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), rf"\1 {MASK}"),
    (
        re.compile(
            r"\b(?:sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
            r"|xox[a-z]-[A-Za-z0-9-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|hf_[A-Za-z0-9]{20,}"
            r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,})"
        ),
        MASK,
    ),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), MASK),
    (
        re.compile(
            r"""(?ix)\b([a-z0-9_-]{0,40}(?:password|passwd|secret|token|api[_-]?key|access[_-]?key)["']?\s*[=:]\s*)
            (?!\[redacted\])("[^"]*"|'[^']*'|[^\s,;&"']+)"""
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b([a-z][a-z0-9+.-]{1,20}://[^\s/:@]{0,200}:)[^\s/@]{1,200}@", re.I), rf"\1{MASK}@"),
)
_HINT: Final = re.compile(
    r"(?i)private|aetk1_|bearer|basic|sk-|gh[pousr]_|github_pat|glpat-|xox|AKIA|ASIA|AIza|hf_|k_live|k_test|eyJ"
    r"|passw|secret|token|key|://"
)


_own: tuple[re.Pattern[str], ...] = ()


def read_patterns(text: str) -> tuple[re.Pattern[str], ...]:
    """The operator's patterns: a regular expression of Python's `re` per line; empty lines and those that begin with
    `#` are passed over. Raises ValueError, also for one that matches the empty text."""
    found: list[re.Pattern[str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            if len(line) > PATTERN_CHARS_MAX or len(found) == PATTERNS_MAX:
                raise ValueError(f"more than {PATTERNS_MAX} patterns, or than {PATTERN_CHARS_MAX} characters in one")
            pattern = re.compile(line)
            if pattern.search("") is not None:
                raise ValueError("it matches the empty text, so it would match everywhere")
        except (re.error, ValueError, RecursionError, OverflowError) as error:
            raise ValueError(f"line {number}: {error}") from error
        found.append(pattern)
    return tuple(found)


def mask_also(patterns: tuple[re.Pattern[str], ...]) -> None:
    """From now on these are masked too. Set once, by the composition root, before the first record."""
    global _own
    _own = patterns


def redact(text: str) -> str:
    """`text` without secrets, cut and encodable."""
    if len(text) > TEXT_CHARS_MAX:
        text = text[:TEXT_CHARS_MAX] + "…"
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    if _HINT.search(text) is not None:
        for pattern, replacement in _RULES:
            text = pattern.sub(replacement, text)
    for pattern in _own:
        text = pattern.sub(MASK, text)
    return text


def redact_detail(detail: dict[str, str]) -> dict[str, str]:
    """The `detail` of a record: ASCII names, masked values, few of them."""
    return {_name(name): redact(value) for name, value in list(detail.items())[:ITEMS_MAX]}


def redact_error(error: ErrorBody) -> ErrorBody:
    """An error as a record may hold it: masked text; details are text, integers, booleans or null."""
    details = {_name(name): _plain(value) for name, value in list(error.details.items())[:ITEMS_MAX]}
    return ErrorBody(redact(error.code), redact(error.message), redact(error.remedy), details)


def _name(name: str) -> str:
    return redact(name).encode("ascii", "backslashreplace").decode()[:128]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**53) < value < 2**53:
        return value
    if isinstance(value, str):
        return redact(value)
    try:
        # masked before it is written as JSON: escaped quotes would hide where a secret ends
        return redact(msgspec.json.encode(_masked(value, _DEPTH_MAX)).decode())
    except (TypeError, UnicodeEncodeError, ValueError):
        return redact(repr(value))


def _masked(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return redact(value)
    if depth and isinstance(value, dict):
        return {redact(str(name)): _masked(item, depth - 1) for name, item in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_masked(item, depth - 1) for item in value]
    return value if isinstance(value, int | float) or value is None else MASK
