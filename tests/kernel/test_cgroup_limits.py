"""Every limit where the kernel is asked to hold it: what it takes, what a process then sees, how it nests."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aether.spawner.linux.cgroup import CgroupDriver, CgroupHandle
from aether.spawner.linux.cgroup_host import open_driver
from aether.spawner.linux.cgroup_limits import IO_LIMITS, CgroupLimits, parse_list, show_list
from tests.support.cgroups import join, remove, until
from tests.support.machine import cgroups

MIB = 1 << 20


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[CgroupDriver]:
    instance = os.urandom(4).hex()
    opened = open_driver(instance, disk_of=str(tmp_path))
    if opened.kind == "none":
        pytest.skip(f"no cgroup is lent to this process: {opened.probe()['missing']['memory_bytes']}")
    yield opened
    opened.sweep(instance)
    opened.close()
    assert cgroups(f"aether-{instance}") == []


@pytest.fixture
def need(driver: CgroupDriver) -> Callable[..., None]:
    def check(*limits: str) -> None:
        for limit in limits:
            reason = driver.probe()["missing"].get(limit)
            if reason:
                pytest.skip(f"{limit}: {reason}")

    return check


def end(driver: CgroupDriver, handle: CgroupHandle, *processes: object) -> None:
    driver.kill(handle)
    for process in processes:
        process.wait(10)  # type: ignore[attr-defined]
        process.stdout.close()  # type: ignore[attr-defined]
    remove(driver, handle)


def test_what_this_host_lacks_has_a_reason(driver: CgroupDriver) -> None:
    missing = driver.probe()["missing"]
    assert all(isinstance(reason, str) and len(reason) > 10 for reason in missing.values()), missing
    everything = CgroupLimits(
        memory_bytes=256 * MIB, memory_min_bytes=MIB, memory_low_bytes=2 * MIB, memory_high_bytes=200 * MIB,
        swap_bytes=0, cpu_millis=500, cpu_weight=50, cpuset_cpus="0", cpuset_mems="0", pids=50, io_weight=50,
        io_read_bps=MIB, io_write_bps=MIB, io_read_iops=100, io_write_iops=100,
    )  # fmt: skip
    handle = driver.create("all", everything)
    missing = driver.probe()["missing"]
    assert set(handle.enforced) | set(missing) >= set(everything.asked())
    assert not set(handle.enforced) & set(missing)
    remove(driver, handle)


def test_a_cpuset_is_what_the_process_may_run_on(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("cpuset_cpus")
    mine = sorted(os.sched_getaffinity(0))
    handle = driver.create("set", CgroupLimits(cpuset_cpus=str(mine[-1])))
    process = join(handle, "print(sorted(os.sched_getaffinity(0)), flush=True); input()")
    assert process.stdout is not None and process.stdout.readline().decode() == f"[{mine[-1]}]\n"
    end(driver, handle, process)


def test_a_cpuset_moves_the_living(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("cpuset_cpus")
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("needs two CPUs")
    handle = driver.create("late", CgroupLimits())
    process = join(handle, "print('up', flush=True); import time; time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    for cpus in ([mine[0]], mine[:2]):
        driver.set_limits(handle, CgroupLimits(cpuset_cpus=show_list(frozenset(cpus))))
        until(lambda cpus=cpus: sorted(os.sched_getaffinity(process.pid)) == cpus)  # type: ignore[misc]
    with pytest.raises(OSError, match="there is") as refused:
        driver.set_limits(handle, CgroupLimits(cpuset_cpus="8000"))
    assert refused.value.errno == errno.EINVAL
    assert sorted(os.sched_getaffinity(process.pid)) == mine[:2]
    end(driver, handle, process)


def test_memory_high_slows_down_and_max_kills(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("memory_high_bytes")
    handle = driver.create("high", CgroupLimits(memory_high_bytes=24 * MIB, memory_bytes=256 * MIB, swap_bytes=0))
    process = join(handle, "x = bytearray(40 << 20); print('alive', flush=True); import time; time.sleep(60)")
    until(lambda: driver.usage(handle).memory_events.get("high", 0) > 0)
    assert process.poll() is None
    pressure = driver.usage(handle, pressure=True).pressure
    assert pressure.get("memory", {}).get("some_us", 1) > 0
    end(driver, handle, process)


def test_memory_low_and_min_are_written(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("memory_low_bytes")
    handle = driver.create("low", CgroupLimits(memory_low_bytes=8 * MIB, memory_min_bytes=4 * MIB))
    assert "memory_low_bytes" in handle.enforced
    assert ("memory_min_bytes" in handle.enforced) == (driver.kind == "v2")
    remove(driver, handle)


def test_memory_is_resized_up_and_down_but_never_below_what_is_used(
    driver: CgroupDriver, need: Callable[..., None]
) -> None:
    need("memory_bytes")
    handle = driver.create("size", CgroupLimits(memory_bytes=128 * MIB, swap_bytes=0))
    process = join(handle, "x = b'x' * (60 << 20); print('up', flush=True); input()\n")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    driver.set_limits(handle, CgroupLimits(memory_bytes=512 * MIB))
    driver.set_limits(handle, CgroupLimits(memory_bytes=100 * MIB))
    assert handle.limits.memory_bytes == 100 * MIB
    with pytest.raises(OSError, match="memory_bytes") as refused:
        driver.set_limits(handle, CgroupLimits(memory_bytes=32 * MIB, pids=20))
    assert refused.value.errno == errno.EBUSY
    assert process.poll() is None and (driver.usage(handle).oom_kills or 0) == 0
    assert handle.limits == CgroupLimits(memory_bytes=100 * MIB, swap_bytes=0)
    assert driver.mend(handle, (process.pid,)) == ()  # what the kernel has is what we believe
    end(driver, handle, process)


def test_cpu_is_resized_live(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("cpu_millis")
    handle = driver.create("cpu", CgroupLimits(cpu_millis=100))
    process = join(handle, "while True: pass\n")
    rates = []
    for millis in (100, 600):
        driver.set_limits(handle, CgroupLimits(cpu_millis=millis))
        time.sleep(0.3)
        before, started = driver.usage(handle).cpu_user_us or 0, time.monotonic()
        time.sleep(1.0)
        rates.append(((driver.usage(handle).cpu_user_us or 0) - before) / (time.monotonic() - started) / 1e6)
    assert rates[0] < 0.25 and rates[1] > 1.5 * rates[0], rates
    usage = driver.usage(handle)
    assert (usage.throttled_count or 0) > 0 and (usage.throttled_us or 0) > 0
    end(driver, handle, process)


def test_weights_share_one_cpu(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("cpu_weight", "cpuset_cpus")
    cpu = str(max(os.sched_getaffinity(0)))
    heavy, light = (
        driver.create(name, CgroupLimits(cpu_weight=weight, cpuset_cpus=cpu))
        for name, weight in (("heavy", 900), ("light", 100))
    )
    busy = "print('up', flush=True)\nwhile True: pass\n"
    processes = [join(handle, busy) for handle in (heavy, light)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
    before = [driver.usage(handle).cpu_user_us or 0 for handle in (heavy, light)]
    time.sleep(2.0)
    after = [driver.usage(handle).cpu_user_us or 0 for handle in (heavy, light)]
    used = [late - early for early, late in zip(before, after, strict=True)]
    assert used[0] > 3 * used[1], used
    end(driver, heavy, processes[0])
    end(driver, light, processes[1])


def test_writes_to_the_disk_are_slowed_down(driver: CgroupDriver, need: Callable[..., None], tmp_path: Path) -> None:
    need(*IO_LIMITS)
    handle = driver.create("io", CgroupLimits(io_write_bps=4 * MIB))
    code = f"""
