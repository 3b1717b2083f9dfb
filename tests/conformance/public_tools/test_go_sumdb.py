"""A public reader of the same formats: golang.org/x/mod/sumdb, which checks Go's checksum database, reads our log.

It takes a Go toolchain (`go` on the path) and that library's source as Debian and Ubuntu package it
(`golang-golang-x-mod-dev`); skipped where one is absent.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from aether.substrate.audit.cosign import Cosigner
from tests.unit.substrate.audit.audit_kit import GOLDEN, PUBLIC_KEY, fill, open_log

SOURCES = Path(os.environ.get("GOCODE", "/usr/share/gocode"))
Check = Callable[[Path, str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    go = shutil.which("go")
    if go is None or not (SOURCES / "src/golang.org/x/mod/sumdb/tlog").is_dir():
        pytest.skip("no Go toolchain, or no golang.org/x/mod (apt-get install golang-go golang-golang-x-mod-dev)")
    folder = tmp_path_factory.mktemp("go")
    env = {
        **os.environ, "GOPATH": str(SOURCES), "GO111MODULE": "off", "GOCACHE": str(folder / "cache"), "GOFLAGS": "",
        "GOTOOLCHAIN": "local",
    }  # fmt: skip
    program = folder / "check"
    source = Path(__file__).with_name("main.go")
    subprocess.run([go, "build", "-o", program, source], check=True, env=env, timeout=300)

    def run(directory: Path, key: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, directory, key.strip()], capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_the_golden_log_is_read(check: Check) -> None:
    done = check(GOLDEN / "log", (GOLDEN / "audit.pub").read_text())
    assert done.returncode == 0 and "verified: 301 entries" in done.stdout, done.stdout + done.stderr


def test_a_cosigned_log_is_read_and_damage_seen(check: Check, tmp_path: Path) -> None:
    async def write() -> None:
        log = open_log(tmp_path)
        await fill(log, 700)
        log.close()

    asyncio.run(write())
    checkpoint = tmp_path / "checkpoint"
    note = checkpoint.read_text()
    witness = Cosigner("witness.example/w1", b"\x09" * 32)
    checkpoint.write_text(note + witness.line(note.partition("\n\n")[0] + "\n", 1_790_000_000))
    assert check(tmp_path, PUBLIC_KEY).returncode == 0  # it knows the log's key, and passes over the witness's line
    tile = tmp_path / "tile/entries/001"
    tile.write_bytes(tile.read_bytes().replace(b'"number":"300"', b'"number":"301"'))
    assert check(tmp_path, PUBLIC_KEY).returncode == 1
    checkpoint.write_text(note.replace("\n700\n", "\n699\n"))
    assert "not verified" in check(tmp_path, PUBLIC_KEY).stdout
