"""Names of cells: total, unambiguous, and the same whichever way they are spelled."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract import ids, limits
from aether.contract.cellnames import check_executable, check_name, in_path, is_within, parent_of, reference
from aether.contract.errors import AetherError

LABELS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", fullmatch=True)
NAMES = st.lists(LABELS, min_size=1, max_size=limits.CELL_DEPTH_MAX).map("/".join)
PLAIN = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")


@given(NAMES)
def test_a_good_name_survives_every_spelling(name: str) -> None:
    assert check_name(name) == name == reference(name) == reference(in_path(name))
    assert "/" not in in_path(name)
    parent = parent_of(name)
    assert parent is None or (check_name(parent) == parent and is_within(name, parent) and not is_within(parent, name))
    assert is_within(name, name)


@given(st.text())
def test_any_text_is_a_name_or_refused(text: str) -> None:
    parts = text.split("/")
    good = len(parts) <= limits.CELL_DEPTH_MAX and all(PLAIN.fullmatch(part) for part in parts)
    try:
        check_name(text)
    except AetherError as error:
        assert error.code == "BAD_FIELD" and not good
    else:
        assert good


@given(st.text())
def test_any_reference_is_read_or_refused(text: str) -> None:
    try:
        found = reference(text)
    except AetherError as error:
        assert error.code == "BAD_ID"
        return
    assert found.startswith("cell_") or check_name(found) == found


def test_a_sibling_whose_name_begins_the_same_is_not_within() -> None:
    assert not is_within("agent-2", "agent") and not is_within("agent", "agent/worker")


@pytest.mark.parametrize("bad", ["a/b", "", "-x", "x-", "a b", "_", "x" * 64])
def test_an_executable_is_one_label(bad: str) -> None:
    with pytest.raises(AetherError):
        check_executable(bad)


def test_an_id_is_never_a_name() -> None:
    cell = ids.new(ids.CELL)
    assert reference(cell) == cell
    with pytest.raises(AetherError):
        check_name(cell)
