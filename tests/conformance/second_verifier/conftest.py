"""Makes the stand-alone verifier importable here, and writes the small log that these tests damage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

import independent_writer as writer  # noqa: E402


@pytest.fixture(scope="session")
def small() -> writer.World:
    """23 entries in two segments, all covered by the checkpoint; one whole job among them."""
    return writer.world(count=23, per_segment=13, covered=23)


@pytest.fixture(scope="session")
def large() -> writer.World:
    """300 entries: one full tile, one partial tile, a second level."""
    return writer.world(count=300, per_segment=170, covered=300)
