"""Globs: the promised meaning, agreement with fnmatch within a part, no pattern that takes long."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase

from hypothesis import given, settings
from hypothesis import strategies as st

from aether.spawner.globs import Glob


@settings(max_examples=500, deadline=None)
@given(st.text("ab*?[]!-.", min_size=1, max_size=10), st.text("abc.[]!-", min_size=1, max_size=6))
def test_agree_with_fnmatch_within_a_part(glob: str, name: str) -> None:
    if glob != "**":
        assert Glob(glob).matches(name) == fnmatchcase(name, glob)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab*?[]!-.", min_size=1, max_size=5), min_size=1, max_size=4))
def test_a_star_stays_in_its_part(parts: list[str]) -> None:
    if "**" not in parts:
        assert not Glob("/".join(parts)).matches("/".join(["a"] * (len(parts) + 1)))


def test_meaning() -> None:
    def match(glob: str, path: str) -> bool:
        return Glob(glob).matches(path)

    assert match("**", "a/b/c") and match("**/c", "c") and match("**/c", "a/b/c") and match("a/**/c", "a/c")
    assert match("a/**", "a/b/c") and not match("a/**", "a") and not match("*", "a/b")
    assert match("[ab].txt", "a.txt") and not match("[!ab].txt", "a.txt") and match("[!ab].txt", "c.txt")
    assert match("[a-c]", "b") and not match("[a-c]", "d") and match("a.txt", "a.txt") and not match("a.txt", "aXtxt")


def test_a_hostile_glob_ends_soon() -> None:
    began = time.monotonic()
    assert not Glob("*a" * 400 + "b").matches("a" * 255)
    assert not Glob("/".join(["**", "a"] * 200) + "/b").matches("/".join("a" * 500))
    assert time.monotonic() - began < 2
