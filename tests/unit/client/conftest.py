from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.client import Client
from tests.unit.api.http_node import HttpNode


@pytest.fixture
def node(tmp_path: Path) -> Iterator[HttpNode]:
    with HttpNode(tmp_path / "state") as running:
        yield running


@pytest.fixture
def client(node: HttpNode) -> Iterator[Client]:
    with Client(node.socket_path) as connected:
        yield connected
