"""The graph reader: what it refuses, that it sees through nesting, and that no bytes break it."""

from __future__ import annotations

import contextlib

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from aether.runtime.onnxfile import GraphError, check_graph
from tests.unit.runtime.cfcd_client import PACKAGE

OPSET = 20


def model(
    *nodes: onnx.NodeProto, initializers: tuple[onnx.TensorProto, ...] = (), opset: int = OPSET
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def relu(domain: str = "") -> onnx.NodeProto:
    return helper.make_node("Relu", ["x"], ["y"], domain=domain)


def external() -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def refused(proto: onnx.ModelProto) -> str:
    with pytest.raises(GraphError) as caught:
        check_graph(proto.SerializeToString(), OPSET)
    return str(caught.value)


@pytest.mark.parametrize("name", ["encode", "step", "sequence"])
def test_the_sample_graphs_pass(name: str) -> None:
    check_graph((PACKAGE / f"{name}.onnx").read_bytes(), OPSET)


def test_plain_model_passes_with_either_name_of_the_default_domain() -> None:
    for domain in ("", "ai.onnx"):
        check_graph(model(relu(domain)).SerializeToString(), OPSET)


def test_custom_operators_are_refused() -> None:
    assert "domain 'com.microsoft'" in refused(model(relu("com.microsoft")))


def test_custom_operator_inside_a_branch_is_refused() -> None:
    inner = helper.make_graph([relu("evil")], "inner", [], [])
    assert "domain 'evil'" in refused(model(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)))


def test_importing_another_domain_is_refused() -> None:
    proto = model(relu())
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert "domain 'com.microsoft'" in refused(proto)


def test_external_data_is_refused_wherever_a_tensor_may_hide() -> None:
    assert refused(model(relu(), initializers=(external(),))) == "it names external data"
    constant = helper.make_node("Constant", [], ["c"])
    constant.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external())
    assert refused(model(constant)) == "it names external data"
    located = external()
    del located.external_data[:]
    assert refused(model(relu(), initializers=(located,))) == "it names external data"
    sparse = model(relu())
    sparse.graph.sparse_initializer.add().values.CopyFrom(external())
    assert refused(sparse) == "it names external data"


def test_functions_training_and_other_opsets_are_refused() -> None:
    functions = model(relu())
    functions.functions.add(name="f")
    assert refused(functions) == "it holds local functions"
    training = model(relu())
    training.training_info.add()
    assert refused(training) == "it holds training information"
    assert refused(model(relu(), opset=19)) == "its opset is 19, not 20"


def test_a_second_graph_field_cannot_hide_a_node() -> None:
    """Protobuf merges repeated singular fields, so both occurrences are walked."""
    extra = onnx.ModelProto()
    extra.graph.node.append(relu("evil"))
    with pytest.raises(GraphError, match="evil"):
        check_graph(model(relu()).SerializeToString() + extra.SerializeToString(), OPSET)


def test_deep_nesting_is_refused() -> None:
    graph = helper.make_graph([relu()], "g", [], [])
    for _ in range(12):
        graph = helper.make_graph([helper.make_node("Loop", [], [], body=graph)], "g", [], [])
    assert refused(model(helper.make_node("Loop", ["x"], ["y"], body=graph))) == "its graphs are nested too deeply"


def test_empty_and_cut_files_are_refused() -> None:
    whole = model(relu()).SerializeToString()
    for data in (b"", b"\x3a\x05ab", whole[: len(whole) // 2]):
        with pytest.raises(GraphError):
            check_graph(data, OPSET)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    with contextlib.suppress(GraphError):
        check_graph(data, OPSET)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_graph_is_refused_or_read(data: st.DataObject) -> None:
    raw = bytearray(model(relu("")).SerializeToString())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(GraphError):
        check_graph(bytes(raw), OPSET)
