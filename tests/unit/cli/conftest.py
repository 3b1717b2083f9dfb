from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

from http_node import HttpNode

from aether.client import Client


@pytest.fixture
def node(tmp_path: Path) -> Iterator[HttpNode]:
    with HttpNode(tmp_path / "state") as running:
        yield running


@pytest.fixture
def client(node: HttpNode) -> Iterator[Client]:
    with Client(node.socket_path) as connected:
        yield connected
