"""What property tests of parsers share: odd values, valid samples with something changed, the one way to refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from aether.contract.errors import AetherError

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", "/", "..", "a/../b", "\0", "\x1b[31m", "é" * 200, "0-3,6", "r:/etc", "sha256:" + "0" * 64, "a" * 2_000, "*"]
)
NUMBERS = st.sampled_from([0, 1, -1, 99, 1 << 31, (1 << 53) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63), 0.5, -1e300])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
"""What a JSON body may hold where nobody expects it."""


def changed_json(sample: Any) -> st.SearchStrategy[Any]:
    """`sample` with one to three values somewhere in it replaced, removed or added."""

    @st.composite
    def changed(draw: st.DrawFn) -> Any:
        value = copy.deepcopy(sample)
        for _ in range(draw(st.integers(1, 3))):
            value = _change(draw, value)
        return value

    return changed()


def _change(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 7)):
        key = draw(st.sampled_from(sorted(value)))
        what = draw(st.sampled_from(["within", "within", "within", "remove", "add"]))
        rest = {name: each for name, each in value.items() if name != key}
        if what == "remove":
            return rest
        return {**value, draw(TEXTS): draw(JSON)} if what == "add" else {**rest, key: _change(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 7)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _change(draw, value[at]), *value[at + 1 :], *draw(st.lists(JSON, max_size=1))]
    return draw(JSON)


def changed_bytes(sample: bytes) -> st.SearchStrategy[bytes]:
    """`sample` with one to three places overwritten, cut out or grown."""
    edits = st.tuples(
        st.integers(0, max(0, len(sample) - 1)),
        st.sampled_from(["set", "cut", "put"]),
        st.binary(min_size=1, max_size=8),
    )

    def apply(changes: list[tuple[int, str, bytes]]) -> bytes:
        data = bytearray(sample)
        for at, what, new in changes:
            if what == "set":
                data[at : at + 1] = new[:1]
            elif what == "cut":
                del data[at : at + len(new)]
            else:
                data[at:at] = new
        return bytes(data)

    return st.lists(edits, min_size=1, max_size=3).map(apply)


def changed_text(sample: str) -> st.SearchStrategy[str]:
    """`sample` with one to three characters replaced, removed or added; any characters, half surrogate pairs too."""
    edits = st.tuples(st.integers(0, len(sample)), st.integers(0, 2), st.characters(codec=None) | st.just("\ud800"))

    def apply(changes: list[tuple[int, int, str]]) -> str:
        text = sample
        for at, length, new in changes:
            text = text[:at] + new + text[at + length :]
        return text

    return st.lists(edits, min_size=1, max_size=3).map(apply)


@contextmanager
def refusal(*codes: str) -> Iterator[None]:
    """Nothing but an AetherError with one of `codes` comes out, which can be told to whoever asked."""
    try:
        yield
    except AetherError as error:
        assert error.code in codes, error
        assert len(error.body().message) < 1_500


def outcome(call: Callable[[], Any], *codes: str) -> Any:
    """The value, or None for a refusal."""
    with refusal(*codes):
        return call()
    return None
