from __future__ import annotations

from collections.abc import Iterator

import pytest

from aether.runtime.inference import Inference
from aether.runtime.modelpackage import LoadedPackage, load_package, load_public_key
from tests.unit.runtime.cfcd_client import PACKAGE, PUBLIC_KEY, Client, cfcd


@pytest.fixture(scope="session")
def package() -> LoadedPackage:
    return load_package(PACKAGE, [load_public_key(PUBLIC_KEY)])


@pytest.fixture(scope="session")
def inference(package: LoadedPackage) -> Inference:
    return Inference.of(package)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cfcd() as running:
        yield running
