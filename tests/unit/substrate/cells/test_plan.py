"""From specification to plan: defaults, what a lesser host gets, and failing closed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract import limits
from aether.contract.cellids import IdSpace, root_space
from aether.contract.cellplan import BindRo, BindRw, Rlimit, Tmpfs, parse_exec, parse_plan, to_obj
from aether.contract.cellplan import exec_to_obj as to_exec_obj
from aether.contract.cells import CellSpec, Images, Limits, Sched
from aether.contract.errors import AetherError
from aether.substrate.cells.facts import Facts, Lack, read_facts
from aether.substrate.cells.plan import check_spec, plan_cell

HELLO: dict[str, Any] = {
    "instance": "abcd1234",
    "work_root": "/state/cells/abcd1234",
    "logs": "/state/logs/jobs",
    "uid": 0,
    "gid": 0,
    "ids": asdict(root_space()),
    "executor": "native",
    "python": "/opt/venv/bin/python",
    "drivers": {
        "runc": {"path": "/usr/sbin/runc", "reason": "", "remedy": ""},
        "crun": {"path": "", "reason": "crun is not installed", "remedy": "apt install crun"},
        "runsc": {"path": "/usr/bin/runsc", "reason": "", "remedy": ""},
    },
    "cgroup": {"missing": {"io_weight": "no"}, "remedy": ""},
    "host": {
        "missing": {},
        "landlock_abi": 7,
        "root_steps": [{"op": "bind_ro", "path": "/usr", "source": "/usr"}, {"op": "proc", "path": "/proc"}],
        "landlock_rules": [{"path": "/", "access": ["read", "execute"]}],
        "python": {"executable": "/opt/aether/venv/bin/python", "path": "/opt/aether/src"},
    },
}


@pytest.fixture
def facts() -> Facts:
    return read_facts(HELLO)


def lesser(**missing: str) -> Facts:
    facts = read_facts(HELLO)
    lacks = {name.replace("_", "-"): Lack(reason, f"fix {name}") for name, reason in missing.items()}
    return replace(facts, missing=lacks)


SPEC = CellSpec(argv=("sh", "-c", "true"))


def test_defaults(facts: Facts) -> None:
    planned = plan_cell(SPEC, "cell_a", "exec_a", facts, 5)
    plan = planned.plan
    assert plan.level == "cell" and set(plan.namespaces) == {"user", "pid", "mnt", "net", "ipc", "uts", "cgroup"}
    assert plan.seccomp_profile == "cell" and plan.landlock is not None
    assert plan.id_map.host_uid == limits.CELL_UID_BASE + 5 * limits.CELL_UID_BLOCK and plan.id_map.count == 65536
    assert Tmpfs("/tmp", limits.TMP_BYTES_DEFAULT) in plan.steps
    assert BindRw("/work", "/state/cells/abcd1234/cell_a") in plan.steps
    assert Rlimit("core", 1, 1) in plan.rlimits and Rlimit("nofile", 1024, 1024) in plan.rlimits
    assert not {"data", "nproc"} & {limit.name for limit in plan.rlimits}
    assert planned.limits == {
        "memory_bytes": limits.MEMORY_BYTES_DEFAULT,
        "swap_bytes": 0,
        "cpu_millis": 1000,
        "pids": limits.PIDS_DEFAULT + 1,
        "disk_bytes": limits.DISK_BYTES_DEFAULT,
    }
    assert planned.missing == {} and planned.executable.cwd == "/work"
    assert dict(planned.executable.env)["HOME"] == "/work"


def test_readonly_dirs_are_shown_and_allowed_to_be_read(facts: Facts) -> None:
    spec = CellSpec(argv=("x",), readonly_dirs={"model": "/state/models/m/1"})
    plan = plan_cell(spec, "cell_a", "exec_a", facts, 0).plan
    assert BindRo("/mnt/model", "/state/models/m/1") in plan.steps
    assert plan.landlock is not None
    rules = {rule.path: rule.access for rule in plan.landlock.rules}
    assert rules["/mnt/model"] == ("read", "execute") and "write" in rules["/work"]


def test_requirements_fail_closed_with_reason_and_remedy() -> None:
    facts = lesser(netns="the kernel says no")
    for word in ("netns",):
        with pytest.raises(AetherError) as refused:
            plan_cell(CellSpec(argv=("x",), require=(word,)), "c", "e", facts, 0)
        assert refused.value.code == "LEVEL_UNMET"
        assert "the kernel says no" in refused.value.message and refused.value.remedy == "fix netns"
    plan_cell(CellSpec(argv=("x",), require=("seccomp", "process")), "c", "e", facts, 0)


def test_rlimits_stand_in_for_cgroups() -> None:
    facts = lesser(cgroup_memory="not delegated", cgroup_pids="not delegated")
    planned = plan_cell(CellSpec(argv=("x",), limits=Limits(memory_bytes=1 << 28, pids=9)), "c", "e", facts, 0)
    assert Rlimit("data", 1 << 28, 1 << 28) in planned.plan.rlimits
    assert Rlimit("nproc", 10, 10) in planned.plan.rlimits
    assert "bpf" not in plan_cell(SPEC, "cell_1", "exec_1", lesser(bpf="not permitted"), 0).missing
    assert "RLIMIT_DATA" in planned.missing["cgroup-memory"] and "RLIMIT_NPROC" in planned.missing["cgroup-pids"]


def lent(level: str = "cell") -> Facts:
    ids = IdSpace("subordinate", user=1000, first=1, block=2, slots=8, lent=100_000)
    return replace(lesser(cgroup_pids="not delegated"), ids=ids, level=level)


def test_lent_ids_are_given_in_pairs() -> None:
    planned = plan_cell(SPEC, "cell_a", "exec_a", lent(), 3)
    ids = planned.plan.id_map
    assert (ids.count, ids.host_uid, ids.job_host) == (2, 7, (8, 8)) and lent().ids.host(8) == 100_007
    assert "own-uids" not in planned.missing and "daemon-uids" in planned.missing
    assert "per cell" in planned.missing["cgroup-pids"]


def test_layers_of_images_cannot_be_shown_as_a_lent_id() -> None:
    shown = CellSpec(argv=("x",), images=Images(root="sha256:" + "0" * 64))
    planned = plan_cell(shown, "cell_a", "exec_a", lent(), 3)
    assert planned.plan.id_map.count == 1 and "shows an image" in planned.missing["own-uids"]


def test_process_level_has_no_steps_and_no_network() -> None:
    hello = json.loads(json.dumps(HELLO))
    hello["uid"] = hello["gid"] = 1000
    hello["ids"] = asdict(IdSpace("own", 1000))
    hello["host"]["missing"] = {"cell": {"reason": "no user namespaces", "remedy": "allow them"}}
    hello["host"]["root_steps"] = []
    facts = read_facts(hello)
    planned = plan_cell(CellSpec(argv=("x",), cwd="/work/sub"), "cell_a", "e", facts, 0)
    plan = planned.plan
    assert (plan.level, plan.namespaces, plan.steps, plan.seccomp_profile) == ("process", (), (), "offline")
    assert plan.id_map.count == 1 and plan.id_map.host_uid == 1000
    assert plan.landlock is not None and not plan.landlock.tcp
    assert planned.executable.cwd == "/state/cells/abcd1234/cell_a/sub"
    assert planned.missing["cell"] == "no user namespaces"
    with pytest.raises(AetherError, match="no user namespaces"):
        plan_cell(CellSpec(argv=("x",), require=("cell",)), "c", "e", facts, 0)


def test_the_own_interpreter_is_found_where_the_cell_has_it(facts: Facts) -> None:
    spec = CellSpec(argv=("/opt/venv/bin/python", "-V"))
    executable = plan_cell(spec, "c", "e", facts, 0).executable
    assert executable.argv[0] == "/opt/aether/venv/bin/python"
    assert dict(executable.env)["PYTHONPATH"] == "/opt/aether/src"
    assert "PYTHONPATH" not in dict(plan_cell(SPEC, "c", "e", facts, 0).executable.env)


def test_document_names_the_environment_but_not_its_values(facts: Facts) -> None:
    spec = CellSpec(argv=("x",), env={"TOKEN": "hunter2"})
    planned = plan_cell(spec, "c", "e", facts, 0)
    document = planned.document()
    assert b"TOKEN" in document and b"hunter2" not in document
    assert "hunter2" not in "\n".join(planned.lines())
    assert document == plan_cell(spec, "c", "e", facts, 0).document()


@pytest.mark.parametrize(
    "spec",
    [
        CellSpec(argv=("x",), require=("everything",)),
        CellSpec(argv=("x",), readonly_dirs={"../x": "/usr"}),
        CellSpec(argv=("x",), readonly_dirs={"a/b": "/usr"}),
        CellSpec(argv=("x",), readonly_dirs={"a": "usr"}),
    ],
)
def test_bad_specifications(spec: CellSpec) -> None:
    with pytest.raises(AetherError) as refused:
        check_spec(spec)
    assert refused.value.code == "BAD_FIELD"


WORDS = st.text("abc /.-_\u00e9", min_size=1, max_size=10)


@given(
    st.lists(WORDS, min_size=1, max_size=4).map(tuple),
    st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,6}", fullmatch=True), WORDS, max_size=4),
    st.integers(0, limits.CELL_UID_SLOTS - 1),
    st.integers(0, 1 << 40),
)
def test_every_plan_passes_the_parser_that_guards_the_spawner(
    argv: tuple[str, ...], env: dict[str, str], slot: int, tmp_bytes: int
) -> None:
    spec = CellSpec(argv=argv, env=env, limits=Limits(tmp_bytes=tmp_bytes), channel=bool(slot % 2))
    planned = plan_cell(spec, "cell_a", "exec_a", read_facts(HELLO), slot)
    plan = json.loads(json.dumps(to_obj(planned.plan)))
    assert parse_plan(plan, source_roots=("/usr", "/state/cells")) == planned.plan
    assert parse_exec(json.loads(json.dumps(to_exec_obj(planned.executable)))) == planned.executable


def test_optional_limits_and_the_class_are_asked_for(facts: Facts) -> None:
    plain = plan_cell(CellSpec(argv=("true",)), "c", "e", facts, 0)
    assert set(plain.limits) == {"memory_bytes", "swap_bytes", "cpu_millis", "pids", "disk_bytes"}
    assert plain.sched is None
    wanted = Limits(cpu_weight=20, io_weight=30, cpuset_cpus="0-1", swap_bytes=4096, sched=Sched(policy="idle"))
    planned = plan_cell(CellSpec(argv=("true",), limits=wanted), "c", "e", facts, 0)
    assert planned.limits["cpu_weight"] == 20 and planned.limits["cpuset_cpus"] == "0-1"
    assert planned.limits["swap_bytes"] == 4096
    assert planned.missing["io_weight"] == "no" and "io_weight" not in plain.missing
    assert planned.sched is not None and planned.sched["policy"] == "idle"
    assert any("cgroup limit cpu_weight: 20" in line for line in planned.lines())
    assert any(line.startswith("schedule as policy idle") for line in planned.lines())
    assert json.loads(planned.document())["sched"]["policy"] == "idle" and planned.document() != plain.document()
