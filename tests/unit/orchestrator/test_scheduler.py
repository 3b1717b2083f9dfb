"""Tenants take turns, within each it is first in, first out, within the bound."""

from __future__ import annotations

from aether.orchestrator.queue.scheduler import Scheduler


def _ready(running_max: int) -> Scheduler:
    scheduler = Scheduler(running_max)
    scheduler.paused = False
    return scheduler


def test_order_and_bound() -> None:
    scheduler = _ready(2)
    for job_id in "abc":
        scheduler.enqueue(job_id, "t")
    assert [scheduler.claim(), scheduler.claim(), scheduler.claim()] == ["a", "b", None]
    scheduler.moved("a", "finishing")
    assert scheduler.claim() == "c"
    assert (scheduler.waiting, scheduler.running) == (0, 2)


def test_a_job_waits_once_and_not_while_it_runs() -> None:
    scheduler = _ready(1)
    scheduler.enqueue("a", "t")
    scheduler.enqueue("a", "t")
    assert scheduler.claim() == "a"
    scheduler.enqueue("a", "t")
    assert scheduler.waiting == 0


def test_nothing_is_claimed_while_paused() -> None:
    scheduler = Scheduler(1)
    scheduler.enqueue("a", "t")
    assert scheduler.claim() is None


def test_a_stopped_job_leaves_the_queue() -> None:
    scheduler = _ready(1)
    scheduler.enqueue("a", "t")
    scheduler.moved("a", "finishing")
    assert scheduler.claim() is None


def test_running_jobs_of_an_earlier_process_hold_their_places() -> None:
    scheduler = _ready(1)
    scheduler.moved("old", "running")
    scheduler.enqueue("new", "t")
    assert scheduler.claim() is None
    scheduler.moved("old", "finishing")
    assert scheduler.claim() == "new"


def test_tenants_take_turns() -> None:
    """Whoever comes with one job is next, however many another has waiting."""
    scheduler = _ready(100)
    for number in range(5):
        scheduler.enqueue(f"many-{number}", "many")
    assert scheduler.claim() == "many-0"
    scheduler.enqueue("one", "few")
    scheduler.enqueue("two", "few")
    claimed = [scheduler.claim() for _ in range(7)]
    assert claimed == ["many-1", "one", "many-2", "two", "many-3", "many-4", None]
    assert scheduler.waiting == 0 and not scheduler._queues
