"""Matching paths against globs in time linear in pattern times path, whatever the pattern.

`*`, `?` and `[...]` (`[!...]`) within one part of a path, `**` as a whole part for any number of parts; a final
`**` stands for at least one. Both levels are the same matcher, which goes back to the last star only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

STAR: Final = object()
"""A token that stands for any run of items, the empty one included."""
Item = TypeVar("Item")
Token = Any
"""STAR, or a predicate on one item."""


def matches(tokens: Sequence[Token], items: Sequence[Item]) -> bool:
    """Whether `items` is what `tokens` describe, from its beginning to its end."""
    at = position = mark = 0
    star = -1
    while position < len(items):
        if at < len(tokens) and tokens[at] is STAR:
            star, mark = at, position
            at += 1
        elif at < len(tokens) and tokens[at](items[position]):
            at += 1
            position += 1
        elif star >= 0:
            mark += 1
            at, position = star + 1, mark
        else:
            return False
    return all(token is STAR for token in tokens[at:])


class Glob:
    """A compiled glob."""

    __slots__ = ("_parts",)

    def __init__(self, glob: str) -> None:
        self._parts: list[Token] = [STAR if part == "**" else _part(part) for part in glob.split("/")]
        if self._parts[-1] is STAR:
            self._parts.append(lambda part: True)

    def matches(self, path: str) -> bool:
        return matches(self._parts, path.split("/"))


def _part(part: str) -> Callable[[str], bool]:
    tokens: list[Token] = []
    at = 0
    while at < len(part):
        char = part[at]
        close = part.find("]", at + 3 if part[at + 1 : at + 2] == "!" else at + 2) if char == "[" else -1
        if char == "*":
            tokens.append(STAR)
        elif char == "?":
            tokens.append(lambda _: True)
        elif close > 0:
            tokens.append(_class(part[at + 1 : close]))
            at = close
        else:
            tokens.append(char.__eq__)
        at += 1
    return lambda name: matches(tokens, name)


def _class(inner: str) -> Callable[[str], bool]:
    """The characters between the brackets; `a-z` is a range."""
    negated = inner.startswith("!")
    inner = inner[negated:]
    singles: set[str] = set()
    ranges: list[tuple[str, str]] = []
    at = 0
    while at < len(inner):
        if inner[at + 1 : at + 2] == "-" and at + 2 < len(inner):
            ranges.append((inner[at], inner[at + 2]))
            at += 3
        else:
            singles.add(inner[at])
            at += 1

    def fits(char: str) -> bool:
        return (char in singles or any(low <= char <= high for low, high in ranges)) != negated

    return fits
