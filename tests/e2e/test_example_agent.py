"""The worked example of docs/example-agent.md, as it stands, against two servers on the loopback."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import sample
from tests.support import instance

PAGE = Path(__file__).parents[2] / "docs/example-agent.md"
AETHER = Path(sys.executable).with_name("aether")


class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"said by {self.server.server_address[0]!s}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with ExitStack() as stack:
        names = []
        for address in ("127.0.0.7", "127.0.0.8"):
            server = stack.enter_context(http.server.ThreadingHTTPServer((address, 0), Host))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            names.append(f"{address}:{server.server_address[1]}")
        yield names


def test_the_example_of_the_page(tmp_path: Path, hosts: list[str]) -> None:
    script = PAGE.read_text().partition("```sh\n")[2].partition("```")[0]
    observed = json.loads(sample.predict_request()[1])["inputs"]["history"]["obs"]
    (tmp_path / "observation.json").write_text(json.dumps({"obs": observed}))
    with instance.running() as layout, instance.client(layout) as client:
        if any(check["name"] == "netns" and not check["ok"] for check in client.doctor().checks):
            pytest.skip("this host gives cells no network namespace of their own")
        path = f"{AETHER.parent}:{os.environ['PATH']}"
        env = {**os.environ, "AETHER_STATE": str(layout.root), "PATH": path, "ONE": hosts[0], "TWO": hosts[1]}
        command = ["bash", "-eu", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env, cwd=tmp_path, check=False)
        assert done.returncode == 0, (done.stdout, done.stderr)
        for said in ("the model answered", "said by 127.0.0.7", "said by 127.0.0.8", "a helper ran"):
            assert said in done.stdout.split("\n"), (said, done.stdout, done.stderr)
        assert done.stdout.count("refused with 121") == 6, (done.stdout, done.stderr)
        assert "4 of 12 ops" in done.stdout and "0 of 1 USD" in done.stdout
        assert "twice" not in done.stdout and "again" not in done.stdout.split("\n")
        assert "1 jobs and 0 cells ended" in done.stdout
        for code, count in (("TICKET_DENIED", 4), ("BUDGET_EXHAUSTED", 1), ("TICKET_REVOKED", 1)):
            assert done.stderr.count(f"[{code}]") == count, (code, done.stderr)
        reached = [row for job in client.list().jobs for row in client.egress(job.job_id).connections]
        assert {f"{row.host}:{row.port}" for row in reached} == set(hosts)
