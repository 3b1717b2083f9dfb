"""Plans and executable specifications: what is written is read back, and nothing else gets through."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract import cellplan as cp

ROOTS = ("/usr", "/srv/cells")
PATHS = st.lists(st.from_regex(r"[a-z0-9_-]{1,8}", fullmatch=True), min_size=1, max_size=4).map(
    lambda p: "/" + "/".join(p)
)
SOURCES = PATHS.map(lambda p: "/srv/cells" + p)
MODES = st.integers(0, 0o1777)
STEPS = st.one_of(
    st.builds(cp.Dir, PATHS, MODES),
    st.builds(cp.Symlink, PATHS, PATHS),
    st.builds(cp.File, PATHS, st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20)),
    st.builds(cp.BindRo, PATHS, SOURCES),
    st.builds(cp.BindRw, PATHS, SOURCES),
    st.builds(cp.BindDev, PATHS, st.just("/dev/kvm")),
    st.builds(cp.Tmpfs, PATHS, st.integers(4096, 1 << 40), st.integers(1, 1 << 24), MODES, st.booleans()),
    st.builds(cp.Proc, PATHS),
    st.builds(cp.DevMinimal, PATHS, st.booleans()),
    st.builds(cp.Mask, st.lists(PATHS, max_size=3).map(tuple)),
)
IDS = st.one_of(
    st.builds(cp.IdMap, st.integers(1, 2**31), st.integers(1, 2**31), st.integers(1001, 65536)),
    st.builds(cp.IdMap, st.integers(0, 2**31), st.integers(0, 2**31), st.just(1), st.just(1000)),
)
LIMITS = st.builds(
    lambda name, a, b: cp.Rlimit(name, min(a, b), max(a, b)),
    st.sampled_from(cp.RLIMIT_NAMES), st.integers(0, cp.RLIM_INFINITY), st.integers(0, cp.RLIM_INFINITY),
)  # fmt: skip
RULES = st.builds(cp.LandlockRule, PATHS, st.lists(st.sampled_from(cp.LANDLOCK_ACCESS), max_size=4).map(tuple))
PLANS = st.builds(
    cp.Plan,
    cell_id=st.just("cell_1"),
    level=st.just("cell"),
    namespaces=st.just(cp.NAMESPACES),
    id_map=IDS,
    hostname=st.just("cell"),
    steps=st.lists(STEPS, min_size=1, max_size=6).map(tuple),
    seccomp_profile=st.sampled_from(cp.SECCOMP_PROFILES),
    landlock=st.none() | st.builds(cp.Landlock, st.lists(RULES, max_size=3).map(tuple), st.booleans(), st.booleans()),
    rlimits=st.lists(LIMITS, max_size=3).map(tuple),
)


def parse(obj: Any) -> cp.Plan:
    return cp.parse_plan(obj, source_roots=ROOTS, devices=("/dev/kvm",))


def base() -> dict[str, Any]:
    steps = (
        cp.BindRo("/usr", "/usr"),
        cp.File("/etc/passwd", "x"),
        cp.Tmpfs("/tmp", 4096),
        cp.BindDev("/dev/kvm", "/dev/kvm"),
    )
    rules = cp.Landlock((cp.LandlockRule("/", ("read",)),))
    ids = cp.IdMap(1 << 20, 1 << 20, 65536)
    plan = cp.Plan("c1", "cell", cp.NAMESPACES, ids, "cell", steps, "cell", rules, (cp.Rlimit("core", 0, 0),))
    return cp.to_obj(plan)


@given(PLANS)
def test_a_plan_survives_json(plan: cp.Plan) -> None:
    assert parse(json.loads(json.dumps(cp.to_obj(plan)))) == plan


@given(PLANS)
def test_every_step_has_its_line(plan: cp.Plan) -> None:
    lines = cp.describe(plan)
    numbered = [line for line in lines if line.split(". ")[0].isdigit()]
    assert len(numbered) >= len(plan.steps)
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("cell_id",), "../x"),
        (("cell_id",), ""),
        (("level",), "none"),
        (("hostname",), "-a"),
        (("hostname",), "a\n"),
        (("namespaces",), ["pid", "time"]),
        (("namespaces",), ["pid", "net"]),
        (("namespaces",), ["pid", "mnt"]),
        (("seccomp_profile",), "none"),
        (("id_map", "host_uid"), 0),
        (("id_map", "host_gid"), 0),
        (("id_map", "job_uid"), 0),
        (("id_map", "init_uid"), 1000),
        (("id_map", "count"), 10),
        (("id_map", "host_uid"), 2**32 - 10),
        (("steps",), []),
        (("steps", 0, "source"), "/etc"),
        (("steps", 0, "source"), "/usr/../etc"),
        (("steps", 0, "source"), "/usr2"),
        (("steps", 0, "source"), "usr"),
        (("steps", 0, "path"), "/"),
        (("steps", 0, "path"), "/a/../b"),
        (("steps", 0, "path"), "//a"),
        (("steps", 0, "path"), "/a\0b"),
        (("steps", 0, "path"), "/" + "a" * 2000),
        (("steps", 0, "op"), "exec"),
        (("steps", 0, "extra"), 1),
        (("steps", 1, "content"), "x" * 40_000),
        (("steps", 1, "mode"), 0o4755),
        (("steps", 2, "size_bytes"), True),
        (("steps", 2, "size_bytes"), -1),
        (("steps", 3, "source"), "/dev/sda"),
        (("landlock", "rules", 0, "access"), ["all"]),
        (("rlimits", 0, "name"), "cpus"),
        (("rlimits", 0, "soft"), 5),
        (("unknown",), 1),
    ],
)
def test_what_is_not_a_plan_is_refused(path: tuple[Any, ...], value: Any) -> None:
    obj = copy.deepcopy(base())
    assert parse(obj)
    at: Any = obj
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(cp.PlanError, match=r"^cannot use plan: "):
        parse(obj)


@pytest.mark.parametrize("name", ["cell_id", "level", "namespaces", "id_map", "steps", "seccomp_profile", "landlock"])
def test_a_missing_field_is_refused(name: str) -> None:
    obj = base()
    del obj[name]
    with pytest.raises(cp.PlanError, match=name):
        parse(obj)


def test_without_a_network_namespace_only_offline() -> None:
    obj = base() | {"namespaces": ["pid", "mnt", "user"]}
    with pytest.raises(cp.PlanError, match="offline"):
        parse(obj)
    assert parse(obj | {"seccomp_profile": "offline"}).seccomp_profile == "offline"


def test_the_process_level_has_neither_steps_nor_namespaces() -> None:
    obj = base() | {"level": "process", "seccomp_profile": "offline"}
    with pytest.raises(cp.PlanError):
        parse(obj)
    assert parse(obj | {"steps": [], "namespaces": []}).level == "process"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(st.data())
def test_any_json_anywhere_parses_or_is_refused(data: st.DataObject) -> None:
    obj = base()
    name = data.draw(st.sampled_from([*obj, "other"]))
    obj[name] = data.draw(JSON)
    for attempt in (obj, data.draw(JSON)):
        with contextlib.suppress(cp.PlanError):
            parse(attempt)
        with contextlib.suppress(cp.PlanError):
            cp.parse_exec(attempt)


def test_executable_specification_survives_json() -> None:
    spec = cp.ExecSpec(
        "e", ("a", "b"), (("A", "1"),), "/work", ("null", "fd", "fd"), 2, (cp.Rlimit("cpu", 1, 2),), True
    )
    assert cp.parse_exec(json.loads(json.dumps(cp.exec_to_obj(spec)))) == spec
    assert spec.fd_count == 4


@pytest.mark.parametrize(
    "change",
    [
        {"argv": []},
        {"argv": [""]},
        {"argv": ["a\0"]},
        {"argv": ["a"] * 2000},
        {"argv": ["a" * 100_000]},
        {"env": {"A=B": "1"}},
        {"env": {"1A": "1"}},
        {"env": ["A=1"]},
        {"cwd": "work"},
        {"stdio": ["fd", "fd"]},
        {"stdio": ["pipe", "fd", "fd"]},
        {"extra_fds": 17},
        {"tty": 1},
        {"shell": True},
        {"exec_id": "a/b"},
    ],
)
def test_what_is_not_an_executable_is_refused(change: dict[str, Any]) -> None:
    obj = cp.exec_to_obj(cp.ExecSpec("e", ("a",))) | change
    with pytest.raises(cp.PlanError, match=r"^cannot use plan: exec"):
        cp.parse_exec(obj)


def test_description_holds_no_control_characters() -> None:
    obj = base()
    obj["steps"].append({"op": "symlink", "path": "/a\x1b[2J", "target": "b\nc"})
    assert all(line.isprintable() for line in cp.describe(parse(obj)))
