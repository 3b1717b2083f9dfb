"""One suite for both executors, as root and as an ordinary user: a plan becomes a cell that keeps its promises."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aether.contract.cellplan import NAMESPACES, IdMap, Plan
from aether.spawner.linux import initwire, native, rootfs
from aether.spawner.linux.cgroup_host import locate
from aether.spawner.linux.executor import Attach
from tests.support import cells
from tests.support.cells import Host
from tests.support.machine import SLOW

SLEEP = ["sleep", "30"]


@pytest.fixture(scope="module")
def directory() -> Iterator[str]:
    yield from cells.readable_copy()


@pytest.fixture(params=cells.variants())
def host(request: pytest.FixtureRequest, directory: str) -> Host:
    return cells.open_host(*request.param, directory)


def alive(pid: int) -> bool:
    """Not gone and not a zombie that waits for the machine's init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def test_exit_code_output_and_usage(host: Host) -> None:
    result = host.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    ended = result.of("Exited")
    assert (ended["code"], ended["signal"]) == (7, None)
    assert sorted(result.out.split()) == ["err", "out"]
    assert ended["maxrss_kb"] > 100
    assert not alive(result.pid)


def test_what_the_kernel_enforced_is_reported(host: Host) -> None:
    result = host.run(["true"])
    facts = result.of("Started")["enforced"]
    assert facts["no_new_privs"]
    assert facts["seccomp_mode"] == 2
    assert (facts["uid"], facts["gid"]) == (1000, 1000)
    capabilities = [facts[f"cap_{s}"] for s in ("effective", "permitted", "inheritable", "bounding")]
    assert capabilities == [0, 0, 0, 0]
    ready = result.of("Ready")
    assert all(ready["namespaces"][k] not in (0, result.host_ns[k]) for k in result.host_ns)
    assert (ready["landlock_abi"] > 0) == ("landlock" not in cells.missing())
    assert 0 < ready["setup_us"] < 5_000_000


def test_death_by_signal_is_told_apart_from_exit(host: Host) -> None:
    ended = host.run(["sh", "-c", "kill -SEGV $$"]).of("Exited")
    assert (ended["code"], ended["signal"]) == (None, signal.SIGSEGV)


