"""One probe per way of starting cells; each test asserts a few of its answers. Afterwards nothing is left."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import cells, machine
from tests.support.escape import Answers, collect

MARK = "aether-escape-"


@pytest.fixture(scope="session")
def directory() -> Iterator[str]:
    yield from cells.readable_copy()


@pytest.fixture(scope="session")
def planted() -> Iterator[Path]:
    """A directory of the host with a secret and setuid programs, all of which everybody on the host may reach."""
    place = Path(tempfile.mkdtemp(prefix=MARK))
    (place / "secret").write_text("of the host")
    programs = place / "programs"
    programs.mkdir()
    for name, mode in (("setuid", 0o4755), ("setgid", 0o2755)):
        shutil.copyfile("/usr/bin/id", programs / name)
        (programs / name).chmod(mode)
    for path in (place, programs):
        path.chmod(0o755)
    (place / "secret").chmod(0o644)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="session", params=cells.variants())
def answers(request: pytest.FixtureRequest, directory: str, planted: Path) -> Answers:
    return collect(request.param, directory, planted)


def _running_from(directory: str) -> list[int]:
    """Processes whose program or arguments lie below `directory`."""
    found = machine.mentioning(directory)
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and str((entry / "exe").readlink()).startswith(directory):
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(directory: str) -> Iterator[None]:
    """After the suite no process of it lives and no mount is left: so no namespace either, which would need one of a
    process, a descriptor or a mount (namespaces(7)). These cells have no cgroup."""

    def mounts() -> list[str]:
        return [line.split(" ", 2)[2] for line in machine.mounts("") if "aether" in line or " nsfs " in line]

    mounted = mounts()
    yield
    assert [machine.argv_of(pid) for pid in _running_from(directory)] == []
    assert [line for line in mounts() if line not in mounted] == []
