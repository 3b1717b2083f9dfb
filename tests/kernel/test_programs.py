"""Programs that must run in a cell under the whole profile: what people and agents bring, unchanged."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aether.spawner.linux import rootfs
from tests.support import cells
from tests.support.cells import Host

MODEL = Path(__file__).parents[2] / "packages"
MEMORY = [["nproc", 256, 256], ["core", 1, 1]]


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    yield from cells.readable_copy()


@pytest.fixture(params=cells.variants())
def host(request: pytest.FixtureRequest, directory: str) -> Host:
    return cells.open_host(*request.param, directory)


def reachable(path: str) -> bool:
    """Whether an ordinary user may go there: every directory above grants others search and reading."""
    places = [Path(path), *Path(path).parents]
    return all(place.stat().st_mode & 0o005 == 0o005 for place in places)


def venv(host: Host, code: str, steps: list[dict[str, str]] | None = None, roots: list[str] | None = None) -> Any:
    """Run by the interpreter of this test with its packages, shown where a job finds them; the printed JSON."""
    facts = rootfs.python_facts()
    if host.user and not all(reachable(source) for _, source in facts.prefixes):
        pytest.skip("this Python lies where ordinary users may not read")
    result = host.run(
        [facts.executable, "-I", "-c", code],
        prefixes=facts.prefixes,
        steps=steps or [],
        roots=roots or [],
        rlimits=MEMORY,
    )
    return result.json()


def shown(path: Path, at: str) -> tuple[list[dict[str, str]], list[str]]:
    return [{"op": "bind_ro", "path": at, "source": str(path)}], [str(path)]


@pytest.fixture
def open_directory(directory: str) -> Iterator[Path]:
    """A directory of the host that ordinary users may read."""
    place = Path(directory) / "given"
    place.mkdir(mode=0o755)
    yield place
    shutil.rmtree(place)


def test_asyncio_with_subprocesses_and_sockets(host: Host) -> None:
    code = """
import asyncio, json
async def main():
    async def echo(reader, writer):
        writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
    answers = []
    for server, opened in ((await asyncio.start_server(echo, '127.0.0.1', 0), None),
                           (await asyncio.start_unix_server(echo, '/work/s'), '/work/s')):
        address = server.sockets[0].getsockname()
        opening = asyncio.open_unix_connection(opened) if opened else asyncio.open_connection(*address)
        reader, writer = await opening
        writer.write(b'hello\\n'); await writer.drain()
        answers.append((await reader.read()).decode()); writer.close(); server.close()
    process = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1)
    answers.append((await process.communicate(b'cat'))[0].decode())
    answers.append(await asyncio.to_thread(lambda: 'thread'))
    return answers
print(json.dumps(asyncio.run(main())))"""
    assert host.run([cells.PYTHON, "-IS", "-c", code]).json() == ["HELLO\n", "HELLO\n", "cat", "thread"]


def test_sqlite_with_write_ahead_log_and_two_processes(host: Host) -> None:
    code = """
import json, multiprocessing, sqlite3
def fill(first):
    db = sqlite3.connect('/work/db', timeout=10)
    with db: db.executemany('insert into t values (?)', [(first + n,) for n in range(100)])
db = sqlite3.connect('/work/db'); mode = db.execute('pragma journal_mode=wal').fetchone()[0]
db.execute('create table t (x)'); db.commit()
workers = [multiprocessing.Process(target=fill, args=(1000 * n,)) for n in range(2)]
[w.start() for w in workers]; [w.join() for w in workers]
print(json.dumps([mode, db.execute('select count(*) from t').fetchone()[0]]))"""
    assert host.run([cells.PYTHON, "-IS", "-c", code]).json() == ["wal", 200]


def test_numpy_with_threads_and_memory_maps(host: Host) -> None:
    code = """
