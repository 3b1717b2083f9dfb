"""One effect per Idempotency-Key: a call repeated under its key gets the answer of the first and does nothing.

A key counts for one ticket of one principal and one operation, for IDEMPOTENCY_WINDOW_S. Other input under the same key
is IDEMPOTENCY_CONFLICT; a repetition that comes while the first is served waits for it. A refused call leaves no key.

The record of the effect carries the key (`substrate.keymark`), so that after a death of aetherd the call is still not
done again. Answers are remembered in memory alone; one that is not there any more is made anew from what stands
(`again`), and where that cannot be, the refusal ANSWER_NOT_KEPT names the record of what was done. An answer that tells
a secret is never kept. What leaves no record is harmless to repeat, by the table; so is a call that failed after its
record where the table says that it is idempotent, and that is done again.

`job.submit` does the same by itself: its intent is the record, its job the answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from aether.contract import limits
from aether.contract.calls import Caller, Reply
from aether.contract.canonical import digest_bytes
from aether.contract.cellcalls import UpgradeReply
from aether.contract.errors import AetherError
from aether.substrate.book import Book
from aether.substrate.keymark import MARK, Mark
from aether.substrate.ledger import KeyEntry

ANSWERS_KEPT_MAX: Final = 4_096
OWN_WAY: Final = "job.submit"

Answer = Reply | UpgradeReply
Handler = Callable[[Caller, Any], Awaitable[Answer]]
Again = Callable[[Caller, Any, KeyEntry, str], Awaitable[Answer]]
"""Makes an answer anew: the repeated call, what its key stands for, and the key's hash."""


@dataclass(frozen=True, slots=True)
class Keyed:
    """Of the operations table: which operations take a key, which of them are idempotent by nature, and which tell a
    secret."""

    names: frozenset[str]
    idempotent: frozenset[str]
    secret: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Kept:
    """An answer, and the input that it answered."""

    request_hash: str
    answer: Answer
    expires_ns: int


class Repeats:
    """See the module head. `bearer` names the principal and ticket that a caller acts as at a
    time (ns); it raises AetherError."""

    def __init__(
        self, book: Book, bearer: Callable[[Caller, int], str], keyed: Keyed, again: Mapping[str, Again]
    ) -> None:
        self._book = book
        self._bearer = bearer
        self._keyed = keyed
        self._again = again
        self._in_flight: dict[str, asyncio.Event] = {}
        self._unfinished: dict[str, Mark] = {}
        self._answers: OrderedDict[str, _Kept] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Repeats in_flight={len(self._in_flight)} answers={len(self._answers)}>"

    async def once(self, operation: str, run: Handler, caller: Caller, call: Any) -> Answer:
        """The answer of `run`, or of the first call under the same key."""
        if caller.idempotency_key is None or operation not in self._keyed.names or operation == OWN_WAY:
            return await run(caller, call)
        try:
            key_hash = self._key_hash(operation, caller)
        except AetherError:
            return await run(caller, call)  # it refuses, too, and records that it did
        request_hash = await _request_hash(call)
        while (first := self._in_flight.get(key_hash)) is not None:
            await first.wait()
        known = self._known(key_hash)
        unfinished = self._unfinished.get(key_hash)
        if unfinished is not None and unfinished.request_hash == request_hash:
            return await self._first(unfinished, run, caller, call)
        if known is not None:
            _close(call)
            return await self._repeated(operation, caller, call, known, key_hash, request_hash)
        return await self._first(Mark(operation, key_hash, request_hash), run, caller, call)

    async def _first(self, mark: Mark, run: Handler, caller: Caller, call: Any) -> Answer:
        now_ns = self._book.now_ns()
        if not self._book.ledger.has_room_for_keys(now_ns):
            _close(call)
            why = "too many idempotency keys in the window"
            raise AetherError("BUSY", f"cannot {mark.operation}: {why}", retry_after_s=5)
        done = self._in_flight[mark.key_hash] = asyncio.Event()
        token = MARK.set(mark)
        try:
            answer = await run(caller, call)
        except AetherError:
            if mark.written and mark.operation in self._keyed.idempotent:
                self._leave(mark)
            raise
        finally:
            MARK.reset(token)
            del self._in_flight[mark.key_hash]
            done.set()
        self._unfinished.pop(mark.key_hash, None)
        if mark.operation not in self._keyed.secret and isinstance(answer, msgspec.Struct):
            self._keep(mark, answer, now_ns)
        return answer

    async def _repeated(
        self, operation: str, caller: Caller, call: Any, known: _Kept | KeyEntry, key_hash: str, request_hash: str
    ) -> Answer:
        asked = known.request_hash if isinstance(known, _Kept) else known.input_hash
        if asked != request_hash:
            why = "the Idempotency-Key already stands for a call with other input"
            raise AetherError("IDEMPOTENCY_CONFLICT", f"cannot {operation}: {why}")
        if isinstance(known, _Kept):
            return known.answer
        again = self._again.get(operation)
        if again is None:
            why = f"it was done (record {known.log_index}), and its answer is not kept"
            details = {"log_index": known.log_index}
            raise AetherError("ANSWER_NOT_KEPT", f"cannot {operation} again: {why}", details=details)
        return await again(caller, call, known, key_hash)

    def _key_hash(self, operation: str, caller: Caller) -> str:
        who = self._bearer(caller, self._book.now_ns())
        return digest_bytes(f"{who}\0{operation}\0{caller.idempotency_key}".encode())

    def _known(self, key_hash: str) -> _Kept | KeyEntry | None:
        now_ns = self._book.now_ns()
        while self._answers and next(iter(self._answers.values())).expires_ns <= now_ns:
            self._answers.popitem(last=False)
        return self._answers.get(key_hash) or self._book.ledger.remembered(key_hash, now_ns)

    def _leave(self, mark: Mark) -> None:
        self._unfinished[mark.key_hash] = mark
        if len(self._unfinished) > ANSWERS_KEPT_MAX:
            del self._unfinished[next(iter(self._unfinished))]

    def _keep(self, mark: Mark, answer: Answer, now_ns: int) -> None:
        expires_ns = now_ns + limits.IDEMPOTENCY_WINDOW_S * 1_000_000_000
        self._answers[mark.key_hash] = _Kept(mark.request_hash, answer, expires_ns)
        if len(self._answers) > ANSWERS_KEPT_MAX:
            self._answers.popitem(last=False)


async def _request_hash(call: Any) -> str:
    """The digest of a call's input; of an upload, of its bytes."""
    if isinstance(call, msgspec.Struct):
        return digest_bytes(msgspec.json.encode(call, order="deterministic"))
    fields = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    try:
        fields["fd"] = await asyncio.to_thread(_digest, fields["fd"])
    except BaseException:
        _close(call)
        raise
    return digest_bytes(msgspec.json.encode(fields, order="deterministic"))


def _digest(fd: int) -> str:
    """Of the whole file; its offset is where it was."""
    with open(fd, "rb", closefd=False) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    os.lseek(fd, 0, os.SEEK_SET)
    return found


def _close(call: Any) -> None:
    """Lets go of the body of an upload that no handler gets."""
    fd = getattr(call, "fd", None)
    if fd is not None:
        with suppress(OSError):
            os.close(fd)
