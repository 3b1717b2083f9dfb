"""Reads just enough of an ONNX file to refuse what a package may not hold. Standard library alone.

ONNX Runtime resolves external data relative to the working directory when a model comes from memory, and its builtin
`com.microsoft` operators are reachable without registering a library. So the file is walked before a session sees it:

- operators of the default domain only, in every nested graph, and one opset, the manifest's;
- no external data, no local functions, no training part;
- no wire types that protobuf 3 does not write, no nesting beyond `_DEPTH_MAX`, no more than `_NODES_MAX` nodes.

Field numbers: onnx.proto3 (ONNX IR version 10). Like protobuf, the walker visits every occurrence of a field, so a
repeated singular field cannot hide anything; an unknown field is skipped, as ONNX Runtime skips it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

_DEPTH_MAX: Final = 16
_NODES_MAX: Final = 20_000
_VARINT_BYTES_MAX: Final = 10
_DEFAULT_DOMAINS: Final = ("", "ai.onnx")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# message -> field number -> message of that field
_CHILDREN: Final[Mapping[str, Mapping[int, str]]] = {
    "ModelProto": {7: "GraphProto", 8: "OperatorSetIdProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "OperatorSetIdProto": {},
    "TensorProto": {},
}
_REFUSED: Final[Mapping[tuple[str, int], str]] = {
    ("ModelProto", 20): "it holds training information",
    ("ModelProto", 25): "it holds local functions",
    ("TensorProto", 13): "it names external data",
}


class GraphError(ValueError):
    """The reason why a graph file may not be loaded, as a clause."""


@dataclass(slots=True)
class _Walk:
    opset: int
    nodes: int = 0
    opsets_seen: int = 0


def check_graph(data: bytes, opset: int) -> None:
    """Raises GraphError unless ``data`` is a self-contained graph of standard operators of ``opset``."""
    walk = _Walk(opset)
    _visit(memoryview(data), "ModelProto", walk, 0)
    if walk.opsets_seen == 0 or walk.nodes == 0:
        raise GraphError("it is not an ONNX model")


def _visit(data: memoryview, message: str, walk: _Walk, depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise GraphError("its graphs are nested too deeply")
    if message == "NodeProto":
        walk.nodes += 1
        if walk.nodes > _NODES_MAX:
            raise GraphError(f"it has more than {_NODES_MAX} nodes")
    if message == "OperatorSetIdProto":
        _check_opset(data, walk)
        return
    children = _CHILDREN[message]
    for number, wire, value in _fields(data):
        reason = _REFUSED.get((message, number))
        if reason is not None:
            raise GraphError(reason)
        if message == "TensorProto" and number == 14 and value != 0:
            raise GraphError("it names external data")
        if message == "NodeProto" and number == 7 and wire == _BYTES:
            _check_domain(value)
        child = children.get(number)
        if child is not None and isinstance(value, memoryview):
            _visit(value, child, walk, depth + 1)


def _check_domain(value: int | memoryview) -> None:
    domain = bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else ""
    if domain not in _DEFAULT_DOMAINS:
        raise GraphError(f"it uses an operator of domain {domain[:40]!r}")


def _check_opset(data: memoryview, walk: _Walk) -> None:
    version = 0
    for number, wire, value in _fields(data):
        if number == 1 and wire == _BYTES:
            _check_domain(value)
        elif number == 2 and isinstance(value, int):
            version = value
    if version != walk.opset:
        raise GraphError(f"its opset is {version}, not {walk.opset}")
    walk.opsets_seen += 1


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Field number, wire type and value: an integer for varints, the bytes otherwise."""
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise GraphError("it is not well-formed protobuf")
        if length > end - position:
            raise GraphError("it is cut off")
        yield number, wire, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for i in range(_VARINT_BYTES_MAX):
        if position + i >= len(data):
            raise GraphError("it is cut off")
        byte = data[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise GraphError("it is not well-formed protobuf")
