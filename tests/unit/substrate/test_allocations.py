"""The fold of allocated cells: live and from a snapshot it is the same, and names are free again when cells end."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aether.contract.records import Record, RecordType
from aether.substrate.allocations import ENDED_KEPT, Allocations

TIME = "2026-09-21T13:33:20.000000Z"
CELLS = [f"cell_01900000-0000-7000-8000-{number:012d}" for number in range(4)]
NAMES = ["a", "a/b", "c"]
KINDS: list[RecordType] = [
    "cell.started",
    "cell.frozen",
    "cell.thawed",
    "cell.resized",
    "cell.put",
    "cell.freed",
    "cell.lost",
]


def record(kind: RecordType, cell: str, name: str, tenant: str = "t", spec: str = "s0") -> Record:
    detail = {"name": name, "spec": spec, "reason": "why"}
    return Record(type=kind, log_index=0, time=TIME, node_id="n", tenant_id=tenant, cell_id=cell, detail=detail)


def state(found: Allocations) -> dict[str, Any]:
    return {cell_id: (c.name, c.state, c.spec, c.frozen) for cell_id, c in found.live.items()}


EVENTS = st.lists(
    st.tuples(st.sampled_from(["cell.allocated", *KINDS]), st.sampled_from(CELLS), st.sampled_from(NAMES)), max_size=30
)


@given(EVENTS, st.integers(0, 30))
def test_snapshot_and_tail_equal_the_whole_fold(events: list[tuple[RecordType, str, str]], cut: int) -> None:
    whole, head = Allocations(), Allocations()
    taken: set[str] = set()
    history = []
    for kind, cell, name in events:
        if kind == "cell.allocated" and (cell in taken or whole.named("t", name) is not None):
            continue  # the authority admits neither
        taken.add(cell)
        history.append(record(kind, cell, name))
        whole.apply(history[-1])
    for each in history[:cut]:
        head.apply(each)
    resumed = Allocations()
    resumed.restore(head.snapshot())
    for each in history[cut:]:
        resumed.apply(each)
    assert state(resumed) == state(whole)
    for cell in whole.live.values():
        assert whole.named("t", cell.name) is cell
    assert sorted(c.name for c in whole.of_tenant("t")) == sorted({c.name for c in whole.live.values()})


def test_names_belong_to_tenants_and_are_free_again() -> None:
    cells = Allocations()
    for cell, tenant in zip(CELLS, ("t", "u"), strict=False):
        cells.apply(record("cell.allocated", cell, "a", tenant))
    assert (cells.named("t", "a") or cells).cell_id == CELLS[0]  # type: ignore[union-attr]
    assert cells.find("u", CELLS[0]) is None, "an id of another tenant is not to be seen"
    cells.apply(record("cell.freed", CELLS[0], "a"))
    found = cells.find("t", "a")
    assert cells.named("t", "a") is None and found is not None and found.reason == "why"
    cells.apply(record("cell.allocated", CELLS[2], "a"))
    assert cells.find("t", "a") is cells.live[CELLS[2]]


def test_few_ended_cells_are_kept() -> None:
    cells = Allocations()
    for number in range(ENDED_KEPT + 10):
        cell = f"cell_01900000-0000-7000-8000-{number:012d}"
        cells.apply(record("cell.allocated", cell, "a"))
        cells.apply(record("cell.lost", cell, "a"))
    assert cells.find_any(CELLS[0]) is None and cells.find_any(cell) is not None


def test_guests_come_and_go() -> None:
    cells = Allocations()
    cells.apply(record("cell.allocated", CELLS[0], "a"))
    cells.entered(CELLS[0], "job_1")
    cells.entered(CELLS[0], "job_2")
    cells.left(CELLS[0], "job_1", TIME)
    cells.apply(record("cell.freed", CELLS[0], "a"))
    ended = cells.find_any(CELLS[0])
    assert ended is not None and list(ended.jobs) == ["job_2"]
    cells.left(CELLS[0], "job_2", TIME)
    assert not ended.jobs
