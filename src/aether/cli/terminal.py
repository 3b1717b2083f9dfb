"""What untrusted bytes may do to a terminal: print text, move to the next line or tab, and set colours.

A job's output and names can hold control sequences that rename the window, write to the clipboard (OSC 52),
answer questions as if typed (DECRQSS, CPR) or hide lines. When the output is a terminal, everything but text,
newline, tab, carriage return and SGR colours (ECMA-48, 8.3.117) is shown escaped; `^[` is ESC. When it is not,
bytes pass through untouched.
"""

from __future__ import annotations

import codecs
import re
from typing import Final

_SGR: Final = re.compile(r"\x1b\[[0-9;:]{0,64}m")
_SGR_START: Final = re.compile(r"\x1b(\[[0-9;:]{0,64})?\Z")
_UNSAFE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_UNSAFE_IN_LINE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class TerminalFilter:
    """Cleans a byte stream, chunk by chunk; holds back at most an unfinished character and colour sequence."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> bytes:
        """What may be shown so far."""
        text = self._held + self._decoder.decode(data)
        self._held = ""
        match = _SGR_START.search(text)
        if match:
            text, self._held = text[: match.start()], match.group()
        return _clean(text)

    def end(self) -> bytes:
        """What was held back."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return _clean(text)


def printable(text: str) -> str:
    """One line of untrusted text for a person: every control character escaped."""
    return _UNSAFE_IN_LINE.sub(_escape, text)


def _clean(text: str) -> bytes:
    kept, at = [], 0
    for match in _SGR.finditer(text):
        kept += [_UNSAFE.sub(_escape, text[at : match.start()]), match.group()]
        at = match.end()
    kept.append(_UNSAFE.sub(_escape, text[at:]))
    return "".join(kept).encode("utf-8", "replace")


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return "^" + chr(code + 0x40)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
