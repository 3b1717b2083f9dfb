"""From method and path to a row of the operations table; precompiled, pure.

Static paths are one dictionary look-up; paths with an argument are matched by their prefix and suffix, also where a
static path has the name but not the method (a cell may be called `explain`).
HEAD is answered wherever GET is; OPTIONS answers 204 with Allow. The path is compared as the server decoded it,
so an encoded slash never reaches an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aether.api import params
from aether.api.operation import Operation
from aether.contract import cellnames, ids, images, ticketcalls
from aether.contract.errors import AetherError

_ARGUMENTS = {
    "image": images.reference,
    "job_id": lambda text: ids.parse(ids.JOB, text),
    "digest": ids.parse_digest,
    "cell": cellnames.reference,
    "link_id": ticketcalls.link,
    "approval_id": params.parse_approval,
}


@dataclass(frozen=True, slots=True)
class _Pattern:
    prefix: str
    suffix: str
    argument: str
    methods: Mapping[str, Operation]

    def value(self, path: str) -> str | None:
        """The argument's text when `path` fits."""
        if len(path) <= len(self.prefix) + len(self.suffix):
            return None
        if not (path.startswith(self.prefix) and path.endswith(self.suffix)):
            return None
        text = path[len(self.prefix) : len(path) - len(self.suffix)]
        return None if "/" in text else text


class Router:
    """Finds the operation; `extra` are GET paths that are not operations (/openapi.json)."""

    def __init__(self, operations: Iterable[Operation], extra: Iterable[str] = ()) -> None:
        by_path: dict[str, dict[str, Operation]] = {}
        for operation in operations:
            for path in (operation.path, *operation.aliases):
                by_path.setdefault(path, {})[operation.method] = operation
        self._static = {path: methods for path, methods in by_path.items() if "{" not in path}
        self._patterns = [_pattern(path, methods) for path, methods in by_path.items() if "{" in path]
        self._extra = frozenset(extra)

    def find(self, method: str, path: str) -> tuple[Operation, dict[str, str]]:
        """The operation and its path argument; raises NO_SUCH_ROUTE, METHOD_NOT_ALLOWED (details.allow), BAD_ID."""
        methods = self._static.get(path)
        if methods is not None:
            operation = methods.get(method) or (methods.get("GET") if method == "HEAD" else None)
            if operation is not None:
                return operation, {}
        for pattern in self._patterns:
            text = pattern.value(path)
            if text is not None:
                operation = pattern.methods.get(method) or (pattern.methods.get("GET") if method == "HEAD" else None)
                if operation is None:
                    raise _not_allowed(method, path, pattern.methods)
                return operation, {pattern.argument: _ARGUMENTS[pattern.argument](text)}
        if methods is not None:
            raise _not_allowed(method, path, methods)
        raise AetherError("NO_SUCH_ROUTE", f"cannot find {path[:120]!r}: no operation has this path")

    def is_extra(self, method: str, path: str) -> bool:
        """Whether `path` is one of `extra`; raises METHOD_NOT_ALLOWED for anything but GET, HEAD, OPTIONS."""
        if path not in self._extra:
            return False
        if method not in ("GET", "HEAD", "OPTIONS"):
            raise _not_allowed(method, path, {"GET": None})
        return True

    def allowed(self, path: str) -> tuple[str, ...]:
        """The methods of `path`, for OPTIONS; raises NO_SUCH_ROUTE."""
        if path in self._extra:
            return _allow(("GET",))
        if path in self._static:
            return _allow(self._static[path])
        for pattern in self._patterns:
            if pattern.value(path) is not None:
                return _allow(pattern.methods)
        raise AetherError("NO_SUCH_ROUTE", f"cannot find {path[:120]!r}: no operation has this path")


def _pattern(path: str, methods: Mapping[str, Operation]) -> _Pattern:
    prefix, _, rest = path.partition("{")
    argument, _, suffix = rest.partition("}")
    return _Pattern(prefix, suffix, argument, methods)


def _allow(methods: Iterable[str]) -> tuple[str, ...]:
    names = set(methods) | {"OPTIONS"}
    if "GET" in names:
        names.add("HEAD")
    return tuple(sorted(names))


def _not_allowed(method: str, path: str, methods: Iterable[str]) -> AetherError:
    allow = ", ".join(_allow(methods))
    return AetherError(
        "METHOD_NOT_ALLOWED", f"cannot {method[:20]} {path[:120]!r}: it takes {allow}", details={"allow": allow}
    )
