"""The table is consistent with itself, the errors and the documents generated from it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from aether.api import docs
from aether.api.operation import ACCESS
from aether.api.operations import BY_NAME, OPERATIONS
from aether.contract.errors import KINDS

ROOT = Path(__file__).parents[3]


def test_names_and_spellings_are_unique() -> None:
    spellings = Counter((path, o.method) for o in OPERATIONS for path in (o.path, *o.aliases))
    assert len(BY_NAME) == len(OPERATIONS)
    assert max(spellings.values()) == 1


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_row(operation) -> None:  # type: ignore[no-untyped-def]
    assert set(operation.all_errors) <= KINDS.keys()
    assert operation.access in ACCESS
    assert operation.path.startswith("/v0/")
    assert (operation.body_type is None) == (operation.body in ("none", "raw"))
    if operation.effect == "read":
        assert operation.idempotent
        assert not {"BUDGET_EXHAUSTED", "DISK_FULL"} & set(operation.errors)
    else:
        assert {"BUDGET_EXHAUSTED", "DISK_FULL"} <= set(operation.errors)
    fields = set(
        getattr(operation.request, "__struct_fields__", getattr(operation.request, "__dataclass_fields__", ()))
    )
    filled = {p.field for p in operation.query} | ({operation.path_argument} - {None})
    if operation.body_field:
        filled.add(operation.body_field)
    elif operation.body_type is not None:
        filled |= set(operation.body_type.__struct_fields__)
    if operation.body != "raw":
        assert filled <= fields
        required = {f.name for f in msgspec.structs.fields(operation.request) if f.required}
        assert required <= filled


def test_documents_are_current() -> None:
    assert docs.main([str(ROOT / "docs"), "--check"]) == 0, "run `python -m aether.api.docs`"


def test_check_notices_a_stale_document(tmp_path: Path) -> None:
    assert docs.main([str(tmp_path)]) == 0
    assert docs.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "errors.md").write_text("old")
    assert docs.main([str(tmp_path), "--check"]) == 1


def test_every_error_is_documented() -> None:
    text = docs.errors_markdown()
    assert all(f"`{code}`" in text for code in KINDS)