def test_what_the_starter_ignores_a_job_can_catch(host: Host) -> None:
    """A shell cannot trap what was ignored when it began (sh(1posix), trap): `nohup aether up` does that to SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = host.run(["sh", "-c", "trap 'exit 7' HUP; kill -HUP $$; exit 1"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.of("Exited")["code"] == 7


def test_signal_reaches_the_whole_process_group(host: Host) -> None:
    script = "sleep 30 & trap 'kill $!; echo told; exit 3' TERM; echo up; wait"
    actions = [["sleep", 0.3], ["signal", "first", int(signal.SIGTERM)], ["wait", "first"]]
    result = host.run(["sh", "-c", script], actions=actions)
    assert result.of("Exited")["code"] == 3
    assert "told" in result.out


def test_more_executables_one_after_the_other_and_at_once(host: Host) -> None:
    actions = [
        ["exec", "second", ["sh", "-c", "echo second > /work/file"]],
        ["wait", "second"],
        ["exec", "third", ["cat", "/work/file"]],
        ["wait", "third"],
        ["signal", "first", int(signal.SIGKILL)],
        ["wait", "first"],
    ]
    result = host.run(SLEEP, actions=actions)
    assert "second" in result.out
    assert result.of("Exited", "third")["code"] == 0
    assert result.of("Exited", "first")["signal"] == signal.SIGKILL


@pytest.mark.parametrize(
    ("argv", "step", "code"),
    [
        (["/usr/bin/absent"], "exec", errno.ENOENT),
        (["absent"], "exec", errno.ENOENT),
        (["/etc/passwd"], "exec", errno.EACCES),
    ],
)
def test_a_program_that_cannot_run_is_named(host: Host, argv: list[str], step: str, code: int) -> None:
    result = host.run(argv)
    failed = result.of("ExecFailed")
    assert (failed["step"], failed["errno"]) == (step, code)
    assert not [e for e in result.events if e["kind"] in ("Started", "Exited")]


def test_missing_working_directory(host: Host) -> None:
    failed = host.run(["true"], cwd="/absent").of("ExecFailed")
    assert (failed["step"], failed["errno"]) == ("cwd", errno.ENOENT)


def test_a_failed_step_is_named_with_a_remedy(host: Host) -> None:
    steps = [{"op": "bind_ro", "path": "/data", "source": "/usr/absent"}]
    result = host.run(["true"], steps=steps, actions=[])
    failed = result.of("StepFailed")
    assert failed["errno"] == errno.ENOENT
    assert "show host /usr/absent at /data" in failed["why"]
    assert failed["remedy"]


def test_closing_the_socket_ends_everything(host: Host) -> None:
    result = host.run(["sh", "-c", "setsid sleep 30 & sleep 30"], actions=[["sleep", 0.2], ["close"]])
    assert wait_gone(result.pid)


def test_killing_pid_1_ends_everything(host: Host) -> None:
    result = host.run(["sh", "-c", "setsid sleep 30 & sleep 30"], actions=[["sleep", 0.2], ["kill"]])
    assert not [e for e in result.events if e["kind"] == "Exited"]
    assert wait_gone(result.pid)


def test_the_cell_dies_with_its_spawner(host: Host) -> None:
    answer = host.request(SLEEP, actions=[["die"]])
    assert wait_gone(answer["pid"])


def test_pid_1_stays_until_told_and_reaps_orphans(host: Host) -> None:
    script = "(setsid sh -c 'sleep 0.1' &) ; exit 0"
    look = "import os; print([p for p in os.listdir('/proc') if p.isdigit() and open(f'/proc/{p}/stat').read()"
    look += ".split(') ')[1][0] == 'Z'])"
    actions = [["wait", "first"], ["sleep", 0.4], ["exec", "look", [cells.PYTHON, "-IS", "-c", look]], ["wait", "look"]]
    result = host.run(["sh", "-c", script], actions=actions)
    assert result.out.strip() == "[]"


def test_descriptors_are_exactly_those_passed(host: Host) -> None:
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))); print(os.read(3, 9), os.read(4, 9))"
    result = host.python(code, extra=["three", "four"])
    lines = result.out.splitlines()
    assert lines[0] == "[0, 1, 2, 3, 4, 5]"  # 5 is the listing itself
    assert lines[1] == "b'three' b'four'"


def test_limits_hold_and_only_narrow(host: Host) -> None:
    huge = (1 << 64) - 1
    limits = [["nofile", 64, 64], ["core", 0, 0], ["fsize", 4096, 4096], ["nproc", huge, huge]]
    code = "import os, resource as r; print(r.getrlimit(r.RLIMIT_NOFILE), r.getrlimit(r.RLIMIT_CORE)); "
    code += "print(os.write(os.open('/work/big', os.O_CREAT | os.O_WRONLY), bytes(5000)))"
    result = host.python(code, rlimits=limits, exec_rlimits=[["nofile", 32, 32]])
    assert result.out.splitlines() == ["(32, 32) (0, 0)", "4096"]


@pytest.fixture
def cgroups() -> Iterator[dict[str, Path]]:
    """A directory of our own beneath our own cgroup, in the v2 hierarchy and in that of v1 pids."""
    own = locate(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    found = {"v2": own.v2, "v1": own.v1.get("pids")}
    made = {kind: Path(path) / f"aether-test-{os.getpid()}" for kind, path in found.items() if path is not None}
    try:
        for path in made.values():
            path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup is lent to this process: {error.strerror}")
    yield made
    for path in made.values():
        path.rmdir()


def test_pid_1_attaches_before_its_cgroup_namespace(host: Host, cgroups: dict[str, Path]) -> None:
    if host.user and os.geteuid() == 0:
        pytest.skip("the cgroups belong to root")
    if "v2" not in cgroups:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    zero = [str(cgroups["v1"] / "tasks")] if "v1" in cgroups else []
    reads = [["read", str(path / "cgroup.procs")] for path in cgroups.values()]
    actions = [["sleep", 0.1], *reads, ["wait", "first"]]
    script = f"sleep {0.2 * SLOW}; grep -E '^0:|pids' /proc/self/cgroup"
    result = host.run(["sh", "-c", script], write_zero=zero, cgroup2=str(cgroups["v2"]), actions=actions)
    members = [e["text"].split() for e in result.events if e["kind"] == "Read"]
    assert all(str(result.pid) in pids and len(pids) >= 2 for pids in members)
    assert {line.rpartition(":")[2] for line in result.out.split()} == {"/"}


def test_the_native_launcher_is_replaced_when_it_dies() -> None:
    if not os.access(native.BINARY, os.X_OK):
        pytest.skip("aether-init is not built")
    if "cell" in cells.missing():
        pytest.skip(cells.missing()["cell"]["reason"])
    facts = rootfs.gather_root_facts()
    ids = IdMap(0x7A00_0000, 0x7A00_0000, 65536) if os.geteuid() == 0 else IdMap(os.geteuid(), os.getegid(), 1, 1000)
    plan = Plan("c", "cell", NAMESPACES, ids, "cell", rootfs.default_root_steps(facts), "cell", None)
    executor = native.NativeExecutor(rootfs.source_roots(facts))
    for _ in range(2):
        cell = executor.launch(plan, Attach())
        cell.control.setblocking(True)
        assert isinstance(initwire.receive(cell.control), initwire.Ready)
        (launcher,) = executor.pids()
        os.kill(launcher, signal.SIGKILL)
        initwire.send_shutdown(cell.control)  # the cell outlives the launcher
        assert initwire.receive(cell.control) is None
        os.waitid(os.P_PIDFD, cell.pidfd, os.WEXITED)
        os.close(cell.pidfd)
        cell.control.close()
    executor.close()
    assert executor.pids() == frozenset()


def test_the_process_level_confines_without_namespaces(host: Host) -> None:
    if "landlock" in cells.missing():
        pytest.skip("this kernel has no Landlock")
    code = """
