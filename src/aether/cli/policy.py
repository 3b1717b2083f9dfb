"""`aether policy ...`: what is in force, what another policy would decide, and putting another one in force.

`check` and `test --against` talk to nobody; `check`, `test` and `diff` end with 1 where something is wrong or differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from aether.cli.session import Session, command

if TYPE_CHECKING:
    from aether.contract.policycalls import Case, Counterfactual, Decided, Tested

PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="A policy set in Cedar; - for standard input.")]
Force = Annotated[bool, typer.Option("--force", help="Also a policy under which nobody could load another.")]
_CHECK: Final = """Check a policy's syntax and that it fits the schema, offline. Ends with 1 where it does not.

\b
Example:
  aether policy check policy.cedar
"""
_EXPLAIN: Final = """Explain a decision: which policies decided, and why the others did not apply.

Of JOB: the decision that admitted it, by the policy that was in force then. Else of the question that the options ask.

\b
Examples:
  aether policy explain JOB
  aether policy explain --role user --operation job.submit --kind command --label local-only --host a.test:443
"""
_TEST: Final = """Test a table of questions. Ends with 1 where one is decided otherwise than expected.

FILE is JSON, TOML or (where PyYAML is installed) YAML: {"cases": [{"operation": "job.submit", "kind": "model",
"role": "user", "expect": "allow", "policies": ["user-submit"]}, ...]}.

\b
Examples:
  aether policy test cases.toml
  aether policy test cases.toml --against candidate.cedar
"""
_DIFF: Final = """Show what another policy changes: policies by name, decisions over every role and operation.

\b
Example:
  aether policy diff candidate.cedar
"""
_COUNTERFACTUAL: Final = """Take the recorded decisions of a period again by another policy, and list what would change.

\b
Example:
  aether policy counterfactual candidate.cedar --since 24h
"""
_TRIAL: Final = """Try a policy on a share of the principals: enforced, or as a shadow that is only recorded.

\b
Examples:
  aether policy trial candidate.cedar --share 10
  aether policy trial candidate.cedar --share 50 --enforce
  aether policy trial --end
