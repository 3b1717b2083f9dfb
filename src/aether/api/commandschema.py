"""What images, Python jobs and traces ask of their fields, in the OpenAPI document (contract.jobs, contract.images)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.api import params
from aether.api.schemas import refine_optional
from aether.contract import images, limits

_NULL: Final = {"type": "null"}
_MODULE: Final = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"


def refine(schemas: Mapping[str, Any], ref: str) -> None:
    """Adds to `Images`, `CommitBody`, `Interpreter`, `CommandParams`, `CellRequest`, `TraceBody`.

    `ref` is the template of a reference.
    """
    digest = {"type": "string"}
    for name in ("root", "work"):
        refine_optional(schemas["Images"]["properties"][name], "string", **params.DIGEST_SCHEMA)
    schemas["Images"]["anyOf"] = [
        {"properties": {"writable": {"const": False}, "keep_diff": {"const": False}}},
        {"properties": {"writable": {"const": True}, "root": digest, "work": _NULL}, "required": ["writable", "root"]},
        {"properties": {"writable": {"const": False}, "work": digest}, "required": ["work"]},
    ]
    # The changes of an allocated cell are asked of it as long as it lives: it keeps none.
    schemas["CellRequest"]["properties"]["images"]["anyOf"] = [
        {"allOf": [{"$ref": ref.format(name="Images")}, {"properties": {"keep_diff": {"const": False}}}]},
        _NULL,
    ]
    _refine_commit(schemas["CommitBody"])
    schemas["TraceBody"]["properties"]["duration_ms"].update(minimum=1, maximum=limits.TRACE_MS_MAX)
    imports = schemas["Interpreter"]["properties"]["imports"]
    imports["items"] = {"type": "string", "pattern": _MODULE, "maxLength": limits.PYTHON_MODULE_CHARS_MAX}
    imports["maxItems"] = limits.PYTHON_IMPORTS_MAX
    guest = schemas["CommandParams"].setdefault("else", {"properties": {}})
    guest["properties"]["images"] = _NULL
    alone = {"python": {"type": "object"}, "cell": _NULL, "images": _NULL}
    script = {"prefixItems": [{"pattern": "^[^-]"}]}
    code = {"prefixItems": [{"enum": ["-c", "-m"]}], "minItems": 2}
    schemas["CommandParams"]["anyOf"] = [
        {"properties": {"python": _NULL}},
        {"properties": {**alone, "argv": script}, "required": ["python"]},
        {"properties": {**alone, "argv": code}, "required": ["python"]},
    ]


def _refine_commit(commit: dict[str, Any]) -> None:
    """A job, or the base and the layer that `cell.diff` named."""
    text = {"type": "string"}
    patterns: dict[str, dict[str, Any]] = {
        "job_id": params.JOB_ID_SCHEMA,
        "base": {**params.IMAGE_SCHEMA, "maxLength": images.NAME_CHARS_MAX},
        "layer": params.DIGEST_SCHEMA,
        "name": {"pattern": rf"^{images.NAME_PATTERN}$", "maxLength": images.NAME_CHARS_MAX},
    }
    for name, rule in patterns.items():
        refine_optional(commit["properties"][name], "string", **rule)
    commit["anyOf"] = [
        {"properties": {"job_id": text, "base": _NULL, "layer": _NULL}, "required": ["job_id"]},
        {"properties": {"job_id": _NULL, "base": text, "layer": text}, "required": ["base", "layer"]},
    ]
