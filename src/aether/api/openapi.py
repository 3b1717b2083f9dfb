"""OpenAPI 3.1 from the operations table and the contract's types.

Types give the shapes (msgspec); the bounds that only code checks (`contract.jobs.parse_command` and friends)
are added here from `contract.limits`, so that a client generator and a fuzzer see them too. Every error code
of an operation is listed under its status.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from aether.api import auditschema, budgetschema, commandschema, limitschema, networkschema, params, ticketschema
from aether.api.operation import ErrorReply, Operation
from aether.api.operations import OPERATIONS
from aether.api.schemas import refine_optional
from aether.contract import cellnames, limits
from aether.contract.calls import FileReply, RawReply, StreamReply
from aether.contract.cellcalls import UpgradeReply
from aether.contract.cells import Requirement
from aether.contract.errors import KINDS
from aether.contract.jobs import SCHEMA_VERSION, CommandInputs, CommandParams, JobRequest
from aether.contract.modelwire import EncodeInputs, PlainParams, PredictInputs, PredictParams, ScoreInputs

JsonObject = dict[str, Any]
_REF: Final = "#/components/schemas/{name}"
_ARGUMENT_SCHEMAS: Final = {
    "job_id": params.JOB_ID_SCHEMA,
    "digest": params.DIGEST_SCHEMA,
    "cell": params.CELL_SCHEMA,
    "image": params.IMAGE_SCHEMA,
    "link_id": params.LINK_SCHEMA,
    "approval_id": params.APPROVAL_SCHEMA,
}
SIGNAL_MAX: Final = 64
_RELATIVE_PATH: Final = params.RELATIVE_PATH
_CWD: Final = r"^/work(/(?!\.{1,2}(/|$))[^/\u0000]+)*$"
_MODEL_TYPES: Final = {
    "predict_next_state": ("PredictParams", "PredictInputs"),
    "encode_state": ("PlainParams", "EncodeInputs"),
    "score_sequence": ("PlainParams", "ScoreInputs"),
}
_JOB_EXAMPLES: Final = {
    "command": {
        "value": {"kind": "command", "op": "run", "params": {"argv": ["echo", "hello"], "outputs": []}},
        "summary": "Run a command in a cell",
    },
    "model": {
        "value": {
            "kind": "model",
            "op": "predict_next_state",
            "params": {"model": "pendulum", "horizons_s": [0.1]},
            "inputs": {
                "history": {"t": [0.0, 0.1], "obs": [[1.0, 0.0], [0.9, 0.1]], "action": [[0.0]]},
                "action": [0.0],
            },
        },
        "summary": "Ask a model",
    },
}


def document_bytes() -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document())


def document() -> JsonObject:
    """The whole OpenAPI document."""
    paths: dict[str, JsonObject] = {}
    for operation in OPERATIONS:
        for path in (operation.path, *operation.aliases):
            paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AetherOS substrate",
            "version": SCHEMA_VERSION,
            "description": "Jobs in cells: authenticated, budgeted, recorded. Served on a Unix socket.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost", "description": "curl --unix-socket $AETHER_STATE/run/aetherd.sock"}],
        "security": [{}, {"ticket": []}],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"ticket": {"type": "http", "scheme": "bearer", "bearerFormat": "aetk1"}},
        },
    }


def _operation(operation: Operation, path: str) -> JsonObject:
    suffix = "" if path == operation.path else "." + path.strip("/").split("/")[0]
    entry: JsonObject = {
        "operationId": operation.name + suffix,
        "summary": operation.summary,
        "description": f"Access: `{operation.access}`. Effect: `{operation.effect}`.",
        "parameters": _parameters(operation),
        "responses": {**_successes(operation), **_failures(operation)},
        "x-aether-effect": operation.effect,
        "x-aether-access": operation.access,
    }
    if suffix:
        entry["description"] += f" An alias of `{operation.path}`."
    if operation.body == "raw":
        entry["requestBody"] = {
            "required": False,
            "description": "An absent body is an empty artifact.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    elif operation.body_type is not None:
        media: JsonObject = {"schema": {"$ref": _REF.format(name=operation.body_type.__name__)}}
        if operation.body_type is JobRequest:
            media["examples"] = _JOB_EXAMPLES
        entry["requestBody"] = {"required": operation.body == "json", "content": {"application/json": media}}
    return entry


def _parameters(operation: Operation) -> list[JsonObject]:
    found: list[JsonObject] = []
    argument = operation.path_argument
    if argument is not None:
        found.append({"name": argument, "in": "path", "required": True, "schema": _ARGUMENT_SCHEMAS[argument]})
    found += [
        {"name": p.name, "in": "query", "required": p.required, "schema": dict(p.schema), "description": p.summary}
        for p in operation.query
    ]
    if operation.keyed:
        found.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": f"The same key within {limits.IDEMPOTENCY_WINDOW_S} s names the same call.",
                "schema": {"type": "string", "pattern": rf"^[!-~]{{1,{limits.IDEMPOTENCY_KEY_CHARS_MAX}}}$"},
            }
        )
    return found


def _successes(operation: Operation) -> JsonObject:
    if operation.reply is StreamReply or operation.media_type == "text/plain":
        schema: JsonObject = {"type": "string"}
    elif operation.reply in (FileReply, UpgradeReply):
        schema = {"type": "string", "format": "binary"}
    elif operation.reply is RawReply:
        schema = {}
    else:
        schema = {"$ref": _REF.format(name=operation.reply.__name__)}
    # A log's media type is the executable's business; an artifact's is what it was stored with.
    media_type = "*/*" if operation.reply in (StreamReply, FileReply, UpgradeReply) else operation.media_type
    answer = {
        "description": operation.summary,
        "headers": {"X-Request-Id": {"schema": {"type": "string"}, "description": "Names this call in the log."}},
        "content": {media_type: {"schema": schema}},
    }
    return {str(status): answer for status in operation.statuses}


def _failures(operation: Operation) -> JsonObject:
    """Error responses grouped by status; METHOD_NOT_ALLOWED belongs to the path, not to the operation."""
    by_status: dict[int, list[str]] = {}
    for code in (*operation.all_errors, "METHOD_NOT_ALLOWED", "NO_SUCH_ROUTE"):
        status = KINDS[code].http
        by_status.setdefault(status if status >= 400 else 500, []).append(code)
    return {
        str(status): {
            "description": ", ".join(f"`{code}`" for code in codes),
            "content": {
                "application/json": {
                    "schema": {"$ref": _REF.format(name="ErrorReply")},
                    "examples": {code: {"value": _example(code)} for code in codes},
                }
            },
        }
        for status, codes in sorted(by_status.items())
    }


def _example(code: str) -> JsonObject:
    body = {"code": code, "message": "cannot ...: why", "remedy": KINDS[code].remedy, "details": {}}
    return {"error": body, "request_id": "req_01920000-0000-7000-8000-000000000000"}


def _schemas() -> JsonObject:
    types: list[type] = [
        ErrorReply,
        CommandParams,
        CommandInputs,
        PredictParams,
        PlainParams,
        PredictInputs,
        EncodeInputs,
        ScoreInputs,
    ]
    for operation in OPERATIONS:
        types += [t for t in (operation.reply, operation.body_type) if t is not None and _is_struct(t)]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(types)), ref_template=_REF)
    schemas: JsonObject = dict(components)
    _refine_command(schemas)
    _refine_cells(schemas)
    commandschema.refine(schemas, _REF)
    networkschema.refine(schemas)
    limitschema.refine(schemas)
    ticketschema.refine(schemas)
    refine_optional(
        schemas["DecisionBody"]["properties"]["reason"], "string", maxLength=limits.APPROVAL_REASON_CHARS_MAX
    )
    budgetschema.refine(schemas)
    auditschema.refine(schemas)
    refine_optional(schemas["ExplainPolicyCall"]["properties"]["job_id"], "string", **params.JOB_ID_SCHEMA)
    schemas["JobRequest"] = _job_request()
    schemas["StopBody"]["properties"]["grace_ms"].update(minimum=0, maximum=limits.STOP_GRACE_MS_MAX)
    schemas["ErrorBody"]["properties"]["code"]["enum"] = sorted(KINDS)
    return schemas


def _is_struct(kind: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _refine_command(schemas: Mapping[str, Any]) -> None:
    """The rules of `contract.jobs.parse_command`, as far as a schema can say them: sums of
    lengths and lengths in bytes it cannot."""
    command = schemas["CommandParams"]["properties"]
    no_nul = {"type": "string", "pattern": r"^[^\u0000]*$"}
    command["argv"].update(
        items=dict(no_nul),
        prefixItems=[{**no_nul, "minLength": 1}],
        minItems=1,
        maxItems=limits.ARGV_ITEMS_MAX,
    )
    command["env"].update(
        propertyNames={"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        additionalProperties=dict(no_nul),
        maxProperties=limits.ENV_ITEMS_MAX,
    )
    command["cwd"]["pattern"] = _CWD
    command["outputs"].update(
        items={"type": "string", "pattern": _RELATIVE_PATH, "maxLength": limits.PATH_BYTES_MAX},
        maxItems=limits.OUTPUT_GLOBS_MAX,
    )
    command["require"]["items"] = {"type": "string", "enum": sorted(Requirement.__args__)}  # type: ignore[attr-defined]
    file = schemas["InputFile"]["properties"]
    file["path"].update(pattern=_RELATIVE_PATH)
    file["artifact"].update(params.DIGEST_SCHEMA)
    bounds = {
        "memory_bytes": (limits.MEMORY_BYTES_MIN, 1 << 50),
        "cpu_millis": (limits.CPU_MILLIS_MIN, 1_024_000),
        "pids": (1, limits.PIDS_MAX),
        "tmp_bytes": (0, 1 << 40),
        "nofile": (16, 1 << 20),
        "file_bytes": (0, 1 << 50),
        "disk_bytes": (limits.DISK_BYTES_MIN, 1 << 50),
        "timeout_ms": (1, limits.TIMEOUT_MS_MAX),
        "grace_ms": (0, limits.STOP_GRACE_MS_MAX),
    }
    for name, (low, high) in bounds.items():
        schemas["Limits"]["properties"][name].update(minimum=low, maximum=high)
    for name in ("PredictParams", "PlainParams"):
        schemas[name]["properties"]["model"].update(minLength=1, maxLength=128)


def _refine_cells(schemas: Mapping[str, Any]) -> None:
    """The rules of `contract.allocations.check_request`, and the bounds of what is said to an executable."""
    cell = schemas["CellRequest"]["properties"]
    cell["name"].update(pattern=cellnames.NAME_PATTERN)
    cell["require"]["items"] = {"type": "string", "enum": sorted(Requirement.__args__)}  # type: ignore[attr-defined]
    cell["labels"].update(items={"type": "string", "pattern": limits.LABEL_PATTERN}, maxItems=limits.LABELS_MAX)
    for name in ("CellRequest", "ResizeBody"):
        idle = schemas[name]["properties"]["idle_timeout_ms"]
        refine_optional(idle, "integer", minimum=limits.CELL_IDLE_MS_MIN, maximum=limits.TIMEOUT_MS_MAX)
    command = schemas["CommandParams"]["properties"]
    refine_optional(command["cell"], "string", pattern=cellnames.NAME_PATTERN)
    refine_optional(command["executable"], "string", pattern=f"^{cellnames.LABEL}$")
    alone = {"executable": {"type": "null"}, "stdio": {"const": "logs"}}
    schemas["CommandParams"]["if"] = {"properties": {"cell": {"type": "null"}}}
    schemas["CommandParams"]["then"] = {"properties": alone}
    schemas["FreeBody"]["properties"]["grace_ms"].update(minimum=0, maximum=limits.STOP_GRACE_MS_MAX)
    schemas["SignalBody"]["properties"]["signal"].update(minimum=1, maximum=SIGNAL_MAX)
    for name in ("rows", "columns"):
        schemas["WindowBody"]["properties"][name].update(minimum=1, maximum=limits.TERMINAL_SIZE_MAX)


def _job_request() -> JsonObject:
    """One branch per kind, so that `params` is typed."""
    common = {
        "labels": {
            "type": "array",
            "items": {"type": "string", "pattern": limits.LABEL_PATTERN},
            "maxItems": limits.LABELS_MAX,
            "default": [],
        },
        "schema_version": {"const": SCHEMA_VERSION, "default": SCHEMA_VERSION},
    }
    return {
        "title": "JobRequest",
        "description": JobRequest.__doc__,
        "oneOf": [
            _branch("command", ["run"], "CommandParams", {"$ref": _REF.format(name="CommandInputs")}, common),
            *(
                _branch("model", [op], params_type, {"$ref": _REF.format(name=inputs_type)}, common)
                for op, (params_type, inputs_type) in _MODEL_TYPES.items()
            ),
        ],
    }


def _branch(kind: str, ops: list[str], params_name: str, inputs: JsonObject, common: JsonObject) -> JsonObject:
    return {
        "type": "object",
        "title": f"{kind} job",
        "required": ["kind", "op", "params", *(["inputs"] if kind == "model" else [])],
        "additionalProperties": False,
        "properties": {
            "kind": {"const": kind},
            "op": {"type": "string", "enum": ops},
            "params": {"$ref": _REF.format(name=params_name)},
            "inputs": inputs,
            **common,
        },
    }
