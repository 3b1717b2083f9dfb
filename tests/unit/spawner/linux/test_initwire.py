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
from aether.spawner.linux import initwire, native, program

FACTS = program.HostFacts("x86_64", 7, 40)
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


def sample_plan() -> cp.Plan:
    ids = cp.IdMap(0x7000_0000, 0x7000_0000, 65536)
    steps = (
        cp.BindRo("/usr", "/usr"),
        cp.Symlink("/bin", "usr/bin"),
        cp.File("/etc/passwd", "root:x:0:0::/:/bin/sh\n"),
        cp.Proc(),
        cp.DevMinimal(pty=True),
        cp.Mask(("/proc/kcore", "/proc/keys")),
        cp.Tmpfs("/tmp", 1 << 20, exec_allowed=False),
        cp.Dir("/run"),
    )
    rules = (cp.LandlockRule("/", ("read", "execute")), cp.LandlockRule("/tmp", ("write",)))
    limits = (cp.Rlimit("nofile", 64, 64),)
    return cp.Plan("c", "cell", cp.NAMESPACES, ids, "cell", steps, "cell", cp.Landlock(rules), limits)


def sample_messages() -> list[bytes]:
    lowered = program.lower(sample_plan(), ("/usr",), FACTS)
    spec = cp.ExecSpec(
        "e1", ("true", "a"), (("PATH", "/bin"),), "/", ("null", "fd", "fd"), 2, (cp.Rlimit("cpu", 1, 2),)
    )
    return [
        initwire.encode_launch(lowered, 5, 4, True, spec),
        initwire.encode_launch(lowered, 5, 0, False, None),
        initwire.encode_exec(spec),
        initwire.encode_signal("e1", 15),
    ]


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("cc") is None, reason="no C compiler")
def test_the_c_parser_stays_in_bounds(tmp_path: Path) -> None:
    """Mutated messages under ASan and UBSan; the seed is fixed, so a failure can be repeated."""
    source = native.BINARY.parent
    for name in (*source.glob("*.[ch]"), source / "Makefile"):
        shutil.copy(name, tmp_path)
    built = subprocess.run(["make", "-s", "-C", tmp_path, "build/fuzz"], capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    files = []
    for number, message in enumerate(sample_messages()):
        files.append(tmp_path / f"seed{number}")
        files[-1].write_bytes(message)
    run = [tmp_path / "build/fuzz", "20000", "7", *files]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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
