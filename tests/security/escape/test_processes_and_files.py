"""Files, processes, sockets and descriptors of the host, tried from inside a cell (probe.py says how)."""

from __future__ import annotations

import errno

from tests.support.escape import Answers

GONE, FORBIDDEN = errno.ENOENT, errno.EACCES


def test_files_of_pid_1_are_forbidden_and_those_of_outsiders_absent(answers: Answers) -> None:
    found = answers.of("host_files")
    for kind in ("links", "lists", "reads"):
        by_init = {path: code for path, code in found[kind].items() if path.startswith("/proc/1/")}
        others = {path: code for path, code in found[kind].items() if path not in by_init}
        assert set(by_init.values()) == {FORBIDDEN}, by_init
        assert set(others.values()) == {GONE}, others


def test_a_map_file_of_its_own_opens_only_for_administrators(answers: Answers) -> None:
    assert answers.of("host_files")["own_map_file"] == errno.EPERM


def test_no_way_above_the_root(answers: Answers) -> None:
    found = answers.of("host_files")
    assert found["above_root"]
    assert {found[k] for k in ("secret", "secret_by_root", "secret_by_cwd", "shadow", "sys")} == {GONE}


def test_outsiders_cannot_be_traced_read_or_written(answers: Answers) -> None:
    found = answers.of("outsiders")
    tried = [found[k] for k in ("ptrace_attach", "ptrace_seize", "ptrace_traceme", "vm_readv", "vm_writev")]
    assert set(tried) == {errno.EPERM}
    assert found["ptrace_init"] == errno.EPERM


def test_outsiders_cannot_be_signalled(answers: Answers) -> None:
    found = answers.of("outsiders")
    assert {found[k] for k in ("kill", "tgkill", "kill_group", "pidfd", "priority")} == {errno.ESRCH}


def test_descriptors_limits_and_memory_of_others_are_refused(answers: Answers) -> None:
    found = answers.of("outsiders")
    names = ("pidfd_getfd", "kcmp", "prlimit", "prlimit_init", "migrate_pages", "move_pages")
    assert {found[k] for k in names} == {errno.EPERM}
    assert found["process_madvise"] == errno.EBADF


def test_only_the_cells_own_processes_are_seen(answers: Answers) -> None:
    found = answers.of("outsiders")
    assert (found["seen"], found["count"]) == (1, 3)  # PID 1, the probe, its child


def test_abstract_sockets_of_the_host_refuse(answers: Answers) -> None:
    """Another network namespace has other abstract names; Landlock (ABI 6) refuses before it looks."""
    found = answers.of("host_sockets")
    assert {found["abstract_stream"], found["abstract_datagram"]} <= {errno.ECONNREFUSED, errno.EPERM}


def test_path_sockets_of_the_host_are_absent(answers: Answers) -> None:
    found = answers.of("host_sockets")
    assert {found[k] for k in ("path_stream", "path_datagram", "journal", "docker")} == {GONE}


def test_no_listener_of_the_host_saw_anything(answers: Answers) -> None:
    assert answers.spied == []


def test_no_descriptor_is_inherited(answers: Answers) -> None:
    found = answers.of("descriptors")
    assert (found["open"], found["stdin"]) == ([0, 1, 2], "/dev/null")
