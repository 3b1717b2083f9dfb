"""What doctor says of containers, AppArmor and ids: facts read from a made-up file tree, sentences from facts."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from aether.spawner.linux import surroundings
from aether.spawner.linux.surroundings import Surroundings

PROFILE = Path(__file__).parents[4] / surroundings.PROFILE
FREE = Surroundings(
    uid=1000,
    container=None,
    label="unconfined",
    restricted=False,
    filtered=False,
    administrator=False,
    covered=(),
    slots=0,
    alone=("no subordinate ids are lent to this user", "usermod"),
)
DOCKER = dataclasses.replace(
    FREE, uid=0, container="docker", label="docker-default (enforce)", filtered=True, covered=("/proc/kcore",)
)
STATUS = "Name:\tx\nCapEff:\t{:016x}\nSeccomp:\t{}\n"


def tree(root: Path, files: dict[str, str]) -> Surroundings:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return surroundings.look(root)


def test_docker_is_read_from_the_tree(tmp_path: Path) -> None:
    mounts = "30 29 0:5 / / rw - overlay o rw\n31 30 0:6 /null /proc/kcore rw - tmpfs t rw\n"
    seen = tree(
        tmp_path,
        {
            ".dockerenv": "",
            "proc/self/status": STATUS.format(0xA80425FB, 2),
            "proc/self/attr/current": "docker-default (enforce)\n",
            "proc/self/mountinfo": mounts,
        },
    )
    assert (seen.container, seen.label, seen.filtered) == ("docker", "docker-default (enforce)", True)
    assert (seen.administrator, seen.covered, seen.restricted) == (False, ("/proc/kcore",), False)


def test_an_empty_tree_is_no_error(tmp_path: Path) -> None:
    seen = surroundings.look(tmp_path)
    assert (seen.container, seen.label, seen.covered) == (None, None, ())


def test_ubuntus_restriction_names_the_profile() -> None:
    reason, remedy = surroundings.cause(dataclasses.replace(FREE, restricted=True)) or ("", "")
    assert "AppArmor" in reason
    assert surroundings.PROFILE in remedy and "apparmor_parser -r" in remedy
    assert surroundings.cause(dataclasses.replace(FREE, restricted=True, label="aether (unconfined)")) is None
    assert surroundings.cause(dataclasses.replace(FREE, restricted=True, uid=0)) is None


def test_docker_gets_exactly_the_options_that_it_lacks() -> None:
    _, remedy = surroundings.cause(DOCKER) or ("", "")
    assert remedy == (
        "run it with --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN "
        "--security-opt systempaths=unconfined"
    )
    less = dataclasses.replace(DOCKER, filtered=False, label=None, administrator=True)
    assert (surroundings.cause(less) or ("", ""))[1] == "run it with --security-opt systempaths=unconfined"


def test_what_works_needs_no_remedy() -> None:
    assert all(row["ok"] for row in surroundings.rows(DOCKER, cells_work=True))
    assert [row["ok"] for row in surroundings.rows(DOCKER, cells_work=False)] == [False, True]


def test_the_ids_row_says_what_gives_cells_their_own() -> None:
    alone = surroundings.rows(FREE, cells_work=True)[1]
    assert alone["ok"] and (alone["value"], alone["remedy"]) == ("one uid for all cells", "usermod")
    lent = surroundings.rows(dataclasses.replace(FREE, slots=64, alone=None), cells_work=True)[1]
    assert (lent["value"], lent["reason"]) == ("ids of their own for 64 cells", None)


def test_the_profile_is_accepted_by_apparmors_parser(tmp_path: Path) -> None:
    """A parser older than 4.0 does not know `userns`, nor the interface that has it: the rest is checked."""
    parser = shutil.which("apparmor_parser") or "/usr/sbin/apparmor_parser"
    if not os.access(parser, os.X_OK):
        pytest.skip("apparmor_parser is not installed: apt-get install apparmor")
    version = subprocess.run([parser, "--version"], capture_output=True, text=True, check=True).stdout
    text = PROFILE.read_text()
    if int(version.split("version ")[1].split(".")[0]) < 4:
        text = text.replace("abi <abi/4.0>,", "").replace("  userns,\n", "")
    copy = tmp_path / "aether"
    copy.write_text(text)
    done = subprocess.run([parser, "-Q", "-K", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_profile_gives_user_namespaces_and_nothing_in_home_directories() -> None:
    rules = [line.strip() for line in PROFILE.read_text().splitlines() if not line.startswith("#")]
    assert "userns," in rules
    assert any(rule.startswith("profile aether ") and "flags=(unconfined)" in rule for rule in rules)
    assert not any("home" in rule.lower() for rule in rules)
