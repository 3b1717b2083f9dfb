"""The job machine: every phase with every event, and random walks."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aether.contract.cells import ExecEnd, ExitStatus, Usage
from aether.contract.jobs import TERMINAL, JobState
from aether.contract.store import Facts, Phase, Verdict
from aether.contract.wire import Grant, LiveCell
from aether.orchestrator.jobs import machine as m
from aether.orchestrator.jobs import story

PHASES: tuple[Phase, ...] = ("held", "queued", "launching", "running", "collecting", "finishing", "done")
ERROR = m.error_body("CELL_FAILED", "cannot launch: no")
END = ExecEnd(cell_id="cell_1", exec_id="exec_1", exit=ExitStatus(code=0), usage=Usage())
VERDICT = Verdict(state=JobState.SUCCEEDED)
GRANT = Grant(grant_id="g", job_id="j", attempt=1, reservation_id="r")
CELL = LiveCell(grant=GRANT, cell_id="cell_1", exec_id="exec_1", started_at="t")
ENDED = msgspec.structs.replace(CELL, end=END)
STARTED = m.CellStarted(cell_id="cell_1", exec_id="exec_1", started_at="t")
EVENTS: tuple[m.AnyEvent, ...] = (
    m.Submitted(),
    m.Submitted(held=True),
    m.Released(),
    m.Claimed(),
    STARTED,
    m.LaunchFailed(error=ERROR),
    m.CellExited(end=END),
    m.Collected(),
    m.CollectFailed(error=ERROR),
    m.EngineReplied(verdict=VERDICT),
    m.StopRequested(grace_ms=100),
    m.Finished(state=JobState.FAILED, log_index=3),
    m.Reconciled(),
    m.Reconciled(cell=CELL),
    m.Reconciled(cell=ENDED),
    m.Reconciled(held=True),
)
FACTS: dict[Phase, Facts] = {
    "held": Facts(),
    "queued": Facts(),
    "launching": Facts(),
    "running": Facts(cell_id="cell_1", exec_id="exec_1", started_at="t"),
    "collecting": Facts(cell_id="cell_1", exec_id="exec_1", started_at="t", end=END),
    "finishing": Facts(cell_id="cell_1", end=END, verdict=VERDICT),
    "done": Facts(verdict=VERDICT),
}
# (phase, event name) -> (next phase, names of commands), for a command job; what is not here changes nothing.
COMMAND_TABLE: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("held", "Released"): ("queued", ("Enqueue",)),
    ("held", "StopRequested"): ("finishing", ("FinishJob",)),
    ("held", "Finished"): ("done", ()),
    ("held", "Reconciled"): ("queued", ("Enqueue",)),
    ("held", "Reconciled+cell"): ("queued", ("Enqueue",)),
    ("held", "Reconciled+end"): ("queued", ("Enqueue",)),
    ("queued", "Submitted+held"): ("queued", ("Enqueue",)),
    ("queued", "Submitted"): ("queued", ("Enqueue",)),
    ("queued", "Claimed"): ("launching", ("LaunchCell",)),
    ("queued", "StopRequested"): ("finishing", ("FinishJob",)),
    ("queued", "Finished"): ("done", ()),
    ("queued", "Reconciled"): ("queued", ("Enqueue",)),
    ("queued", "Reconciled+cell"): ("queued", ("Enqueue",)),
    ("queued", "Reconciled+end"): ("queued", ("Enqueue",)),
    ("launching", "CellStarted"): ("running", ()),
    ("launching", "LaunchFailed"): ("finishing", ("FinishJob",)),
    ("launching", "CellExited"): ("launching", ()),
    ("launching", "StopRequested"): ("launching", ()),
    ("launching", "Finished"): ("done", ()),
    ("launching", "Reconciled"): ("launching", ("LaunchCell",)),
    ("launching", "Reconciled+cell"): ("running", ()),
    ("launching", "Reconciled+end"): ("collecting", ("CollectOutputs",)),
    ("running", "CellExited"): ("collecting", ("CollectOutputs",)),
    ("running", "StopRequested"): ("running", ("StopCell",)),
    ("running", "Finished"): ("done", ()),
    ("running", "Reconciled"): ("finishing", ("FinishJob",)),
    ("running", "Reconciled+cell"): ("running", ()),
    ("running", "Reconciled+end"): ("collecting", ("CollectOutputs",)),
    ("collecting", "Collected"): ("finishing", ("FinishJob",)),
    ("collecting", "CollectFailed"): ("finishing", ("FinishJob",)),
    ("collecting", "Finished"): ("done", ()),
    ("collecting", "Reconciled"): ("collecting", ("CollectOutputs",)),
    ("collecting", "Reconciled+cell"): ("collecting", ("CollectOutputs",)),
    ("collecting", "Reconciled+end"): ("collecting", ("CollectOutputs",)),
    ("finishing", "Finished"): ("done", ()),
    ("finishing", "Reconciled"): ("finishing", ("FinishJob",)),
    ("finishing", "Reconciled+cell"): ("finishing", ("FinishJob",)),
    ("finishing", "Reconciled+end"): ("finishing", ("FinishJob",)),
}
MODEL_FACTS = {"running": Facts(), "finishing": Facts(verdict=VERDICT), "done": Facts(verdict=VERDICT)}
MODEL_TABLE: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("queued", "Submitted"): ("running", ("RunModel",)),
    ("held", "Released"): ("running", ("RunModel",)),
    ("held", "Reconciled"): ("running", ("RunModel",)),
    ("held", "Reconciled+held"): ("held", ()),
    ("held", "StopRequested"): ("finishing", ("FinishJob",)),
    ("running", "EngineReplied"): ("finishing", ("FinishJob",)),
    ("running", "StopRequested"): ("finishing", ("FinishJob",)),
    ("running", "Finished"): ("done", ()),
    ("running", "Reconciled"): ("running", ("RunModel",)),
    ("finishing", "Finished"): ("done", ()),
    ("finishing", "Reconciled"): ("finishing", ("FinishJob",)),
}


def _name(event: m.AnyEvent) -> str:
    if isinstance(event, m.Submitted | m.Reconciled) and event.held:
        return f"{type(event).__name__}+held"
    if isinstance(event, m.Reconciled) and event.cell is not None:
        return "Reconciled+end" if event.cell.end is not None else "Reconciled+cell"
    return type(event).__name__


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("event", EVENTS, ids=_name)
def test_every_phase_with_every_event(phase: Phase, event: m.AnyEvent) -> None:
    state = m.State("command", phase, FACTS[phase])
    after, commands = m.step(state, event)
    expected = COMMAND_TABLE.get((phase, _name(event)))
    if expected is None:
        assert after == state and commands == ()
    else:
        assert (after.phase, tuple(type(c).__name__ for c in commands)) == expected


@pytest.mark.parametrize(("key", "expected"), MODEL_TABLE.items())
def test_model_jobs(key: tuple[str, str], expected: tuple[str, tuple[str, ...]]) -> None:
    event = next(e for e in EVENTS if _name(e) == key[1])
    state = m.State("model", key[0], MODEL_FACTS.get(key[0], Facts()))  # type: ignore[arg-type]
    after, commands = m.step(state, event)
    assert (after.phase, tuple(type(c).__name__ for c in commands)) == expected


@pytest.mark.parametrize(
    ("status", "stop", "state", "code"),
    [
        (ExitStatus(code=0), None, JobState.SUCCEEDED, None),
        (ExitStatus(code=0, oom_killed=True), None, JobState.SUCCEEDED, None),
        (ExitStatus(code=1), None, JobState.FAILED, "JOB_FAILED"),
        (ExitStatus(signal=11), None, JobState.FAILED, "JOB_FAILED"),
        (ExitStatus(signal=9, oom_killed=True), None, JobState.FAILED, "OUT_OF_MEMORY"),
        (ExitStatus(signal=9, reason="disk-limit"), None, JobState.FAILED, "DISK_LIMIT"),
        (ExitStatus(signal=9, timed_out=True), None, JobState.TIMED_OUT, "TIMED_OUT"),
        (ExitStatus(signal=9, timed_out=True), 10, JobState.TIMED_OUT, "TIMED_OUT"),
        (ExitStatus(signal=15), 10, JobState.CANCELLED, "CANCELLED"),
        (ExitStatus(signal=9, reason="killed"), None, JobState.CANCELLED, "CANCELLED"),
        (ExitStatus(reason="spawner-died"), None, JobState.LOST, "LOST"),
        (ExitStatus(signal=9, reason="spawner-died"), None, JobState.LOST, "LOST"),
        (ExitStatus(), None, JobState.LOST, "LOST"),
    ],
)
def test_how_an_end_is_judged(status: ExitStatus, stop: int | None, state: JobState, code: str | None) -> None:
    facts = Facts(end=msgspec.structs.replace(END, exit=status), stop_grace_ms=stop)
    verdict = m.conclude(facts, m.Collected())
    assert (verdict.state, verdict.error.code if verdict.error else None) == (state, code)


def test_a_refused_output_fails_a_good_job_only() -> None:
    refused = m.Collected(error=m.error_body("OUTPUT_REFUSED", "cannot keep it"))
    good = m.conclude(Facts(end=END), refused)
    assert good.state is JobState.FAILED and good.error is not None and good.error.code == "OUTPUT_REFUSED"
    bad = m.conclude(Facts(end=msgspec.structs.replace(END, exit=ExitStatus(code=2))), refused)
    assert bad.error is not None and bad.error.code == "JOB_FAILED"


def test_a_stop_before_the_start_stops_at_the_start() -> None:
    state = m.State("command", "launching")
    state, commands = m.step(state, m.StopRequested(grace_ms=7))
    assert commands == ()
    _, commands = m.step(state, STARTED)
    assert commands == (m.StopCell(7),)
    _, commands = m.step(state, m.Reconciled())
    assert isinstance(commands[0], m.FinishJob) and commands[0].verdict.state is JobState.CANCELLED


def test_an_end_that_overtakes_the_start() -> None:
    state, _ = m.step(m.State("command", "launching"), m.CellExited(end=END))
    after, commands = m.step(state, STARTED)
    assert after.phase == "collecting" and commands == (m.CollectOutputs(),)
    after, commands = m.step(state, m.Reconciled())
    assert after.phase == "collecting", "it ran already, so it must not be launched again"


@given(
    st.sampled_from(["command", "model"]),
    st.sampled_from(["held", "queued"]),
    st.lists(st.sampled_from(EVENTS), max_size=40),
)
def test_walks(kind: str, start: Phase, events: list[m.AnyEvent]) -> None:
    """One verdict at most, never changed; done is for ever; every state survives its encoding and its story."""
    state = m.State(kind, start)
    state, _ = m.step(state, m.Submitted(held=start == "held"))
    verdicts: list[Verdict] = []
    history = []
    for event in events:
        before = state
        state, commands = m.step(state, event)
        history.append(story.entry("2026-01-01T00:00:00.000000Z", event))
        verdicts += [command.verdict for command in commands if isinstance(command, m.FinishJob)]
        assert PHASES.index(state.phase) >= PHASES.index(before.phase), "a job never goes back"
        if before.phase == "done":
            assert state == before and commands == ()
        assert msgspec.json.decode(msgspec.json.encode(state.facts), type=Facts) == state.facts
    assert all(verdict == verdicts[0] for verdict in verdicts)
    assert all(verdict.state in TERMINAL for verdict in verdicts)
    told = story.tell("job_1", kind, history)
    assert len(told.lines) == len(events) and all(line.text for line in told.lines)


@given(st.lists(st.sampled_from(EVENTS), max_size=10))
def test_repeating_an_event_changes_nothing_more(events: list[m.AnyEvent]) -> None:
    """At-least-once delivery: the second of two equal events leaves the state as it is."""
    state = m.State("command", "queued")
    for event in events:
        once, _ = m.step(state, event)
        twice, _ = m.step(once, event)
        assert replace(twice) == once
        state = once


def test_every_event_is_in_the_table() -> None:
    assert {type(event) for event in EVENTS} == set(m.HANDLED)
    assert {key[0] for key in COMMAND_TABLE} == set(PHASES) - {"done"}


@pytest.mark.parametrize(
    ("phase", "event"),
    [
        ("running", m.CellExited(end=END)),
        ("running", m.Reconciled(cell=ENDED)),
        ("launching", m.Reconciled(cell=ENDED)),
    ],
)
def test_a_command_without_outputs_is_judged_when_it_ends(phase: Phase, event: m.AnyEvent) -> None:
    facts = msgspec.structs.replace(FACTS[phase], collects=False)
    state, commands = m.step(m.State("command", phase, facts), event)
    verdict = state.facts.verdict
    assert state.phase == "finishing" and commands == (m.FinishJob(verdict),)
    assert verdict is not None and verdict.state is JobState.SUCCEEDED and verdict.exit == END.exit


def test_an_end_that_overtook_the_start_is_judged_with_it() -> None:
    facts = Facts(collects=False)
    overtaken, none = m.step(m.State("command", "launching", facts), m.CellExited(end=END))
    assert overtaken.phase == "launching" and none == ()
    state, commands = m.step(overtaken, STARTED)
    assert state.phase == "finishing" and len(commands) == 1 and state.facts.started_at == "t"
