"""The logs that these tests damage."""

from __future__ import annotations

import pytest

from tests.conformance.second_verifier import independent_writer as writer


@pytest.fixture(scope="session")
def small() -> writer.World:
    """23 entries in two segments, all covered by the checkpoint; two whole jobs among them."""
    return writer.world(count=23, per_segment=13, covered=23)


@pytest.fixture(scope="session")
def large() -> writer.World:
    """300 entries: one full tile, one partial tile, a second level."""
    return writer.world(count=300, per_segment=170, covered=300)
