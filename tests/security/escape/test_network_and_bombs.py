"""The network, what a cell is shown, and what bounds bombs, from inside a cell (probe.py says how)."""

from __future__ import annotations

import errno
import signal

from tests.support.escape import Answers

OTHER_FAMILY, OTHER_PROTOCOL = errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT


def test_names_do_not_resolve(answers: Answers) -> None:
    assert answers.of("network")["resolve"] == "gaierror"


def test_nothing_outside_is_reached_by_udp_or_tcp(answers: Answers) -> None:
    found = answers.of("network")
    assert {found[k] for k in ("udp", "udp6", "udp_metadata", "tcp", "tcp6")} == {errno.ENETUNREACH}


def test_the_hosts_loopback_is_another_one(answers: Answers) -> None:
    found = answers.of("network")
    assert (found["tcp_host"], found["loopback"]) == (errno.ECONNREFUSED, 0)
    assert found["interfaces"] == ["lo"]
    assert found["interface_up"] == errno.EPERM
    assert answers.spied == []


def test_icmp_and_raw_sockets_are_refused(answers: Answers) -> None:
    found = answers.of("network")
    assert (found["icmp"], found["icmp6"], found["raw"]) == (OTHER_PROTOCOL,) * 3
    assert found["raw_tcp"] == errno.EPERM


def test_no_other_protocol_is_loaded_by_asking_for_it(answers: Answers) -> None:
    """SCTP, MPTCP, UDP-Lite, DCCP, L2TP."""
    assert set(answers.of("network")["protocols"].values()) == {OTHER_PROTOCOL}


def test_netlink_but_route_and_all_other_families_are_refused(answers: Answers) -> None:
    """Packet, vsock and every family with a history."""
    found = answers.of("network")
    assert {*found["netlink"].values(), *found["families"].values(), found["vsock_stream"]} == {OTHER_FAMILY}


def test_proc_shows_nothing_of_the_machine(answers: Answers) -> None:
    found = answers.of("what_is_shown")
    for name in ("keys", "kcore", "timer_list", "sched_debug", "interrupts", "latency_stats"):
        assert found["sizes"][name] in (0, -errno.ENOENT), name
    for name in ("kmsg", "kpageflags", "slabinfo", "vmallocinfo"):
        assert found["sizes"][name] in (-errno.EACCES, -errno.EPERM, -errno.ENOENT), name
    assert set(found["empty"].values()) <= {0}
    assert set(found["kallsyms"]) <= {"0" * 16}, "addresses of the kernel"


def test_there_is_no_sys_and_the_cgroup_is_the_root(answers: Answers) -> None:
    found = answers.of("what_is_shown")
    assert not found["sys"]
    assert set(found["cgroup"]) == {"/"}


def test_ipc_objects_and_environment_of_others_are_not_seen(answers: Answers) -> None:
    found = answers.of("what_is_shown")
    assert found["sysvipc"] == [1, 1, 1]  # the headings
    assert found["hostname"] == "cell"
    assert set(found["environment"]) <= {"HOME", "PATH", "LC_CTYPE"}


def test_mounts_are_flagged_and_name_only_what_was_asked_for(answers: Answers) -> None:
    rows = [line.split() for line in answers.of("what_is_shown")["mountinfo"].splitlines()]
    assert all("nosuid" in row[5].split(",") for row in rows)
    outside_dev = [row for row in rows if not row[4].startswith(("/dev", "/proc"))]
    assert all("nodev" in row[5].split(",") for row in outside_dev)
    writable = {row[4] for row in rows if "rw" in row[5].split(",")}
    assert {path for path in writable if not path.startswith(("/dev/", "/proc/"))} == {"/tmp", "/work"}
    shown = {row[3] for row in rows if row[4] not in ("/data",)}  # /data is what this test bound
    assert {path for path in shown if not path.startswith(("/usr", "/etc"))} <= {
        "/", "/null", "/zero", "/full", "/random", "/urandom",
    }  # fmt: skip


def test_disk_is_bounded_where_it_is_memory(answers: Answers) -> None:
    found = answers.of("bombs")
    assert found["disk"] == [errno.ENOSPC, 1 << 24]
    assert found["temporary"] == [errno.ENOSPC, 1 << 24]
    assert found["shared"][0] == errno.ENOSPC


def test_inodes_are_bounded(answers: Answers) -> None:
    code, made = answers.of("bombs")["inodes"]
    assert code == errno.ENOSPC and made < 1 << 16


def test_memory_is_bounded(answers: Answers) -> None:
    assert answers.of("bombs")["memory"] == "MemoryError"


def test_processes_are_bounded(answers: Answers) -> None:
    found = answers.of("fork_bomb")
    assert found["errno"] == errno.EAGAIN and found["children"] < 64


def test_a_crash_leaves_no_core(answers: Answers) -> None:
    found = answers.of("bombs")["core"]
    assert found == {"signal": signal.SIGABRT, "files": [], "limit": 1}
