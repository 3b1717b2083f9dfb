"""The rules of `contract.jobs` about images and about Python jobs in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from aether.api import params
from aether.contract import limits

_NULL: Final = {"type": "null"}
_MODULE: Final = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"


def refine(schemas: Mapping[str, Any]) -> None:
    """Adds to `Images`, `Interpreter` and `CommandParams`."""
    digest = {"type": "string"}
    for name in ("root", "work"):
        for way in schemas["Images"]["properties"][name]["anyOf"]:
            if way["type"] == "string":
                way.update(params.DIGEST_SCHEMA)
    schemas["Images"]["anyOf"] = [
        {"properties": {"writable": {"const": False}, "keep_diff": {"const": False}}},
        {"properties": {"writable": {"const": True}, "root": digest, "work": _NULL}, "required": ["writable", "root"]},
        {"properties": {"writable": {"const": False}, "work": digest}, "required": ["work"]},
    ]
    imports = schemas["Interpreter"]["properties"]["imports"]
    imports["items"] = {"type": "string", "pattern": _MODULE, "maxLength": limits.PYTHON_MODULE_CHARS_MAX}
    imports["maxItems"] = limits.PYTHON_IMPORTS_MAX
    alone = {"python": {"type": "object"}, "cell": _NULL, "images": _NULL}
    script = {"prefixItems": [{"pattern": "^[^-]"}]}
    code = {"prefixItems": [{"enum": ["-c", "-m"]}], "minItems": 2}
    schemas["CommandParams"]["anyOf"] = [
        {"properties": {"python": _NULL}},
        {"properties": {**alone, "argv": script}, "required": ["python"]},
        {"properties": {**alone, "argv": code}, "required": ["python"]},
    ]