"""


def register(app: typer.Typer) -> None:
    """Adds `policy`."""
    group = typer.Typer(help="Who may do what.", no_args_is_help=True, rich_markup_mode=None)
    app.add_typer(group, name="policy")
    command(group, "show", help="Print the policy in force, or the version of a digest.")(_show)
    command(group, "list", help="List the versions that were loaded, and the policy on trial.")(_list)
    command(group, "check", help=_CHECK)(_check)
    command(group, "explain", help=_EXPLAIN)(_explain)
    command(group, "test", help=_TEST)(_test)
    command(group, "diff", help=_DIFF)(_diff)
    command(group, "counterfactual", help=_COUNTERFACTUAL)(_counterfactual)
    command(group, "load", help="Put another policy in force at once; the record names it and who loaded it.")(_load)
    command(group, "rollback", help="Put an earlier version in force again: the one before, if none is named.")(
        _rollback
    )
    command(group, "trial", help=_TRIAL)(_trial)


def _show(
    session: Session,
    digest: Annotated[str | None, typer.Argument(metavar="[DIGEST]", help="6 or more of its hex digits.")] = None,
) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        view = client.policy.show(digest)
    if session.as_json:
        show_json(view)
    else:
        sys.stdout.write(view.text)


def _list(session: Session) -> None:
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        found = client.policy.versions()
    if session.as_json:
        show_json(found)
        return
    rows = [(v.number, v.digest[7:19], v.loaded_at, v.principal or "the node") for v in found.versions]
    show_table(("version", "digest", "loaded", "by"), rows)
    if found.trial is not None:
        trial = found.trial
        print(f"on trial: {trial.digest[7:19]} for {trial.share_percent} % of the principals, {trial.mode}")


def _check(session: Session, file: PolicyFile) -> None:
    from aether.cli.output import show_json
    from aether.cli.terminal import printable
    from aether.substrate.access.policytext import checked

    found = checked(_text(file))
    if session.as_json:
        show_json(found)
    elif found.ok:
        print(f"{len(found.policies)} policies, {found.digest}")
    for problem in () if session.as_json else found.problems:
        named = f"{problem.policy}: " if problem.policy else ""
        print(printable(f"{file}:{problem.line}:{problem.column}: {named}{problem.message}"))
    if not found.ok:
        raise typer.Exit(1)


def _explain(
    session: Session,
    job_id: Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job id.")] = None,
    operation: Annotated[str | None, typer.Option("--operation", metavar="NAME", help="Such as job.submit.")] = None,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="In which role it is asked.")] = "user",
    principal: Annotated[str, typer.Option("--principal", metavar="NAME", help="Who asks.")] = "uid:1000",
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="In which tenant.")] = "default",
    kind: Annotated[str | None, typer.Option("--kind", metavar="KIND", help="Of what: command, job, ...")] = None,
    resource: Annotated[str | None, typer.Option("--id", metavar="ID", help="The id of the resource.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The model of a job.")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", metavar="LABEL", help="A label of the job.")] = None,
    host: Annotated[list[str] | None, typer.Option("--host", metavar="HOST:PORT", help="What it would reach.")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="TIME", help="When, as RFC 3339; else now.")] = None,
) -> None:
    from aether.cli.output import show_json
    from aether.contract.errors import AetherError
    from aether.contract.policycalls import Asking

    if (job_id is None) == (operation is None):
        raise AetherError("BAD_FIELD", "cannot explain: name a job or an operation", "aether policy explain JOB")
    asking = None
    if operation is not None:
        asking = Asking(
            operation=operation, role=role, principal=principal, principal_tenant=tenant, kind=kind, id=resource,
            model=model, labels=tuple(label or ()), hosts=tuple(host or ()), time=time,
        )  # fmt: skip
    with session.client() as client:
        found = client.policy.explain(asking, job_id=job_id)
    show_json(found) if session.as_json else _show_decided(found)


def _show_decided(found: Decided) -> None:
    from aether.cli.output import show_fields, show_table

    asked = found.asked
    show_fields(
        [
            ("decision", "allow" if found.allow else "deny"),
            ("asked", f"{asked.operation} of a {asked.kind or 'resource'}, by {asked.principal} in role {asked.role}"),
            ("decided by", ", ".join(found.determining) or "nothing permits it"),
            ("errors", "; ".join(found.errors)),
            ("policy", found.digest),
        ]
    )
    show_table(("policy", "effect", "", "why"), [(p.policy, p.effect, p.verdict, p.why) for p in found.policies])


def _test(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The table of questions.")],
    against: Annotated[
        Path | None, typer.Option("--against", metavar="POLICY", help="This policy, offline, not the one in force.")
    ] = None,
) -> None:
    from aether.cli.output import show_json

    cases = _cases(file)
    if against is not None:
        found = _run_offline(_text(against), cases)
    else:
        with session.client() as client:
            found = client.policy.test(cases)
    if session.as_json:
        show_json(found)
    else:
        _show_tested(found)
    if found.failed:
        raise typer.Exit(1)


def _run_offline(policy: str, cases: tuple[Case, ...]) -> Tested:
    import time

    from aether.substrate.access.policy import Policy
    from aether.substrate.access.review import run_cases

    return run_cases(Policy.load(policy), cases, time.time_ns())


def _show_tested(found: Tested) -> None:
    from aether.cli.output import show_table

    rows = [(r.number, r.name, r.decision, ", ".join(r.policies), r.why) for r in found.results if not r.passed]
    if rows:
        show_table(("case", "question", "decision", "decided by", "why it fails"), rows)
    print(f"{found.passed} passed, {found.failed} failed")


def _cases(file: Path) -> tuple[Case, ...]:
    """The cases of a JSON, TOML or YAML file; raises AetherError BAD_FIELD."""
    import msgspec

    from aether.contract.errors import AetherError

    class Table(msgspec.Struct, forbid_unknown_fields=True):
        cases: tuple[Case, ...]

    decode: dict[str, Any] = {".toml": msgspec.toml, ".yaml": msgspec.yaml, ".yml": msgspec.yaml}
    try:
        table: Table = decode.get(file.suffix, msgspec.json).decode(_text(file), type=Table)
    except ImportError as error:
        raise AetherError("BAD_FIELD", f"cannot read {file}: PyYAML is missing", "write it as JSON or TOML") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AetherError("BAD_FIELD", f"cannot read {file}: {error}", "see docs/policy.md for its form") from error
    return table.cases


def _diff(session: Session, file: PolicyFile) -> None:
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        found = client.policy.diff(_text(file))
    if session.as_json:
        show_json(found)
    else:
        for what, names in (("added", found.added), ("removed", found.removed), ("changed", found.changed)):
            print(f"{what + ':':9}{', '.join(names) or '-'}")
        rows = [
            (d.role, d.operation, d.kind, f"{d.before} -> {d.after}", ", ".join(d.determining_after))
            for d in found.decisions
        ]
        show_table(("role", "operation", "of a", "decision", "decided by"), rows)
    if found.digest_before != found.digest_after:
        raise typer.Exit(1)


def _counterfactual(
    session: Session,
    file: PolicyFile,
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="From 24h ago, or a time.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")] = None,
) -> None:
    from aether.cli.auditlog import moment
    from aether.cli.output import show_json, show_table

    with session.client() as client:
        pieces = list(client.policy.counterfactual(_text(file), since=moment(since), until=moment(until)))
    found = _joined(pieces)
    if session.as_json:
        show_json(found)
        return
    rows = [
        (
            c.log_index,
            c.time,
            c.principal,
            c.operation,
            c.job_id,
            c.after,
            ", ".join(c.determining_after),
        )
        for c in found.changed
    ]
    show_table(("record", "time", "principal", "operation", "job", "would be", "decided by"), rows)
    told = f"{found.examined} decisions looked at, {len(found.changed) + found.left_out} would change"
    lacking = "; ".join(f"{count} undecidable for want of the {what}" for what, count in found.undecidable.items())
    print(f"{told}; {lacking}" if lacking else told)


def _joined(pieces: list[Counterfactual]) -> Counterfactual:
    """The pieces of one answer as one."""
    from collections import Counter

    from aether.contract.policycalls import Counterfactual

    undecidable: Counter[str] = Counter()
    for piece in pieces:
        undecidable.update(piece.undecidable)
    return Counterfactual(
        digest=pieces[0].digest,
        searched=sum(piece.searched for piece in pieces),
        examined=sum(piece.examined for piece in pieces),
        unchanged=sum(piece.unchanged for piece in pieces),
        changed=tuple(change for piece in pieces for change in piece.changed),
        undecidable=dict(undecidable),
        left_out=sum(piece.left_out for piece in pieces),
    )


def _load(session: Session, file: PolicyFile, force: Force = False) -> None:
    from aether.cli.output import show_json

    with session.client() as client:
        version = client.policy.load(_text(file), force=force)
    show_json(version) if session.as_json else print(f"version {version.number} is in force: {version.digest}")


def _rollback(
    session: Session,
    digest: Annotated[str | None, typer.Argument(metavar="[DIGEST]", help="6 or more of its hex digits.")] = None,
    force: Force = False,
) -> None:
    from aether.cli.output import show_json
    from aether.contract.errors import AetherError

    with session.client() as client:
        if digest is None:
            versions = client.policy.versions().versions
            if len(versions) < 2:
                raise AetherError(
                    "NOT_FOUND", "cannot roll back: no other policy was loaded", "see `aether policy list`"
                )
            digest = versions[1].digest
        version = client.policy.rollback(digest, force=force)
    show_json(version) if session.as_json else print(f"version {version.number} is in force: {version.digest}")


def _trial(
    session: Session,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The policy to try.")] = None,
    share: Annotated[int, typer.Option("--share", metavar="PERCENT", help="Of the principals, by a stable hash.")] = 10,
    enforce: Annotated[bool, typer.Option("--enforce", help="It decides for them; else it is only recorded.")] = False,
    end: Annotated[bool, typer.Option("--end", help="End the trial.")] = False,
    force: Force = False,
) -> None:
    from aether.cli.output import show_json
    from aether.contract.errors import AetherError

    if (file is None) != end:
        raise AetherError("BAD_FIELD", "cannot try: name a policy, or --end", "aether policy trial FILE --share 10")
    with session.client() as client:
        found = client.policy.trial(
            _text(file) if file is not None else None,
            share_percent=share, mode="enforced" if enforce else "shadow", force=force,
        )  # fmt: skip
    if session.as_json:
        show_json(found)
    elif found.trial is None:
        print("no policy is on trial")
    else:
        print(f"on trial: {found.trial.digest} for {found.trial.share_percent} % of the principals, {found.trial.mode}")


def _text(file: Path) -> str:
    """The text of a file; raises AetherError BAD_FIELD."""
    from aether.contract.errors import AetherError

    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AetherError("BAD_FIELD", f"cannot read {file}: {error}", "name a readable file of UTF-8 text") from error
