"""Where no user namespace can be made: the demo runs through, and says what it could not prevent.

The limit is set inside a user namespace of the test's own (user_namespaces(7): it counts for that one and below), in
which nothing else runs. As root the test becomes an ordinary user first, with a view of files that shows it the
interpreter.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aether.daemons import control
from tests.support import machine
from tests.support.cells import missing

ROOT = Path(__file__).parents[2]
UID = 65_532
CHILD = """
import ctypes, os, sys
from pathlib import Path
from aether.daemons.view import open_up

home, ordinary = Path(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
if os.getuid() == 0:
    open_up(home)
    os.setgroups([])
    os.setresgid(ordinary, ordinary, ordinary)
    os.setresuid(ordinary, ordinary, ordinary)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or its /proc files stay root's (proc(5))
uid, gid = os.getuid(), os.getgid()
if libc.unshare(0x1000_0000) != 0:  # CLONE_NEWUSER
    sys.exit("no user namespace: " + os.strerror(ctypes.get_errno()))
for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
    Path("/proc/self", name).write_text(text)
Path("/proc/sys/user/max_user_namespaces").write_text("0")
os.execv(sys.executable, [sys.executable, "-m", "examples.demo"])
"""


@pytest.mark.skipif(os.geteuid() != 0 and "userns" in missing(), reason="needs one user namespace to forbid others in")
def test_the_demo_ends_honestly_without_user_namespaces() -> None:
    with tempfile.TemporaryDirectory(prefix="aether-test-") as home:
        if os.geteuid() == 0:
            os.chown(home, UID, UID)
        env = {"PATH": "/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8", "COLUMNS": "120", "TMPDIR": home}
        argv = [sys.executable, "-c", CHILD, home, str(UID)]
        try:
            done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
        finally:
            for state in Path(home).glob("aether-demo-*"):
                control.down(state)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not machine.mentioning(home)
    shown = done.stdout
    assert "missing userns, pidns" in shown and "max_user_namespaces" in shown
    assert "Cells get the level `process` here" in shown
    stopped = dict(
        re.findall(r"^(read the|see other|reach the|fork without|eat memory|flood stdout).*?  (yes|NO) ", shown, re.M)
    )
    assert stopped == {
        "read the": "yes", "see other": "NO", "reach the": "yes", "fork without": "yes", "eat memory": "yes",
        "flood stdout": "yes",
    }  # fmt: skip
    assert "not prevented here: see other processes; it takes pidns" in shown
    assert shown.splitlines()[-1].endswith("every promise held that does not need what is missing here.")
