"""An instance whose egressd trusts a test's own authority, and the HTTPS server that has a certificate of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aether.contract.paths import Layout
from tests.support import instance, web

ADDRESS = "127.0.0.2"


@contextmanager
def running(authority: web.Authority, secret: str) -> Iterator[Layout]:
    """The instance; egressd may name `secret` as AETHER_SECRET_API. Skips where cells have no network namespace."""
    trusted = Path("/tmp") / f"aether-test-ca-{os.getpid()}.pem"  # where egressd's own uid may read it
    trusted.write_bytes(authority.ca.read_bytes())
    trusted.chmod(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(trusted))
        patch.setenv("AETHER_SECRET_API", secret)
        try:
            with instance.running() as found, instance.client(found) as client:
                if any(check["name"] == "netns" and not check["ok"] for check in client.doctor().checks):
                    pytest.skip("this host gives cells no network namespace of their own")
                yield found
        finally:
            trusted.unlink()
