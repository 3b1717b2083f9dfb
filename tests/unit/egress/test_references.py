"""References to secrets: age files and Vault's KV version 2, read anew each time, and never told in an error."""

from __future__ import annotations

import http.server
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.errors import AetherError
from aether.contract.secrets import check_secrets, check_source, path_of
from aether.egress.references import References

TOKEN = "hvs.token-of-the-test"


def refused(sources: References, source: str) -> str:
    with pytest.raises(AetherError) as caught:
        sources.read("secret X", source)
    assert caught.value.code == "BAD_FIELD"
    return caught.value.message


def made(tmp_path: Path, **environment: str) -> References:
    (tmp_path / "state/secrets").mkdir(parents=True, exist_ok=True)
    return References(tmp_path / "state", tmp_path / "state/secrets", environment)


class Vault(http.server.BaseHTTPRequestHandler):
    """The one call of Vault's HTTP API that is used (KV secrets engine version 2, "Read secret version")."""

    secrets: dict[str, Any]

    def do_GET(self) -> None:
        value = self.secrets.get(self.path)
        if self.headers["X-Vault-Token"] != TOKEN:
            status, body = 403, b'{"errors":["permission denied"]}'
        elif value is None:
            status, body = 404, b'{"errors":[]}'
        else:
            status, body = 200, json.dumps({"data": {"data": value, "metadata": {"version": 1}}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "client"

    def log_message(self, *arguments: Any) -> None:
        pass


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture(params=["tcp", "unix"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    held: dict[str, Any] = {"/v1/secret/data/team/api": {"key": "value-1", "number": 5}}
    handler = type("Handler", (Vault,), {"secrets": held})
    if request.param == "unix":
        server: socketserver.BaseServer = UnixServer(str(tmp_path / "vault.sock"), handler)
        address = f"unix:{tmp_path}/vault.sock"
    else:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        address = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[index]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield address, held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_vault(vault: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    address, held = vault
    sources = made(tmp_path, AETHER_SECRET_VAULT_ADDR=address)
    (tmp_path / "state/secrets/vault-token").write_text(f"{TOKEN}\n")
    assert sources.read("secret X", "vault:secret/team/api#key") == b"value-1"
    held["/v1/secret/data/team/api"]["key"] = "value-2"
    assert sources.read("secret X", "vault:secret/team/api#key") == b"value-2", "the next use reads the new value"
    assert "no field" in refused(sources, "vault:secret/team/api#none")
    assert "no text" in refused(sources, "vault:secret/team/api#number")
    assert "answered 404" in refused(sources, "vault:secret/other#key")
    (tmp_path / "state/secrets/vault-token").write_text("wrong-token")
    message = refused(sources, "vault:secret/team/api#key")
    assert "answered 403" in message and "wrong-token" not in message


def test_a_vault_that_is_not_there_or_not_fit_to_talk_to(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    made(tmp_path)
    (tmp_path / "state/secrets/vault-token").write_text(TOKEN)
    for address in (gone, f"unix:{tmp_path}/none", "http://vault.example.org:8200", "", "ftp://x"):
        message = refused(made(tmp_path, AETHER_SECRET_VAULT_ADDR=address), "vault:secret/a#b")
        assert TOKEN not in message


def test_age_files(tmp_path: Path) -> None:
    pyrage = pytest.importorskip("pyrage", reason="the extra `age` is not installed")
    sources, identity = made(tmp_path), pyrage.x25519.Identity.generate()
    sealed = tmp_path / "key.age"
    sealed.write_bytes(pyrage.encrypt(b"value-1\n", [identity.to_public()]))
    assert "age-identity" in refused(sources, f"age:{sealed}")
    (tmp_path / "state/secrets/age-identity").write_text(f"# made for the test\n{identity}\n")
    assert sources.read("secret X", f"age:{sealed}") == b"value-1"
    sealed.write_bytes(pyrage.encrypt(b"value-2", [identity.to_public()]))
    assert sources.read("secret X", f"age:{sealed}") == b"value-2"
    sealed.write_bytes(pyrage.encrypt(b"value-3", [pyrage.x25519.Identity.generate().to_public()]))
    message = refused(sources, f"age:{sealed}")
    assert "cannot be decrypted" in message and str(identity) not in message
    sealed.write_bytes(b"no age file")
    refused(sources, f"age:{sealed}")


@given(st.text(max_size=60) | st.from_regex(r"(file|age|env|vault):[ -~]{0,40}", fullmatch=True))
def test_hostile_references_are_one_of_four_kinds_or_refused(text: str) -> None:
    try:
        check_source("secret X", text)
    except AetherError as error:
        assert error.code == "BAD_FIELD"
        return
    assert text.partition(":")[0] in ("file", "age", "env", "vault") and ".." not in text.split("/")
    path = path_of(text)
    assert path is None or path.startswith("/")


def test_names_of_variables() -> None:
    check_secrets({"KEY": "file:/etc/key"}, {"OTHER": "x"})
    for secrets, env in (
        ({"a b": "file:/k"}, {}), ({"": "file:/k"}, {}), ({"K=V": "file:/k"}, {}), ({"K": "file:/k"}, {"K": "x"}),
        ({"K": "/k"}, {}), ({"K": "env:HOME"}, {}), ({"K": "vault:a#b"}, {}), ({"K": "vault:a/../b#c"}, {}),
        ({f"K{n}": "file:/k" for n in range(17)}, {}),
    ):  # fmt: skip
        with pytest.raises(AetherError, match="BAD_FIELD"):
            check_secrets(secrets, env)
