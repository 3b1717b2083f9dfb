"""Which labels flow into a request: those of the artifacts and images that it names.

aurorad knows what each carries; the authority asks before it asks the policy, so that a label cannot be left behind by
naming its artifact in a job without it. A cell has those that went into it (`Allocation.labels`).
"""

from __future__ import annotations

from collections.abc import Mapping

from aether.contract.errors import AetherError
from aether.contract.images import Labelled, LabelQuery
from aether.contract.jobs import JobRequest, parse_command
from aether.substrate.orchestra import Orchestra

REFUSALS = frozenset({"POLICY_DENIED", "TICKET_DENIED", "LABEL_REFUSED"})


def named_by(request: JobRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The digests of the artifacts and of the images that a job reads. Raises BAD_FIELD for a request that is none."""
    if request.kind != "command":
        return (), ()
    params, inputs = parse_command(request)
    images = (params.images.root, params.images.work) if params.images is not None else ()
    return tuple(file.artifact for file in inputs.files), tuple(digest for digest in images if digest is not None)


class LabelDesk:
    """Asks aurorad."""

    def __init__(self, orchestra: Orchestra) -> None:
        self._orchestra = orchestra

    async def carried(self, tenant_id: str, artifacts: tuple[str, ...], images: tuple[str, ...]) -> Mapping[str, str]:
        """The labels of all of them, each with one digest that carries it. Raises UNAVAILABLE."""
        return (await self.ask(tenant_id, artifacts, images)).sources

    async def ask(self, tenant_id: str, artifacts: tuple[str, ...], images: tuple[str, ...]) -> Labelled:
        """The same, and which of them are not there."""
        query = LabelQuery(tenant_id=tenant_id, artifacts=artifacts, images=images)
        return await self._orchestra.link().call("artifact.labels", query, Labelled)


def explained(error: AetherError, inherited: Mapping[str, str]) -> AetherError:
    """A refusal of a request into which labels flowed says which and from where."""
    if error.code not in REFUSALS or not inherited:
        return error
    from_where = "; ".join(
        f"label {label} comes from input {source}" for label, source in sorted(inherited.items())[:3]
    )
    return AetherError(error.code, f"{error.message} ({from_where})", error.remedy, error.details)