import mmap, time
fd = os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
block = mmap.mmap(-1, 1 << 20)
started = time.monotonic()
for _ in range(6): os.write(fd, block)
print(time.monotonic() - started, flush=True)
"""
    process = join(handle, code)
    assert process.stdout is not None
    took_s = float(process.stdout.readline())
    assert took_s > 0.9, took_s
    end(driver, handle, process)


def test_children_live_within_their_parent(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("memory_bytes", "pids")
    parent = driver.create("a", CgroupLimits(memory_bytes=64 * MIB, swap_bytes=0, pids=8), nestable=True)
    child = driver.create("b", CgroupLimits(pids=4), parent=parent, nestable=True)
    inner = driver.create("c", CgroupLimits(), parent=child)
    assert inner.name == "a/b/c" and inner.bounds().pids == 4 and inner.bounds().memory_bytes == 64 * MIB
    for limits, where in ((CgroupLimits(pids=9), parent), (CgroupLimits(pids=5), child)):
        with pytest.raises(OSError, match="above"):
            driver.create("d", limits, parent=where)
    with pytest.raises(OSError, match="cell b within has more"):
        driver.set_limits(parent, CgroupLimits(pids=3))
    with pytest.raises(OSError, match="above"):
        driver.set_limits(child, CgroupLimits(pids=9))
    hog = join(inner, "x = bytearray(200 << 20)\n")
    assert hog.wait(30) == -signal.SIGKILL
    hog.communicate()
    assert (driver.usage(parent).oom_kills or 0) >= 1
    forks = "n = 0\ntry:\n  while n < 20:\n    if os.fork() == 0: signal.pause()\n    n += 1\nexcept OSError: pass\n"
    bomb = join(inner, f"import signal\n{forks}print(n, flush=True); signal.pause()\n")
    assert bomb.stdout is not None and int(bomb.stdout.readline()) == 3
    outer = join(parent, "print('up', flush=True); import signal; signal.pause()\n")
    assert outer.stdout is not None and outer.stdout.readline() == b"up\n"
    assert len(driver.procs(parent)) == 5 and len(driver.procs(child)) == 4 and len(driver.procs(inner)) == 4
    assert not driver.remove(parent)
    driver.kill(child)
    bomb.wait(10)
    bomb.communicate()
    assert outer.poll() is None
    remove(driver, inner)
    remove(driver, child)
    assert parent.children == []
    end(driver, parent, outer)


def test_freezing_a_parent_stops_its_children(driver: CgroupDriver) -> None:
    parent = driver.create("a", CgroupLimits(), nestable=True)
    child = driver.create("b", CgroupLimits(), parent=parent)
    process = join(child, "print('up', flush=True)\nwhile True: pass\n")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    driver.freeze(parent, True)
    time.sleep(0.2)
    before = driver.usage(child).cpu_user_us
    time.sleep(0.3)
    assert driver.usage(child).cpu_user_us == before
    driver.freeze(parent, False)
    until(lambda: (driver.usage(child).cpu_user_us or 0) > (before or 0))
    driver.freeze(parent, True)
    driver.kill(parent)
    if driver.kind == "v1" and child.v2_fd is None:
        driver.freeze(parent, False)
    process.wait(10)
    process.communicate()
    remove(driver, child)
    remove(driver, parent)


def test_a_cpuset_narrows_and_widens_those_below(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("cpuset_cpus")
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("needs two CPUs")
    parent = driver.create("a", CgroupLimits(), nestable=True)
    child = driver.create("b", CgroupLimits(), parent=parent)
    process = join(child, "print('up', flush=True); import signal; signal.pause()\n")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    for cpus in ([mine[1]], mine[:2]):
        driver.set_limits(parent, CgroupLimits(cpuset_cpus=show_list(frozenset(cpus))))
        until(lambda cpus=cpus: sorted(os.sched_getaffinity(process.pid)) == cpus)  # type: ignore[misc]
    driver.set_limits(child, CgroupLimits(cpuset_cpus=str(mine[0])))
    with pytest.raises(OSError, match="not within"):
        driver.set_limits(parent, CgroupLimits(cpuset_cpus=str(mine[1])))
    driver.kill(child)
    process.wait(10)
    process.communicate()
    remove(driver, child)
    remove(driver, parent)


def test_what_somebody_else_changed_is_put_back(driver: CgroupDriver, need: Callable[..., None]) -> None:
    need("pids", "cpu_millis")
    handle = driver.create("mine", CgroupLimits(pids=20, cpu_millis=700))
    process = join(handle, "print('up', flush=True); import time; time.sleep(60)\n")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert driver.mend(handle, (process.pid,)) == ()
    directories = [path for path in Path("/sys/fs/cgroup").glob("**/aether-*/mine") if owns(path, process.pid)]
    assert directories
    for path in directories:
        if (path / "pids.max").exists():
            (path / "pids.max").write_text("max")
    assert driver.mend(handle, (process.pid,)) == ("pids was changed to max",)
    for path in directories:
        (path.parent / "cgroup.procs").write_text(str(process.pid)) if driver.kind == "v1" else None
        if driver.kind == "v2":
            top = Path("/sys/fs/cgroup/cgroup.procs")
            top.write_text(str(process.pid))
        path.rmdir()
    found = driver.mend(handle, (process.pid,))
    assert "the directory mine was removed" in found and "1 processes were taken out" in found
    assert driver.procs(handle) == (process.pid,)
    assert all(owns(path, process.pid) for path in directories)
    assert any((path / "pids.max").exists() and (path / "pids.max").read_text() == "20\n" for path in directories)
    assert driver.mend(handle, (process.pid,)) == ()
    end(driver, handle, process)


def owns(directory: Path, pid: int) -> bool:
    return str(pid) in (directory / "cgroup.procs").read_text().split()


def test_a_disk_is_the_whole_one(tmp_path: Path) -> None:
    from aether.spawner.linux.blockdev import disk_under

    try:
        disk = disk_under(str(tmp_path))
    except OSError as error:
        assert error.strerror
        return
    assert not (Path(disk.directory) / "partition").exists()
    assert (Path("/sys/block") / disk.name.replace("/", "!")).exists()
    with pytest.raises(OSError, match="no disk"):
        disk_under("/proc")
    assert parse_list(show_list(frozenset({0, 1, 2, 5}))) == {0, 1, 2, 5}