import json, numpy
a = numpy.arange(250000, dtype=numpy.float64).reshape(500, 500)
m = numpy.memmap('/work/m', dtype='f4', mode='w+', shape=(100,)); m[:] = 2; m.flush()
product = a @ numpy.eye(500)
print(json.dumps([float((product - a).sum()), float(numpy.linalg.det(numpy.eye(9))), float(m.sum())]))"""
    assert venv(host, code) == [0.0, 1.0, 200.0]


def test_onnxruntime_runs_a_model(host: Host, open_directory: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = next(iter(sorted(MODEL.rglob("*.onnx"))), None)
    if model is None:
        pytest.skip("no model package is in this checkout")
    shutil.copyfile(model, open_directory / "model.onnx")
    steps, roots = shown(open_directory, "/mnt/model")
    code = """
import json, numpy, onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 2
session = onnxruntime.InferenceSession('/mnt/model/model.onnx', options, providers=['CPUExecutionProvider'])
feed = {i.name: numpy.zeros([d if isinstance(d, int) else 1 for d in i.shape], 'f4') for i in session.get_inputs()}
print(json.dumps([bool(numpy.isfinite(o).all()) for o in session.run(None, feed)]))"""
    answers = venv(host, code, steps, roots)
    assert answers and all(answers)


def wheel(directory: Path) -> Path:
    """A wheel of one module, as PEP 427 has it."""
    path = directory / "tiny_thing-1.0-py3-none-any.whl"
    files = {
        "tiny_thing.py": "ANSWER = 42\n",
        "tiny_thing-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
        "tiny_thing-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=") for n, t in files.items()}
    rows = [f"{name},sha256={digests[name].decode()},{len(text)}" for name, text in files.items()]
    files["tiny_thing-1.0.dist-info/RECORD"] = "\n".join([*rows, "tiny_thing-1.0.dist-info/RECORD,,", ""])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    path.chmod(0o644)
    return path


def test_pip_installs_a_local_wheel(host: Host, open_directory: Path) -> None:
    pytest.importorskip("pip")
    wheel(open_directory)
    steps, roots = shown(open_directory, "/mnt/wheels")
    code = """
import json, os, subprocess, sys
pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-index', '--disable-pip-version-check', '--no-cache-dir']
pip += ['--find-links', '/mnt/wheels', '--target', '/work/site', 'tiny-thing']
done = subprocess.run(pip, capture_output=True, text=True)
sys.path.insert(0, '/work/site')
print(json.dumps([done.returncode, __import__('tiny_thing').ANSWER if not done.returncode else done.stderr[-500:]]))"""
    assert venv(host, code, steps, roots) == [0, 42]


def test_git_clones_commits_and_packs(host: Host) -> None:
    if not os.access("/usr/bin/git", os.X_OK):
        pytest.skip("git is not installed")
    script = """
set -e
git config --global user.name a; git config --global user.email a@b; git config --global init.defaultBranch main
git init -q /work/one; cd /work/one; echo hello > file; git add file; git commit -q -m first; git gc -q
git clone -q /work/one /work/two; cd /work/two; git log --format=%s; git grep -c hello"""
    result = host.run(["sh", "-c", script])
    assert result.of("Exited")["code"] == 0, result.out
    assert result.out.split() == ["first", "file:1"]


def test_node_with_workers_servers_and_children(host: Host) -> None:
    if not os.access("/usr/bin/node", os.X_OK):
        pytest.skip("node is not installed")
    program = """
const http = require('http'), os = require('os'), fs = require('fs');
const { Worker } = require('worker_threads'), { execFileSync } = require('child_process');
os.networkInterfaces(); fs.writeFileSync('/work/f', 'x');
const server = http.createServer((q, r) => r.end('served')).listen(0, '127.0.0.1', () =>
  http.get({ port: server.address().port, host: '127.0.0.1' }, r => r.on('data', d => {
    new Worker('require("worker_threads").parentPort.postMessage(7)', { eval: true }).on('message', m => {
      console.log(String(d), m, execFileSync('echo', ['child']).toString().trim()); process.exit(5); }); })));"""
    result = host.run(["node", "-e", program])
    assert result.of("Exited")["code"] == 5, result.out
    assert result.out.split() == ["served", "7", "child"]
