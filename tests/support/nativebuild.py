"""Builds of aether-init for tests, and the messages that its parser is fuzzed from.

As a program it writes those messages: python -m tests.support.nativebuild DIRECTORY
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aether.contract import cellplan as cp
from aether.spawner.linux import initwire, native, program

FACTS = program.HostFacts("x86_64", 7, 40)


def make(target: str, directory: Path, *settings: str) -> Path:
    """The built `target`, from a copy of the sources in `directory`; skips, with the reason, what cannot be built."""
    source = native.BINARY.parent
    for tool in ("make", *(s.partition("=")[2] for s in settings), *(() if settings else ("cc",))):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    for name in (*source.glob("*.[ch]"), source / "Makefile"):
        shutil.copy(name, directory)
    command = ["make", "-s", "-C", str(directory), target, *settings]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    return directory / target


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
    """One of every kind that the C side parses."""
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


def write_seeds(directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, message in enumerate(sample_messages()):
        paths.append(directory / f"seed{number}")
        paths[-1].write_bytes(message)
    return paths


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
