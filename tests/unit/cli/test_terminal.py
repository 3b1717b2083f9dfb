"""What reaches a terminal: text, newlines, tabs and colours; everything else is shown, not obeyed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.cli.terminal import TerminalFilter, printable

HOSTILE = [
    b"\x1b]0;owned\x07", b"\x1b]52;c;cm0gLXJm\x07", b"\x1b[2J\x1b[H", b"\x1bP$q\"p\x1b\\", b"\x1b[6n", b"\x1b[?1049h",
    b"\x9b2J", "\u009b2J".encode(), b"\x08\x08\x08", b"\x1b[31;\x1b[2Jm", "\u202etxt.exe".encode(), b"\x1b" * 100,
    b"\x1b[" + b"1;" * 500 + b"m",
]  # fmt: skip
ALLOWED = re.compile(rb"\x1b\[[0-9;:]{0,64}m")


def shown(data: bytes, *cuts: int) -> bytes:
    clean = TerminalFilter()
    out, at = b"", 0
    for cut in sorted(c % (len(data) + 1) for c in cuts):
        out += clean.feed(data[at:cut])
        at = cut
    return out + clean.feed(data[at:]) + clean.end()


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_sequences_are_shown(data: bytes) -> None:
    rest = ALLOWED.sub(b"", shown(b"a" + data + b"b\n"))
    assert not any((byte < 0x20 and byte not in b"\n\t\r") or byte == 0x7F for byte in rest)
    assert not any(0x80 <= ord(char) < 0xA0 or char == "\u202e" for char in rest.decode())


@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(HOSTILE)).map(b"".join),
    st.lists(st.integers(0, 1000), max_size=5),
)
def test_cuts_do_not_matter(data: bytes, cuts: list[int]) -> None:
    whole, cut = shown(data), shown(data, *cuts)
    assert whole == cut
    rest = ALLOWED.sub(b"", whole)
    assert b"\x1b" not in rest


def test_text_and_colours_pass() -> None:
    text = "plain é 漢字 🚀\n\ttab \x1b[1;31mred\x1b[0m done\r\n".encode()
    assert shown(text) == text
    assert shown(text, *range(len(text))) == text


def test_one_line() -> None:
    assert printable("a\nb\x1b[31m") == "a^Jb^[[31m"
    assert printable("\ud800") == "\\ud800"
