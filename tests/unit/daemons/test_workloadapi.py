"""The Workload API as spired speaks it: what is read of a message, the stream, and what ends it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.daemons import supervisor, workloadapi
from tests.support import workloadapi as mock

ROOT, OTHER = mock.authority("example.org"), mock.authority("other.org")


def test_bundles_of_a_message() -> None:
    raw = mock.response({"example.org": mock.ders(ROOT, OTHER), "other.org": mock.ders(OTHER)})
    good, bad = workloadapi.read_bundles(raw)
    assert good == {"example.org": ROOT.pem + OTHER.pem, "other.org": OTHER.pem} and bad == {}


@pytest.mark.parametrize("ders", [b"", b"\x30", b"\x30\x82\xff\xff", b"nothing", mock.ders(ROOT)[:-1], b"\x30\x00"])
def test_a_malformed_bundle_is_left_out_and_the_others_hold(ders: bytes) -> None:
    good, bad = workloadapi.read_bundles(mock.response({"bad.org": ders, "other.org": mock.ders(OTHER)}))
    assert list(good) == ["other.org"] and list(bad) == ["spiffe://bad.org"]


@pytest.mark.parametrize("name", ["Example.org", "", "a b", "example.org/ns"])
def test_a_bundle_of_no_trust_domain_is_left_out(name: str) -> None:
    good, bad = workloadapi.read_bundles(mock.response({name: mock.ders(ROOT)}))
    assert good == {} and len(bad) == 1


@pytest.mark.parametrize("raw", [b"\x0a", b"\x12\x05ab", b"\xff" * 11, b"\x0b", b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_malformed_message_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        workloadapi.read_bundles(raw)


@given(st.binary(max_size=300) | st.binary(max_size=80).map(lambda rest: mock.field(2, mock.field(2, rest))))
def test_no_message_makes_it_fail_otherwise(raw: bytes) -> None:
    try:
        good, _ = workloadapi.read_bundles(raw)
    except ValueError:
        return
    assert all("BEGIN CERTIFICATE" in pem for pem in good.values())


@pytest.mark.parametrize("text", ["", "/run/api.sock", "unix://api.sock", "tcp://127.0.0.1:8081", "unix:///a?b"])
def test_what_names_no_socket_is_refused(text: str) -> None:
    with pytest.raises(AetherError, match="no absolute path of a Unix socket"):
        workloadapi.target(text)


def test_a_socket_as_grpc_names_it() -> None:
    assert workloadapi.target("unix:///run/spire/api.sock") == "unix:/run/spire/api.sock"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(AetherError) as caught:
        workloadapi.channel("unix:///run/spire/api.sock")
    assert "not installed" in caught.value.message and "aether-substrate[spire]" in (caught.value.remedy or "")


def test_the_role_runs_where_the_endpoint_is_named() -> None:
    assert supervisor.roles({}) == supervisor.ROLES and "spired" not in supervisor.ROLES
    assert supervisor.roles({"SPIFFE_ENDPOINT_SOCKET": "unix:///x"}) == (*supervisor.ROLES, "spired")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Desk:
    """A follower over a socket in `directory`, its file, and what it logged."""

    def __init__(self, directory: Path) -> None:
        from aether.daemons.spired import Follower

        self.socket, self.file = directory / "api.sock", directory / "bundles.json"
        self.log = structlog.testing.CapturingLogger()
        self.follower = Follower(workloadapi.channel(f"unix://{self.socket}"), self.file, self.log)

    def bundles(self) -> dict[str, Any] | None:
        return json.loads(self.file.read_text()) if self.file.exists() else None

    def said(self, text: str) -> bool:
        return any(text in f"{call.args} {call.kwargs}" for call in self.log.calls)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    pytest.importorskip("grpc", reason="the extra `spire` is not installed")
    found = Desk(tmp_path)
    try:
        yield found
    finally:
        found.follower.stop()


def test_the_stream_is_followed_through_rotation_and_the_agent_s_death(desk: Desk) -> None:
    desk.follower.start()
    until(lambda: desk.said("UNAVAILABLE"))  # no socket yet
    with mock.Agent(desk.socket) as agent:
        agent.tell({"example.org": mock.ders(ROOT)})
        until(lambda: desk.bundles() == {"example.org": ROOT.pem})
        agent.tell({"example.org": mock.ders(ROOT, OTHER)})
        until(lambda: desk.bundles() == {"example.org": ROOT.pem + OTHER.pem})
        assert desk.file.stat().st_mode & 0o777 == 0o640
    desk.socket.unlink(missing_ok=True)
    assert desk.bundles() == {"example.org": ROOT.pem + OTHER.pem}, "an agent that is away is no removal"
    with mock.Agent(desk.socket) as agent:
        agent.tell({"other.org": mock.ders(OTHER)})
        until(lambda: desk.bundles() == {"other.org": OTHER.pem})


def test_what_is_malformed_is_told_and_not_used(desk: Desk) -> None:
    with mock.Agent(desk.socket) as agent:
        agent.tell({"example.org": mock.ders(ROOT)})
        desk.follower.start()
        until(lambda: desk.bundles() == {"example.org": ROOT.pem})
        agent.send(b"\x12\xff")
        until(lambda: desk.said("malformed message"))
        assert desk.bundles() == {"example.org": ROOT.pem}
        agent.tell({"example.org": b"no certificate", "other.org": mock.ders(OTHER)})
        until(lambda: desk.bundles() == {"other.org": OTHER.pem})
        assert desk.said("a trust bundle is left out")


def test_permission_denied_ends_trust(desk: Desk) -> None:
    with mock.Agent(desk.socket) as agent:
        agent.tell({"example.org": mock.ders(ROOT)})
        desk.follower.start()
        until(lambda: desk.bundles() == {"example.org": ROOT.pem})
        agent.deny()
        until(lambda: desk.bundles() == {})
        assert desk.said("PERMISSION_DENIED")
        agent.tell({"example.org": mock.ders(ROOT)})
        until(lambda: desk.bundles() == {"example.org": ROOT.pem})
