"""Which driver and level the words of `require` choose; what is not there fails closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.cellplan import DRIVERS, parse_plan, to_obj
from aether.contract.cells import REQUIREMENTS, RUNGS, CellSpec
from aether.contract.errors import AetherError
from aether.contract.network import Network
from aether.substrate.cells import levels
from aether.substrate.cells.facts import Facts, Lack, read_facts
from aether.substrate.cells.plan import plan_cell
from tests.unit.substrate.cells.test_plan import HELLO

FACTS = read_facts(HELLO)
SPEC = CellSpec(argv=("sh",))


def refusal(words: Sequence[str], facts: Facts = FACTS) -> AetherError:
    with pytest.raises(AetherError) as refused:
        levels.require(words, facts)
    assert refused.value.code == "LEVEL_UNMET" and refused.value.remedy
    return refused.value


@pytest.mark.parametrize(
    ("words", "driver", "level"),
    [
        ((), "native", "cell"),
        (("cell", "landlock"), "native", "cell"),
        (("native",), "native", "cell"),
        (("runc", "cell", "landlock"), "runc", "cell"),
        (("gvisor",), "runsc", "gvisor"),
        (("runsc", "gvisor", "netns"), "runsc", "gvisor"),
    ],
)
def test_the_driver_that_words_choose(words: tuple[str, ...], driver: str, level: str) -> None:
    levels.require(words, FACTS)
    assert levels.choose(words, FACTS) == driver and levels.level_of(driver, FACTS) == level
    plan = plan_cell(CellSpec(argv=("sh",), require=words), "cell_a", "exec_a", FACTS, 0).plan
    assert (plan.driver, plan.level) == (driver, level)
    assert parse_plan(to_obj(plan), source_roots=("/",)) == plan


@pytest.mark.parametrize("word", ["microvm", "pod", "wasm"])
def test_levels_without_a_driver_fail_closed(word: str) -> None:
    assert f"cannot meet the required level {word}: no driver" in refusal([word]).message


def test_a_runtime_that_is_not_there_fails_closed() -> None:
    assert "crun is not installed" in refusal(["crun"]).message
    absent = replace(FACTS, drivers={**FACTS.drivers, "runsc": Lack("runsc is not installed", "apt install runsc")})
    assert refusal(["gvisor"], absent).message == "cannot meet the required level gvisor: runsc is not installed"
    assert levels.levels_here(absent) == ("process", "cell")
    assert levels.levels_here(FACTS) == ("process", "cell", "gvisor")


def test_a_cell_has_one_driver() -> None:
    assert "one driver" in refusal(["runc", "native"]).message
    assert "one driver" in refusal(["runc", "gvisor"]).message


def test_runtimes_need_what_cells_need() -> None:
    bare = replace(FACTS, level="process", missing={"cell": Lack("no namespaces", "allow them")})
    assert "no namespaces" in refusal(["runc"], bare).message


def test_what_gvisor_lacks_is_refused_or_said() -> None:
    assert "Landlock" in refusal(["gvisor", "landlock"]).message
    assert "processes" in refusal(["runsc", "cgroup-pids"]).message
    planned = plan_cell(CellSpec(argv=("sh",), require=("gvisor",)), "cell_a", "exec_a", FACTS, 0)
    assert planned.plan.landlock is None and {"landlock", "cgroup-pids", "tmpfs-inodes"} <= planned.missing.keys()
    native = plan_cell(SPEC, "cell_a", "exec_a", FACTS, 0)
    assert planned.limits["pids"] == native.limits["pids"] + levels.SENTRY_PIDS


@pytest.mark.parametrize("change", [{"network": Network(allow=("a.example:443",))}, {"isolate_network": False}])
def test_gvisor_has_no_network_to_share(change: dict[str, object]) -> None:
    spec = CellSpec(argv=("sh",), require=("gvisor",), **change)  # type: ignore[arg-type]
    with pytest.raises(AetherError) as refused:
        plan_cell(spec, "cell_a", "exec_a", FACTS, 0)
    assert refused.value.code == "LEVEL_UNMET"


@given(st.sets(st.sampled_from(sorted(REQUIREMENTS))))
def test_whatever_is_required_is_planned_or_refused(words: set[str]) -> None:
    try:
        levels.require(sorted(words), FACTS)
    except AetherError as error:
        assert error.code == "LEVEL_UNMET" and error.remedy
        return
    driver = levels.choose(sorted(words), FACTS)
    assert words & set(DRIVERS) <= {driver}
    assert words & set(RUNGS) <= {"process", "cell", levels.level_of(driver, FACTS)}
