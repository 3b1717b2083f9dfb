from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.api.http_node import HttpNode


@pytest.fixture
def node(tmp_path: Path) -> Iterator[HttpNode]:
    with HttpNode(tmp_path) as running:
        yield running
