"""The cgroup drivers on a fake tree: which files get which values, what is read back, what is said to be missing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.spawner.linux import cgroup_v1, cgroup_v2
from aether.spawner.linux.blockdev import Disk, disk_under
from aether.spawner.linux.cgroup import NoCgroups, Setting, Tree
from aether.spawner.linux.cgroup_apply import is_set
from aether.spawner.linux.cgroup_host import locate
from aether.spawner.linux.cgroup_limits import NAMES, CgroupLimits, exceeding, parse_list, show_list
from aether.spawner.linux.cgroup_v1 import CgroupV1
from aether.spawner.linux.cgroup_v2 import CgroupV2

LIMITS = CgroupLimits(memory_bytes=64 << 20, swap_bytes=0, cpu_millis=1500, cpu_weight=50, pids=32, io_weight=200)
ALL = replace(
    LIMITS,
    memory_min_bytes=1 << 20,
    memory_low_bytes=2 << 20,
    memory_high_bytes=48 << 20,
    cpuset_cpus="0",
    cpuset_mems="0",
    io_read_bps=1 << 20,
    io_write_bps=2 << 20,
    io_read_iops=100,
    io_write_iops=200,
)
V2_FILES = {
    "cgroup.procs": "",
    "cgroup.kill": "",
    "cgroup.freeze": "0",
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_throttled 1\nthrottled_usec 7\n",
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.peak": "4096",
    "memory.current": "1024",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n",
    "pids.max": "max",
    "pids.peak": "5",
    "memory.min": "0",
    "memory.low": "0",
    "memory.high": "max",
    "cpuset.cpus": "",
    "cpuset.mems": "",
    "cpuset.cpus.effective": "0-1",
    "cpuset.mems.effective": "0",
    "io.max": "",
    "cpu.pressure": "some avg10=1.50 avg60=0.00 avg300=0.00 total=77\n",
    "io.weight": "default 100",
    "io.bfq.weight": "default 100",
    "io.stat": "254:0 rbytes=100 wbytes=200 rios=1\n254:16 rbytes=1 wbytes=2\n",
    "cgroup.subtree_control": "",
}
V1_FILES = {
    "tasks": "",
    "cgroup.procs": "",
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.memsw.limit_in_bytes": "9223372036854771712",
    "memory.max_usage_in_bytes": "4096",
    "memory.usage_in_bytes": "1024",
    "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    "cpu.cfs_quota_us": "-1",
    "cpu.shares": "1024",
    "cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 7000\n",
    "memory.soft_limit_in_bytes": "9223372036854771712",
    "memory.failcnt": "3",
    "cpuset.cpus": "0-1",
    "cpuset.mems": "0",
    "cpuset.effective_cpus": "0-1",
    "cpuset.effective_mems": "0",
    "cgroup.clone_children": "0",
    "cpu.rt_runtime_us": "0",
    "blkio.bfq.weight": "100",
    "blkio.throttle.read_bps_device": "",
    "blkio.throttle.write_bps_device": "",
    "blkio.throttle.read_iops_device": "",
    "blkio.throttle.write_iops_device": "",
    "pids.max": "max",
    "pids.peak": "5",
}


class FakeTree(Tree):
    """A Tree whose directories come with files, as cgroupfs makes them, and go with them."""

    files = V2_FILES

    def open(self) -> None:
        super().open()
        self._fill(Path(self.path))

    def _fill(self, directory: Path) -> None:
        for name, text in self.files.items():
            (directory / name).write_text(text)

    def mkdir(self, name: str) -> None:
        super().mkdir(name)
        self._fill(Path(self.path) / name)

    def rmdir(self, name: str) -> bool:
        procs = Path(self.path) / name / "cgroup.procs"
        if procs.exists() and procs.read_text():
            return False
        shutil.rmtree(Path(self.path) / name, ignore_errors=True)
        return True

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        super().close()


class FakeTreeV1(FakeTree):
    files = V1_FILES


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "disk/queue").mkdir(parents=True)
    (tmp_path / "disk/queue/scheduler").write_text("none mq-deadline [bfq]\n")
    return Disk("vda", "254:0", str(tmp_path / "disk"))


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> CgroupV2:
    monkeypatch.setattr(cgroup_v2, "Tree", FakeTree)
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory pids io cpuset\n")
    (tmp_path / "cgroup.procs").write_text("")
    driver = CgroupV2(str(tmp_path), "abc", disk=disk)
    driver.start()
    return driver


def read(driver: CgroupV2, file: str) -> str:
    return (Path(driver.tree.path) / "c" / file).read_text()


def test_v2_writes_every_limit_and_counts(v2: CgroupV2) -> None:
    handle = v2.create("c", LIMITS)
    assert read(v2, "memory.max") == str(64 << 20)
    assert read(v2, "memory.swap.max").startswith("0")  # a plain file is not truncated
    assert read(v2, "cpu.max").startswith("150000 100000")
    assert read(v2, "pids.max").startswith("32") and read(v2, "cpu.weight").startswith("50")
    assert read(v2, "io.bfq.weight").startswith("default 200")
    assert set(handle.enforced) == {"memory_bytes", "swap_bytes", "cpu_millis", "cpu_weight", "pids", "io_weight"}
    usage = v2.usage(handle)
    assert (usage.cpu_user_us, usage.cpu_system_us, usage.throttled_us) == (20, 10, 7)
    assert (usage.memory_peak_bytes, usage.memory_bytes, usage.pids_peak, usage.oom_kills) == (4096, 1024, 5, 2)
    assert (usage.io_read_bytes, usage.io_write_bytes) == (101, 202)
    assert usage.sources["io"] == "cgroup2:io.stat"
    v2.kill(handle)
    v2.freeze(handle, True)
    assert read(v2, "cgroup.kill") == "1" and read(v2, "cgroup.freeze") == "1"
    assert handle.v2_fd is not None and os.fstat(handle.v2_fd)
    assert v2.remove(handle) and handle.v2_fd is None
    v2.close()
    assert v2.probe()["missing"] == {}


def test_v2_says_what_is_not_delegated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_v2, "Tree", FakeTree)
    (tmp_path / "cgroup.controllers").write_text("memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    driver = CgroupV2(str(tmp_path), "abc")
    driver.start()
    handle = driver.create("c", LIMITS)
    assert set(handle.enforced) == {"memory_bytes", "swap_bytes", "pids"}
    assert set(driver.probe()["missing"]) == {name for name in NAMES if name.startswith(("cpu", "io"))}
    assert driver.usage(handle).io_read_bytes is None
    assert driver.remove(handle)
    driver.close()


def test_v2_not_removed_while_a_process_lives(v2: CgroupV2) -> None:
    handle = v2.create("c", CgroupLimits())
    procs = Path(v2.tree.path) / "c" / "cgroup.procs"
    procs.write_text("123\n456\n")
    assert v2.procs(handle) == (123, 456)
    assert not v2.remove(handle)
    procs.write_text("")
    assert v2.remove(handle)
    v2.close()


def test_v1_writes_limits_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_v1, "Tree", FakeTreeV1)
    monkeypatch.setattr(cgroup_v2, "Tree", FakeTree)
    bases = {}
    for name in ("memory", "cpu,cpuacct", "pids", "unified"):
        (tmp_path / name).mkdir()
        for controller in name.split(","):
            bases[controller] = str(tmp_path / name)
    driver = CgroupV1(bases, str(tmp_path / "unified"), "abc")
    driver.start()
    handle = driver.create("c", LIMITS)
    assert len(handle.attach_fds) == 3 and handle.v2_fd is not None
    memory = tmp_path / "memory/aether-abc/c"
    assert (memory / "memory.limit_in_bytes").read_text().startswith(str(64 << 20))
    assert (memory / "memory.memsw.limit_in_bytes").read_text().startswith(str(64 << 20))
    cpu = tmp_path / "cpu,cpuacct/aether-abc/c"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "150000" and (cpu / "cpu.shares").read_text().startswith("512")
    assert "io_weight" not in handle.enforced and "io_weight" in driver.probe()["missing"]
    usage = driver.usage(handle)
    assert (usage.cpu_user_us, usage.memory_peak_bytes, usage.oom_kills, usage.throttled_us) == (20, 4096, 2, 7)
    assert driver.remove(handle)
    driver.close()
    assert not list(tmp_path.glob("*/aether-*"))


def test_none_says_so() -> None:
    driver = NoCgroups("nothing is delegated")
    handle = driver.create("c", LIMITS)
    assert handle.enforced == {} and driver.usage(handle).cpu_user_us is None
    assert driver.probe()["missing"]["memory_bytes"] == "nothing is delegated" and driver.probe()["remedy"]
    with pytest.raises(OSError):
        driver.freeze(handle, True)
    assert driver.remove(handle)


def test_locate_joins_mounts_and_own_paths() -> None:
    mounts = """\
