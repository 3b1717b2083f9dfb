"""Namespaces, privilege, devices and kernel interfaces, tried from inside a cell (probe.py says how)."""

from __future__ import annotations

import errno
import signal

import pytest

from tests.support.escape import Answers

EPERM, READ_ONLY = errno.EPERM, {errno.EACCES, errno.EROFS}


@pytest.mark.parametrize("way", ["unshare", "clone", "setns"])
def test_no_namespace_can_be_made_or_entered(answers: Answers, way: str) -> None:
    found = answers.of("namespaces")[way]
    assert {"mnt", "cgroup", "uts", "ipc", "user", "pid", "net"} <= set(found)
    assert set(found.values()) == {EPERM}


def test_clone3_is_unknown_so_that_libc_falls_back(answers: Answers) -> None:
    assert answers.of("namespaces")["clone3"] == errno.ENOSYS


def test_root_and_host_name_stay(answers: Answers) -> None:
    found = answers.of("namespaces")
    assert (found["chroot"], found["hostname"]) == (EPERM, EPERM)


def test_the_mount_interface_is_refused(answers: Answers) -> None:
    assert set(answers.of("mounts").values()) == {EPERM}, answers.of("mounts")


def test_no_capability_is_held_or_gained(answers: Answers) -> None:
    found = answers.of("privilege")
    assert set(found["caps"]) == {"0" * 16}
    assert (found["capset"], found["ambient"], found["file_capability"]) == (EPERM, -1, EPERM)
    assert found["trusted"] == EPERM


def test_ids_cannot_change(answers: Answers) -> None:
    found = answers.of("privilege")
    unmapped = EPERM if not answers.user else errno.EINVAL  # with one id, id 0 is not mapped (user_namespaces(7))
    assert (found["setuid"], found["setgid"], found["chown"], found["setgroups"]) == (*[unmapped] * 3, EPERM)
    assert found["groups"] == "" or answers.user


def test_no_new_privs_and_the_filter_stay(answers: Answers) -> None:
    found = answers.of("privilege")
    assert (found["no_new_privs"], found["no_new_privs_off"], found["seccomp"]) == ("1", -1, "2")


def test_setuid_programs_run_as_the_job(answers: Answers) -> None:
    assert answers.of("setuid_program") == {"setuid": "1000 1000", "setgid": "1000 1000"}
    assert answers.of("privilege")["nosuid"] == []


def test_priority_and_limits_are_not_raised(answers: Answers) -> None:
    found = answers.of("privilege")
    assert (found["realtime"], found["nice"], found["raise_limit"]) == (EPERM, errno.EACCES, EPERM)


def test_personality_stays(answers: Answers) -> None:
    assert answers.of("privilege")["personality"] == EPERM


def test_no_device_node_can_be_made(answers: Answers) -> None:
    made = {k: v for k, v in answers.of("devices").items() if k.startswith(("character", "block"))}
    assert len(made) == 8
    assert set(made.values()) <= {EPERM, *READ_ONLY}, made


def test_devices_of_the_host_are_absent(answers: Answers) -> None:
    found = {k: v for k, v in answers.of("devices").items() if k.startswith("open ") or k == "console"}
    assert set(found.values()) == {errno.ENOENT}, found


@pytest.mark.parametrize(
    "names",
    [
        ("add_key", "request_key", "keyctl"),
        ("bpf", "perf_event_open", "userfaultfd"),
        ("io_uring_setup", "io_uring_enter", "io_uring_register"),
        ("init_module", "finit_module", "delete_module"),
        ("kexec_load", "kexec_file_load", "reboot"),
        ("acct", "syslog", "vhangup", "lsm_set_self_attr"),
    ],
    ids=lambda names: names[0],
)
def test_interfaces_of_the_kernel_are_refused(answers: Answers, names: tuple[str, ...]) -> None:
    found = answers.of("kernel_interfaces")
    assert {name: found[name] for name in names} == dict.fromkeys(names, EPERM)


def test_hardware_interfaces_of_x86_are_refused(answers: Answers) -> None:
    found = answers.of("kernel_interfaces")
    assert {found[k] for k in ("iopl", "ioperm", "modify_ldt")} <= {EPERM, -1}


def test_secret_memory_and_unreviewed_calls_are_unknown(answers: Answers) -> None:
    found = answers.of("kernel_interfaces")
    assert (found["memfd_secret"], found["unreviewed"]) == (errno.ENOSYS, errno.ENOSYS)


def test_clocks_cannot_be_set(answers: Answers) -> None:
    assert set(answers.of("clocks").values()) == {EPERM}


def test_foreign_calls_kill(answers: Answers) -> None:
    assert set(answers.of("foreign_calls").values()) <= {-signal.SIGSYS}


def test_terminal_injection_is_refused(answers: Answers) -> None:
    assert set(answers.of("terminal").values()) == {EPERM}


def test_settings_of_the_kernel_are_not_writable(answers: Answers) -> None:
    """core_pattern, modprobe, sysrq, binfmt_misc, cgroups: forbidden, read-only or not there at all."""
    found = answers.of("kernel_settings")
    assert "kernel/core_pattern" in found
    absent = {k for k, v in found.items() if v == errno.ENOENT}
    assert absent >= {"/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/tasks", "/sys/kernel/uevent_helper"}
    assert {v for k, v in found.items() if k not in absent} <= READ_ONLY, found
    assert found["init/oom_score_adj"] in READ_ONLY


def test_own_filters_do_not_weaken_the_cells(answers: Answers) -> None:
    """Also not one with a listener: of several answers the strictest counts (seccomp(2))."""
    assert answers.of("own_filters") == {"allow_all": EPERM, "notify": EPERM, "trace": EPERM}


def test_own_landlock_rules_do_not_widen(answers: Answers) -> None:
    found = answers.of("own_landlock")
    assert found["usr"] == errno.EROFS
    assert found["node"] in (EPERM, errno.EACCES)
