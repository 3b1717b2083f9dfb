"""The codec both ways, and the C parser on the same messages and on broken ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract import cellplan as cp
from aether.spawner.linux import initwire, native
from tests.support import nativebuild

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=40)
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
NAMES = st.from_regex(r"[A-Z_][A-Z0-9_]{0,20}", fullmatch=True)
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
STDIO = st.tuples(*[st.sampled_from(cp.STDIO_KINDS)] * 3)
SPECS = st.builds(
    cp.ExecSpec,
    exec_id=IDS,
    argv=st.lists(TEXT, min_size=1, max_size=5).map(tuple),
    env=st.dictionaries(NAMES, TEXT, max_size=4).map(lambda d: tuple(d.items())),
    cwd=TEXT.map(lambda t: "/" + t),
    stdio=STDIO,
    extra_fds=st.integers(0, 16),
    rlimits=st.lists(st.builds(cp.Rlimit, st.sampled_from(cp.RLIMIT_NAMES), U64, U64), max_size=3).map(tuple),
    tty=st.booleans(),
)


@given(SPECS)
def test_exec_travels_unchanged(spec: cp.ExecSpec) -> None:
    assert initwire.decode_request(initwire.encode_exec(spec)) == spec


@given(IDS, st.integers(0, 64))
def test_signal_travels_unchanged(exec_id: str, signo: int) -> None:
    assert initwire.decode_request(initwire.encode_signal(exec_id, signo)) == initwire.Signal(exec_id, signo)


@given(IDS, U32, st.lists(st.integers(0, 1), min_size=6, max_size=6), st.lists(U64, min_size=4, max_size=4))
def test_started_travels_unchanged(exec_id: str, pid: int, facts: list[int], caps: list[int]) -> None:
    rows = [*(c & 0xFFFFFFFF for c in caps[:3]), *(c >> 32 for c in caps[:3])]
    event = initwire.decode_event(initwire.encode_started(exec_id, pid, [*facts, *rows, caps[3]]))
    assert isinstance(event, initwire.Started)
    assert (event.exec_id, event.pid) == (exec_id, pid)
    enforced = event.enforced
    got = [enforced.cap_effective, enforced.cap_permitted, enforced.cap_inheritable, enforced.cap_bounding]
    assert got == caps
    assert event.enforced.no_new_privs == (facts[3] == 1)


@given(IDS, st.integers(-64, 255), st.tuples(U64, U64, U64))
def test_exited_tells_code_and_signal_apart(exec_id: str, code: int, usage: tuple[int, int, int]) -> None:
    event = initwire.decode_event(initwire.encode_exited(exec_id, code, usage))
    expected = (None, -code) if code < 0 else (code, None)
    assert isinstance(event, initwire.Exited)
    assert (event.code, event.signal) == expected
    assert (event.utime_us, event.stime_us, event.maxrss_kb) == usage


@given(st.binary(max_size=300))
def test_any_bytes_are_an_event_or_refused(data: bytes) -> None:
    for decode in (initwire.decode_event, initwire.decode_request, initwire.decode_launched):
        with contextlib.suppress(initwire.WireError):
            decode(data)


@given(SPECS, st.data())
def test_a_shortened_message_is_refused(spec: cp.ExecSpec, data: st.DataObject) -> None:
    whole = initwire.encode_exec(spec)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(initwire.WireError):
        initwire.decode_request(whole[:cut])


def test_the_end_of_the_socket_is_none() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        initwire.send(theirs, initwire.encode_step_failed(3, 2))
        theirs.close()
        assert initwire.receive(ours) == initwire.StepFailed(3, "plan", 2)
        assert initwire.receive(ours) is None


def fuzz(command: list[Path | str], rounds: int, directory: Path) -> None:
    """The seed is fixed, so a failure can be repeated."""
    run: list[Path | str] = [*command, str(rounds), "7", *nativebuild.write_seeds(directory / "seeds")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_c_parser_stays_in_bounds(tmp_path: Path) -> None:
    """Mutated messages under ASan and UBSan."""
    fuzz([nativebuild.make("build/fuzz", tmp_path)], 20_000, tmp_path)


def test_the_c_parser_under_libfuzzer(tmp_path: Path) -> None:
    harness = nativebuild.make("build/libfuzzer", tmp_path, "CLANG=clang")
    nativebuild.write_seeds(tmp_path / "seeds")
    run = [harness, "-runs=100000", "-seed=7", "-max_len=8192", tmp_path / "seeds"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_init_compiles_for_aarch64(tmp_path: Path) -> None:
    assert nativebuild.make("build/aarch64-init", tmp_path, "CROSS=aarch64-linux-gnu-gcc").exists()


def test_the_c_parser_on_aarch64(tmp_path: Path) -> None:
    harness = nativebuild.make("build/aarch64-fuzz", tmp_path, "CROSS=aarch64-linux-gnu-gcc")
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed: apt-get install qemu-user")
    fuzz(["qemu-aarch64", harness], 2_000, tmp_path)


@pytest.mark.skipif(not os.access(native.BINARY, os.X_OK), reason="aether-init is not built")
@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_the_launcher_refuses_other_bytes_and_lives(data: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(10)
        child = subprocess.Popen([native.BINARY, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        for _ in range(2):
            ours.send(data)
            pid, phase, _code = initwire.decode_launched(ours.recv(4096))
            assert (pid, initwire.phase_of(phase)) == (-1, (None, "program"))
    assert child.wait(10) == 0
