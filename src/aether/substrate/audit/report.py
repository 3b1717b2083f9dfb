"""What a verification found: a list of failures with the names of docs/formats.md, and what was looked at."""

from __future__ import annotations

import msgspec

PROBLEMS_MAX = 200


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One failure: its `code`, the `place` (a file, or a field of a receipt), the log `index` where known."""

    code: str
    place: str
    reason: str
    index: int | None = None

    def __str__(self) -> str:
        where = self.place if self.index is None else f"{self.place}, record {self.index}"
        return f"{self.code}: {where}: {self.reason}"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of verifying `subject`. Good when there is no problem; at most PROBLEMS_MAX are listed."""

    subject: str
    problems: tuple[Problem, ...]
    facts: dict[str, int | str | None]

    @property
    def ok(self) -> bool:
        return not self.problems


class Findings:
    """Collects problems; beyond PROBLEMS_MAX only the count goes on."""

    def __init__(self) -> None:
        self._problems: list[Problem] = []
        self.count = 0

    def add(self, code: str, place: str, reason: str, index: int | None = None) -> None:
        self.count += 1
        if len(self._problems) < PROBLEMS_MAX:
            self._problems.append(Problem(code=code, place=place, reason=reason, index=index))

    def report(self, subject: str, facts: dict[str, int | str | None]) -> Report:
        return Report(subject=subject, problems=tuple(self._problems), facts=facts | {"problems": self.count})