import os, socket, json
def told(f):
    try: f()
    except OSError as e: return e.errno
    return 0
print(json.dumps([told(lambda: open('/usr/aether-probe', 'w')), told(lambda: socket.socket(socket.AF_INET)),
    told(lambda: os.listdir('/var/log')), told(lambda: os.kill(os.getppid(), 0)),
    told(socket.socketpair)]))
"""
    result = host.python(code, level="process")
    facts = result.of("Started")["enforced"]
    assert facts["seccomp_mode"] == 2
    write, inet, listing, outside, pair = result.json()
    assert write == (errno.EROFS if os.statvfs("/usr").f_flag & os.ST_RDONLY else errno.EACCES)
    assert inet == errno.EAFNOSUPPORT
    assert listing == errno.EACCES
    assert pair == 0
    assert outside == errno.EPERM or cells.abi() < 6  # PID 1 is outside the domain of its executables


def test_the_process_level_starts_where_clone3_is_filtered(host: Host) -> None:
    if "landlock" in cells.missing():
        pytest.skip("this kernel has no Landlock")
    result = host.run(["echo", "here"], level="process", no_clone3=True)
    assert result.out == "here\n" and result.of("Exited", "first")["code"] == 0


def test_the_process_level_leaves_no_process(host: Host) -> None:
    if "landlock" in cells.missing():
        pytest.skip("this kernel has no Landlock")
    result = host.run(["sleep", "33.25"], level="process", actions=[["sleep", 0.1], ["shutdown"]])
    assert wait_gone(result.pid)
    time.sleep(0.05)
    left = [p for p in Path("/proc").iterdir() if p.name.isdigit() and b"33.25" in command(p) and alive(int(p.name))]
    assert left == []


def command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
