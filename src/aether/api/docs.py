"""Writes docs/api.md from the operations table and docs/errors.md from the error table.

`python -m aether.api.docs [DIRECTORY]` writes; with `--check` it exits 1 when a file differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from aether.api.operation import ACCESS, Operation
from aether.api.operations import OPERATIONS
from aether.contract import limits
from aether.contract.errors import KINDS

_SOURCE: Final = "<!-- Written by `python -m aether.api.docs`; do not edit. -->\n"


def api_markdown() -> str:
    """docs/api.md."""
    parts = [_SOURCE, _API_HEAD, "| operation | HTTP | access | effect | repeatable |\n|---|---|---|---|---|\n"]
    for operation in OPERATIONS:
        repeatable = "yes" if operation.idempotent else "with Idempotency-Key" if operation.keyed else "no"
        spelling = f"`{operation.method} {operation.path}`"
        parts.append(f"| `{operation.name}` | {spelling} | {operation.access} | {operation.effect} | {repeatable} |\n")
    parts.append("\n**Access rules.** " + " ".join(f"`{name}`: {text}." for name, text in ACCESS.items()) + "\n")
    parts += [_section(operation) for operation in OPERATIONS]
    return "".join(parts)


def errors_markdown() -> str:
    """docs/errors.md."""
    rows = "".join(
        f"| `{code}` | {kind.http if kind.http != 200 else '(of a job)'} | {kind.exit} | {kind.remedy} |\n"
        for code, kind in KINDS.items()
    )
    return _SOURCE + _ERRORS_HEAD + rows


def _section(operation: Operation) -> str:
    lines = [f"\n## {operation.name}\n\n{operation.summary}\n\n`{operation.method} {operation.path}`"]
    if operation.aliases:
        lines.append("; also " + ", ".join(f"`{alias}`" for alias in operation.aliases))
    lines.append("\n\n")
    lines += [f"- `?{param.name}=` {param.summary}\n" for param in operation.query]
    if operation.body == "raw":
        lines.append("- body: the bytes themselves, spooled to disk as they arrive\n")
    elif operation.body_type is not None:
        optional = " (optional)" if operation.body == "optional_json" else ""
        lines.append(f"- body{optional}: JSON `{operation.body_type.__name__}`\n")
    shown = operation.media_type if operation.media_type != "application/json" else f"JSON `{operation.reply.__name__}`"
    lines.append(f"- answers {' or '.join(map(str, operation.statuses))}: {shown}\n")
    own = ", ".join(f"`{code}`" for code in operation.errors) or "none"
    lines.append(f"- its own errors: {own}\n")
    return "".join(lines)


_API_HEAD: Final = f"""# HTTP API

JSON over HTTP/1.1 on the Unix socket `$AETHER_STATE/run/aetherd.sock`:

    curl --unix-socket ~/.local/state/aether/run/aetherd.sock http://localhost/v0/health

The machine-readable form is `/openapi.json`. Errors are listed in [errors.md](errors.md).

- **Who calls** is the uid of the connecting process (SO_PEERCRED). A ticket in `Authorization: Bearer aetk1_...`
  narrows or replaces what that uid may do.
- **Headers.** `X-Request-Id` is taken when well formed (1-128 of `A-Za-z0-9._:-`), else made, and is always answered.
  `Traceparent` (W3C) is kept with the job. `Idempotency-Key` (1-{limits.IDEMPOTENCY_KEY_CHARS_MAX} visible ASCII
  characters) names one call of what changes anything: repeated within {limits.IDEMPOTENCY_WINDOW_S} s by the same
  principal and ticket it has no second effect and costs nothing, and gets the answer of the first; other input is
  `IDEMPOTENCY_CONFLICT`. After a restart of aetherd an answer is made anew from what stands, and where that cannot be
  `ANSWER_NOT_KEPT` says that it was done. `job.attach` takes no key: a connection has no answer to repeat.
- **Bodies** are JSON objects (`Content-Type: application/json`), at most {limits.HTTP_BODY_BYTES_MAX} bytes, nested at
  most {limits.JSON_DEPTH_MAX} deep, without unknown fields; a request head is at most {limits.HTTP_HEADER_BYTES_MAX}
  bytes. Unknown query parameters are refused.
- **HEAD** works wherever GET does; **OPTIONS** answers 204 with `Allow`; any other method 405 with `Allow`.
- **Time.** A request's head must arrive within {limits.HTTP_HEADER_TIMEOUT_S:.0f} s, its body without pauses above
  {limits.HTTP_BODY_IDLE_TIMEOUT_S:.0f} s and at 1 KiB/s or more after that; an answer that is not taken for
  {limits.HTTP_WRITE_IDLE_TIMEOUT_S:.0f} s is cut, except a stream, which goes at the client's pace.
- **Numbers.** At most {limits.HTTP_CONNECTIONS_PER_UID_MAX} connections and running calls of one uid,
  {limits.HTTP_CONNECTIONS_MAX} connections in all. 429 and 503 carry `Retry-After`.
- **Streams** are pulled: a slow reader slows the source, never the others. A dropped connection ends a read at once;
  a call that changes something runs to its end.
- **Errors.** 400 for the form of a request, 422 for its content; each with a remedy.

"""

_ERRORS_HEAD: Final = """# Errors

Every refusal is `{"error": {"code", "message", "remedy", "details"}, "request_id"}`. Codes are stable: one is never
renamed or reused. A code marked "(of a job)" appears in a job's `error` field, not as an HTTP status. The exit code is
that of `aether` when it reports the error; `aether run` otherwise exits with the job's own code.

| code | HTTP | exit | remedy |
|---|---|---|---|
"""


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks both files."""
    parser = argparse.ArgumentParser(description="write docs/api.md and docs/errors.md")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("docs"))
    parser.add_argument("--check", action="store_true", help="exit 1 when a file differs")
    options = parser.parse_args(arguments)
    stale = []
    for name, text in (("api.md", api_markdown()), ("errors.md", errors_markdown())):
        path: Path = options.directory / name
        if options.check:
            if not path.is_file() or path.read_text() != text:
                stale.append(str(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale:
        print(f"cannot accept {', '.join(stale)}: run `python -m aether.api.docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
