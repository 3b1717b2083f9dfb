"""Bodies of all operations: whatever JSON comes is a value of the body's type or refused, and a value reads back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.api.body import decode_json
from aether.api.operation import Operation
from aether.api.operations import OPERATIONS
from tests.support.hostile import JSON, changed_bytes, outcome

BODIES = [operation for operation in OPERATIONS if operation.body_type is not None]
REFUSALS = ("BAD_JSON", "BAD_FIELD")


def fields(kind: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with the field names of a body, and anything in them."""
    return st.dictionaries(st.sampled_from(kind.__struct_encode_fields__), JSON, max_size=4)


@pytest.mark.parametrize("operation", BODIES, ids=lambda o: o.name)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_body_is_a_value_or_refused(operation: Operation, data: st.DataObject) -> None:
    kind: Any = operation.body_type
    body = data.draw(fields(kind) | JSON)
    decoder = msgspec.json.Decoder(kind)
    for raw in (json.dumps(body).encode(), data.draw(changed_bytes(json.dumps(body).encode()))):
        value = outcome(lambda raw=raw: decode_json(raw, decoder), *REFUSALS)  # type: ignore[misc]
        if value is not None:
            assert decode_json(msgspec.json.encode(value), decoder) == value
