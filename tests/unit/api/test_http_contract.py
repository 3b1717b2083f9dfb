"""The generated OpenAPI document holds against the running server: schemathesis finds nothing."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, settings
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from aether.api.openapi import document
from aether.api.operations import OPERATIONS
from aether.client.transport import UnixConnection
from aether.contract.errors import KINDS
from tests.unit.api.http_node import HttpNode

SCHEMA = schemathesis.openapi.from_dict(document())


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """JSON Schema takes 1945.0 for an integer; the API does not (an integer is written as one)."""
    return _whole(body)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


class _Connection(HTTPConnection):
    """urllib3's connection over a Unix socket."""

    path = ""

    def connect(self) -> None:
        import socket

        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(self.path)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class UnixAdapter(HTTPAdapter):
    """`requests` over one Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        connection = type("Connection", (_Connection,), {"path": path})
        self._pool = type("Pool", (_Pool,), {"ConnectionCls": connection})("localhost")

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> HTTPConnectionPool:
        return self._pool


@pytest.fixture
def session(node: HttpNode) -> requests.Session:
    found = requests.Session()
    found.mount("http://localhost", UnixAdapter(str(node.socket_path)))
    return found


def says_a_name_twice(body: Any) -> bool:
    """What no schema can forbid: two input files of one path, two credentials of one name."""
    files = _part(_part(body, "inputs"), "files")
    networks = (_part(body, "network"), _part(_part(body, "params"), "network"))
    lists = [(files, "path"), *((_part(network, "credentials"), "name") for network in networks)]
    return any(_repeats(items, name) for items, name in lists)


def _part(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _repeats(items: Any, name: str) -> bool:
    said = [item.get(name) for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return any(said.count(each) > 1 for each in said)


# `requests` cannot leave HTTP: what an upgrade answers is in test_http_attach.py.
@SCHEMA.exclude(operation_id="job.attach").parametrize()
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
def test_schemathesis(case: schemathesis.Case, session: requests.Session) -> None:
    assume(not says_a_name_twice(case.body))
    case.call_and_validate(session=session, base_url="http://localhost")


def test_document_lists_every_operation_and_code() -> None:
    text = document()
    spelled = {(path, method) for path, item in text["paths"].items() for method in item}
    for operation in OPERATIONS:
        for path in (operation.path, *operation.aliases):
            assert (path, operation.method.lower()) in spelled
            responses = text["paths"][path][operation.method.lower()]["responses"]
            assert {str(status) for status in operation.statuses} <= responses.keys()
            for code in operation.all_errors:
                status = KINDS[code].http if KINDS[code].http >= 400 else 500
                assert code in responses[str(status)]["description"]


def test_document_is_served(node: HttpNode) -> None:
    connection = UnixConnection(node.socket_path, 10)
    connection.request("GET", "/openapi.json")
    served = json.loads(connection.getresponse().read())
    assert served == json.loads(json.dumps(document()))
    connection.request("DELETE", "/openapi.json")
    response: http.client.HTTPResponse = connection.getresponse()
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    connection.close()
