"""Small directory trees that a shell runs in, made of this machine's programs and what the loader says they need."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

PROGRAMS = ("sh", "cat", "ls", "mkdir", "rm", "ln", "touch", "mv", "id", "true")


def needed(program: str) -> set[str]:
    """The program's interpreter and libraries (ldd)."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return set(re.findall(r"(/\S+)(?= \(0x)", done.stdout))


def make_tree(root: Path, programs: Iterable[str] = PROGRAMS) -> Path:
    """`root` with `programs` under their own paths, mount points, and two files: /etc/motd and /srv/data/old."""
    for name in programs:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        for path in {found, *needed(found)}:
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o755)
    for name in ("proc", "dev", "tmp", "work", "etc", "srv/data"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "etc/motd").write_text("hello from the image\n")
    (root / "srv/data/old").write_text("old\n")
    (root / "srv/data/gone").write_text("gone\n")
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    return root
