"""The interpreter that is started ahead: it runs what a command line would, and ends as a fresh one would."""

from __future__ import annotations

import array
import json
import os
import socket
import sys
from pathlib import Path

import pytest


def start(imports: tuple[str, ...] = ()) -> tuple[int, socket.socket]:
    """The pid of an interpreter with its end of the channel as descriptor 3, and our end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    actions = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    argv = [sys.executable, "-m", "aether.runtime.zygote", *imports]
    with theirs:
        last = (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)
        return os.posix_spawn(sys.executable, argv, os.environ, file_actions=[*actions, last]), ours


def end_of(pid: int) -> int:
    """Its exit status, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(work: Path, argv: list[str], imports: tuple[str, ...] = (), **env: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of an interpreter that was started, then asked."""
    pid, ours = start(imports)
    out, err = work / "stdout", work / "stderr"
    with open(os.devnull) as null, out.open("w") as stdout, err.open("w") as stderr:
        order = json.dumps({"argv": argv, "env": {"HOME": str(work), **env}, "cwd": str(work)}).encode()
        fds = array.array("i", [null.fileno(), stdout.fileno(), stderr.fileno()])
        ours.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    ours.close()
    return end_of(pid), out.read_text(), err.read_text()


def test_a_script_is_main_with_its_arguments_directory_and_environment(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("x = 42\n")
    (tmp_path / "main.py").write_text(
        "import os, sys, helper\nprint(__name__, __file__, sys.argv, helper.x, os.getcwd(), sorted(os.environ))\n"
    )
    status, out, err = run(tmp_path, ["main.py", "a", "b"], MARK="1")
    assert (status, err) == (0, "")
    assert out == f"__main__ main.py ['main.py', 'a', 'b'] 42 {tmp_path} ['HOME', 'MARK']\n"


def test_code_and_modules(tmp_path: Path) -> None:
    assert run(tmp_path, ["-c", "import sys; print(sys.argv)", "x"])[:2] == (0, "['-c', 'x']\n")
    (tmp_path / "tool.py").write_text("import sys\nprint(__name__, sys.argv[1:])\n")
    assert run(tmp_path, ["-m", "tool", "y"])[:2] == (0, "__main__ ['y']\n")


@pytest.mark.parametrize(
    ("code", "status", "stderr"),
    [
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('no such thing')", 1, "no such thing\n"),
        ("1/0", 1, "ZeroDivisionError: division by zero\n"),
        ("def f(:", 1, "SyntaxError: "),
        ("import os; os._exit(9)", 9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
    ],
)
def test_ends(tmp_path: Path, code: str, status: int, stderr: str) -> None:
    ended, _, err = run(tmp_path, ["-c", code])
    assert ended == status
    assert stderr in err and "zygote.py" not in err, "the traceback begins in the job's own code"


def test_threads_atexit_and_buffers_are_waited_for(tmp_path: Path) -> None:
    code = """
import atexit, sys, threading, time
atexit.register(print, "at exit")
def late():
    time.sleep(0.2)
    print("thread")
threading.Thread(target=late).start()
sys.stdout.write("no newline ")
"""
    assert run(tmp_path, ["-c", code])[:2] == (0, "no newline thread\nat exit\n")


def test_modules_are_loaded_before_the_job(tmp_path: Path) -> None:
    code = "import sys; print('decimal' in sys.modules)"
    assert run(tmp_path, ["-c", code], ("decimal",))[1] == "True\n"


def test_a_module_that_cannot_be_imported_is_told_to_the_job(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, ["-c", "print(1)"], ("no_such_module",))
    assert (status, out) == (1, "")
    assert "ModuleNotFoundError: No module named 'no_such_module'" in err


def test_a_missing_script_and_a_missing_directory(tmp_path: Path) -> None:
    status, _, err = run(tmp_path, ["nothing.py"])
    assert status == 1 and "nothing.py" in err


def test_without_an_order_it_ends() -> None:
    pid, ours = start()
    ours.close()
    assert end_of(pid) == 0