25 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
27 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
28 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
    own = "4:memory:/a/b\n2:cpu,cpuacct:/\n0::/user.slice\n"
    found = locate(mounts, own)
    assert found.v1 == {
        "memory": "/sys/fs/cgroup/memory/a/b",
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
    }
    assert found.v2 == "/sys/fs/cgroup/unified/user.slice"
    docker = "30 25 0:25 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup rw\n"
    assert locate(docker, "0::/docker/x\n").v2 == "/sys/fs/cgroup"
    assert locate("", "").v2 is None


def test_v2_writes_what_few_cells_ask_for(v2: CgroupV2) -> None:
    handle = v2.create("c", ALL)
    assert set(handle.enforced) == set(NAMES)
    for file, text in (("memory.min", "1048576"), ("memory.low", "2097152"), ("memory.high", "50331648")):
        assert read(v2, file).startswith(text)
    assert read(v2, "cpuset.cpus") == "0" and read(v2, "io.max").startswith("254:0 wiops=200")
    assert v2.usage(handle, pressure=True).pressure == {"cpu": {"some_us": 77, "some_avg10_percent": 1.5}}
    assert v2.usage(handle).memory_events == {"low": 0, "high": 0, "max": 3, "oom": 1}
    assert v2.remove(handle)
    v2.close()


