"""First in, first out, within the bound."""

from __future__ import annotations

from aether.orchestrator.queue.scheduler import Scheduler


def _ready(running_max: int) -> Scheduler:
    scheduler = Scheduler(running_max)
    scheduler.paused = False
    return scheduler


def test_order_and_bound() -> None:
    scheduler = _ready(2)
    for job_id in "abc":
        scheduler.enqueue(job_id)
    assert [scheduler.claim(), scheduler.claim(), scheduler.claim()] == ["a", "b", None]
    scheduler.moved("a", "finishing")
    assert scheduler.claim() == "c"
    assert (scheduler.waiting, scheduler.running) == (0, 2)


def test_a_job_waits_once_and_not_while_it_runs() -> None:
    scheduler = _ready(1)
    scheduler.enqueue("a")
    scheduler.enqueue("a")
    assert scheduler.claim() == "a"
    scheduler.enqueue("a")
    assert scheduler.waiting == 0


def test_nothing_is_claimed_while_paused() -> None:
    scheduler = Scheduler(1)
    scheduler.enqueue("a")
    assert scheduler.claim() is None


def test_a_stopped_job_leaves_the_queue() -> None:
    scheduler = _ready(1)
    scheduler.enqueue("a")
    scheduler.moved("a", "finishing")
    assert scheduler.claim() is None


def test_running_jobs_of_an_earlier_process_hold_their_places() -> None:
    scheduler = _ready(1)
    scheduler.moved("old", "running")
    scheduler.enqueue("new")
    assert scheduler.claim() is None
    scheduler.moved("old", "finishing")
    assert scheduler.claim() == "new"
