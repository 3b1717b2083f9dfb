"""A job's history told for a person: the machine's events, replayed, one line each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from aether.contract.cells import ExecEnd
from aether.contract.store import Entry, Facts, Verdict
from aether.contract.wire import Story, StoryLine
from aether.orchestrator.jobs import machine as m

_DECODER: Final = msgspec.json.Decoder(m.AnyEvent)
_ENCODER: Final = msgspec.json.Encoder()


def entry(time: str, event: m.Event) -> Entry:
    """The event as it is kept."""
    return Entry(time=time, event=_ENCODER.encode(event))


def tell(job_id: str, kind: str, history: Iterable[Entry]) -> Story:
    """Replays `history` through the machine, so a line can say what the event led to."""
    state = m.State(kind=kind, phase="queued", facts=Facts())
    lines = []
    for kept in history:
        event = _DECODER.decode(kept.event)
        if isinstance(event, m.Submitted) and event.held:
            state = m.State(kind=kind, phase="held")
        state, commands = m.step(state, event)
        lines.append(StoryLine(time=kept.time, event=type(event).__name__, text=_text(event) + _led_to(commands)))
    return Story(job_id=job_id, lines=tuple(lines))


def _text(event: m.AnyEvent) -> str:
    match event:
        case m.Submitted():
            return "accepted and kept" + ("; waits for an approval" if event.held else "")
        case m.Released():
            return "approved"
        case m.Claimed():
            return "its turn came"
        case m.CellStarted():
            return f"runs in {event.cell_id} as {event.exec_id}"
        case m.LaunchFailed():
            return f"did not start: {event.error.message} [{event.error.code}]"
        case m.CellExited():
            return _exit_text(event.end)
        case m.Collected():
            return f"left {_count(len(event.artifacts), 'artifact')}"
        case m.CollectFailed():
            return f"outputs are gone: {event.error.message}"
        case m.EngineReplied():
            return f"the model runtime answered: {_verdict_text(event.verdict)}"
        case m.StopRequested():
            return f"asked to stop within {event.grace_ms} ms"
        case m.Finished():
            return f"ended {event.state.value}; the outcome is record {event.log_index}"
        case m.Reconciled():
            return "found again after a restart" + (f" in {event.cell.cell_id}" if event.cell else "")


def _led_to(commands: tuple[m.Command, ...]) -> str:
    said = []
    for command in commands:
        match command:
            case m.Enqueue():
                said.append("waits for its turn")
            case m.StopCell():
                said.append("its cell is being stopped")
            case m.FinishJob():
                said.append(f"verdict {_verdict_text(command.verdict)}")
    return "".join(f"; {text}" for text in said)


def _exit_text(end: ExecEnd) -> str:
    status = end.exit
    if status.code is not None:
        how = f"exited with code {status.code}"
    elif status.signal is not None:
        how = f"ended by signal {status.signal}"
    else:
        how = "ended, nobody saw how"
    marks = [name for name, on in (("timeout", status.timed_out), ("out of memory", status.oom_killed)) if on]
    marks += [status.reason] if status.reason else []
    return how + (f" ({', '.join(marks)})" if marks else "")


def _verdict_text(verdict: Verdict) -> str:
    return verdict.state.value + (f" ({verdict.error.code})" if verdict.error else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