def test_v2_resize_is_whole_or_not_at_all(v2: CgroupV2, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = v2.create("c", CgroupLimits(pids=10, cpu_weight=50))
    write = v2.tree.write

    def refusing(file: str, value: str) -> None:
        if file.endswith("pids.max") and value == "20":
            raise OSError(errno.EINVAL, "Invalid argument")
        write(file, value)

    monkeypatch.setattr(type(v2.tree), "write", lambda _, file, value: refusing(file, value))
    with pytest.raises(OSError, match="cannot set pids to 20: Invalid argument"):
        v2.set_limits(handle, CgroupLimits(cpu_weight=70, memory_high_bytes=4096, pids=20))
    assert read(v2, "cpu.weight").startswith("50") and read(v2, "memory.high").startswith("max")
    assert handle.limits == CgroupLimits(pids=10, cpu_weight=50) and "memory_high_bytes" not in handle.enforced
    assert v2.remove(handle)
    v2.close()


def test_v2_memory_in_use_is_not_killed_by_a_resize(v2: CgroupV2) -> None:
    handle = v2.create("c", CgroupLimits(memory_bytes=1 << 20))
    (Path(v2.tree.path) / "c/memory.current").write_text("600000")
    with pytest.raises(OSError, match="600000 bytes are in use") as refused:
        v2.set_limits(handle, CgroupLimits(memory_bytes=1 << 19))
    assert refused.value.errno == errno.EBUSY
    assert read(v2, "memory.max").startswith(str(1 << 20)) and read(v2, "memory.high").startswith("max")
    assert v2.remove(handle)
    v2.close()


def test_v2_leaf_and_child(v2: CgroupV2) -> None:
    parent = v2.create("a", CgroupLimits(pids=10), nestable=True)
    child = v2.create("b", CgroupLimits(), parent=parent)
    assert (parent.home, child.name, child.home) == ("a/_", "a/b", "a/b")
    control = Path(v2.tree.path) / "a/cgroup.subtree_control"
    assert control.read_text() == "+cpu +memory +pids +io +cpuset"
    assert child.bounds().pids == 10
    assert v2.remove(child) and parent.children == [] and v2.remove(parent)
    v2.close()


def test_v1_words(disk: Disk) -> None:
    files = {setting.limit: (setting.file, setting.value) for setting in cgroup_v1.limit_files(ALL, disk)}
    assert set(files) == set(NAMES) - {"memory_min_bytes", "memory_high_bytes"}
    assert files["memory_low_bytes"] == ("memory.soft_limit_in_bytes", str(2 << 20))
    assert files["io_write_iops"] == ("blkio.throttle.write_iops_device", "254:0 200")
    assert not {"io_write_iops"} & {setting.limit for setting in cgroup_v1.limit_files(ALL, None)}


@pytest.mark.parametrize(
    ("file", "value", "text", "same"),
    [
        ("memory.max", "1048577", "1048576\n", True),
        ("memory.max", "1048576", "max\n", False),
        ("pids.max", "20", "20\n", True),
        ("cpu.max", "50000 100000", "50000 100000\n", True),
        ("cpu.max", "50000 100000", "max 100000\n", False),
        ("cpuset.cpus", "0,1,2", "0-2\n", True),
        ("cpuset.cpus", "0", "\n", False),
        ("io.weight", "default 50", "default 50\n254:0 7\n", True),
        ("io.max", "254:0 rbps=9", "8:0 rbps=1 wbps=max\n254:0 rbps=9 wbps=max riops=max wiops=max\n", True),
        ("io.max", "254:0 rbps=9", "254:0 rbps=90 wbps=max\n", False),
        ("blkio.throttle.read_bps_device", "254:0 9", "254:0 9\n", True),
        ("blkio.throttle.read_bps_device", "254:0 9", "", False),
    ],
)
def test_whether_a_file_still_says_what_was_written(file: str, value: str, text: str, same: bool) -> None:
    assert is_set(Setting("x", "y", file, value, ""), text) is same


@given(st.frozensets(st.integers(0, 8191), min_size=1, max_size=20))
def test_lists_roundtrip(numbers: frozenset[int]) -> None:
    assert parse_list(show_list(numbers)) == numbers


@given(st.text(max_size=40))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_list(text)


_COUNTS = st.one_of(st.none(), st.integers(1, 5))
_LIMITS = st.builds(CgroupLimits, pids=_COUNTS, memory_bytes=_COUNTS, cpu_millis=_COUNTS, io_read_bps=_COUNTS)


@given(_LIMITS, _LIMITS, _LIMITS)
def test_what_does_not_exceed_is_the_bound_within(
    outer: CgroupLimits, middle: CgroupLimits, inner: CgroupLimits
) -> None:
    """A chain of cells that was let through never widens on the way in."""
    if exceeding(middle, outer) is None and exceeding(inner, middle.over(outer)) is None:
        held = inner.over(middle.over(outer))
        for name in ("pids", "memory_bytes", "cpu_millis", "io_read_bps"):
            around = [getattr(each, name) for each in (outer, middle, inner) if getattr(each, name) is not None]
            assert getattr(held, name) == (min(around) if around else None)


def test_disk_of_a_partition_and_of_what_has_none(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    part = tmp_path / "sys/devices/vda/vda1"
    part.mkdir(parents=True)
    (part / "partition").write_text("1")
    (part.parent / "dev").write_text("254:0\n")
    links = tmp_path / "sys/dev/block"
    links.mkdir(parents=True)
    (links / f"{os.major(number)}:{os.minor(number)}").symlink_to(part)
    if os.major(number):
        assert disk_under(str(tmp_path), str(tmp_path / "sys")) == Disk("vda", "254:0", str(part.parent))
    with pytest.raises(OSError, match="lies on proc"):
        disk_under("/proc", mountinfo="22 1 0:21 / /proc rw - proc proc rw\n")
