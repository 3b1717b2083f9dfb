"""Which policies were loaded: a fold of the `policy.loaded` records.

Each of these records says the whole state from there on: `policy.digest` is in force, `detail.trial` is on trial with
`detail.share_percent` and `detail.mode`. `detail.source` is where the policy is from: `loaded` by an operation, the
operator's `file`, or the `default`; `detail.file` is the digest of that file, or `none`. A start of the node that
takes up what was in force is no new version.
"""

from __future__ import annotations

from typing import Final

from aether.contract import limits
from aether.contract.errors import AetherError
from aether.contract.policycalls import Trial, Version, Versions
from aether.contract.records import Record

LOADED: Final = "loaded"
NO_FILE: Final = "none"


class PolicyBook:
    """See the module head."""

    def __init__(self) -> None:
        self._loaded: list[Record] = []
        self._count = 0
        self._last: Record | None = None
        self._tried: Record | None = None

    def __repr__(self) -> str:
        return f"<PolicyBook versions={self._count} trial={self.trial() is not None}>"

    def apply(self, record: Record) -> None:
        """Folds one record; those of other types change nothing."""
        if record.type != "policy.loaded" or record.policy is None:
            return
        before, self._last = self._last, record
        if _trial_of(record) != (_trial_of(self._tried) if self._tried is not None else None):
            self._tried = record
        if before is None or before.policy is None or before.policy.digest != record.policy.digest:
            self._count += 1
            self._loaded = [*self._loaded, record][-limits.POLICY_VERSIONS_MAX :]

    @property
    def loaded(self) -> str | None:
        """The digest of what an operation loaded last, unless something else was taken up since."""
        last = self._last
        return last.policy.digest if last is not None and last.policy and last.detail.get("source") == LOADED else None

    @property
    def file(self) -> str:
        """The digest of the operator's file when the policy was last recorded."""
        return self._last.detail.get("file", NO_FILE) if self._last is not None else NO_FILE

    def versions(self) -> Versions:
        """Newest first."""
        newest = [_version(record, self._count - at) for at, record in enumerate(reversed(self._loaded))]
        return Versions(versions=tuple(newest), trial=self.trial())

    def trial(self) -> Trial | None:
        """The trial that goes on."""
        if self._tried is None or _trial_of(self._tried) is None:
            return None
        digest, share_percent, mode = self._tried.detail["trial"], *(self._tried.detail[n] for n in _TRIAL[1:])
        return Trial(
            digest=digest,
            share_percent=int(share_percent),
            mode="enforced" if mode == "enforced" else "shadow",
            since=self._tried.time,
            log_index=self._tried.log_index,
        )

    def find(self, digest: str) -> Version:
        """The latest version of that digest, or of its first hex digits; raises AetherError NOT_FOUND, BAD_FIELD."""
        asked = digest.removeprefix("sha256:")
        found = {v.digest: v for v in reversed(self.versions().versions) if v.digest[7:].startswith(asked)}
        if not found:
            raise AetherError("NOT_FOUND", f"cannot find a policy {digest[:80]}", "see `aether policy list`")
        if len(found) > 1:
            raise AetherError("BAD_FIELD", f"cannot choose a policy: {digest[:80]} begins {len(found)} of them")
        return next(iter(found.values()))

    def snapshot(self) -> tuple[list[Record], int, Record | None, Record | None]:
        return self._loaded, self._count, self._last, self._tried

    def restore(self, state: tuple[list[Record], int, Record | None, Record | None]) -> None:
        """Takes over a snapshot; only when fresh."""
        self._loaded, self._count, self._last, self._tried = state


_TRIAL = ("trial", "share_percent", "mode")


def _trial_of(record: Record) -> tuple[str, ...] | None:
    return tuple(record.detail[name] for name in _TRIAL) if "trial" in record.detail else None


def _version(record: Record, number: int) -> Version:
    assert record.policy is not None
    return Version(
        number=number,
        digest=record.policy.digest,
        loaded_at=record.time,
        log_index=record.log_index,
        principal=record.principal,
    )
