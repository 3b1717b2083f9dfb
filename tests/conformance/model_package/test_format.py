"""The committed schemas are the types'; samples pass or fail both; the sample package is what its schemas say."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgspec
import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from aether.contract.canonical import canonical
from aether.contract.modelwire import dsse_message
from aether.runtime.modelpackage import REQUIRED_FILES
from aether.worldmodel.package import key_id
from tests.conformance.model_package.package_schemas import FOLDER, TYPES, rendered

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "packages" / "pendulum" / "1.0.0"
KEY = ROOT / "packages" / "keys" / "aether-samples.pub"
SAMPLES = sorted((FOLDER / "samples").glob("*/*.json"))
DOCUMENTS = {
    "manifest": "manifest.json",
    "schema": "schema.json",
    "stats": "stats.json",
    "signature": "signature.dsse.json",
}


def schema_of(name: str) -> object:
    return json.loads((FOLDER / f"{name}.schema.json").read_text())


@pytest.mark.parametrize("name", TYPES)
def test_the_schema_is_the_types(name: str) -> None:
    assert (FOLDER / f"{name}.schema.json").read_text() == rendered(name)


def test_every_document_has_good_and_bad_samples() -> None:
    for name in TYPES:
        kinds = {path.name[:2] for path in SAMPLES if path.parent.name == name}
        assert kinds == {"ok", "ba"}, name


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_samples_pass_or_fail_in_schema_and_type_alike(path: Path) -> None:
    name, text = path.parent.name, path.read_bytes()
    valid = jsonschema.Draft202012Validator(schema_of(name)).is_valid(json.loads(text))
    try:
        msgspec.json.decode(text, type=TYPES[name])
        decoded = True
    except msgspec.ValidationError:
        decoded = False
    assert valid == decoded == path.name.startswith("ok")


@pytest.mark.parametrize("name", TYPES)
def test_the_sample_package_matches_its_schemas_and_is_canonical(name: str) -> None:
    raw = (PACKAGE / DOCUMENTS[name]).read_bytes()
    document = json.loads(raw)
    jsonschema.Draft202012Validator(schema_of(name)).validate(document)
    assert canonical(document) == raw


def test_the_signature_verifies_by_hand() -> None:
    """Nothing but the DSSE rules and the key, as another implementation would do it."""
    import base64

    envelope = json.loads((PACKAGE / "signature.dsse.json").read_bytes())
    key = load_pem_public_key(KEY.read_bytes())
    payload = base64.b64decode(envelope["payload"])
    assert payload == (PACKAGE / "manifest.json").read_bytes()
    assert envelope["signatures"][0]["keyid"] == key_id(key)  # type: ignore[arg-type]
    message = dsse_message(envelope["payloadType"], payload)
    kind = envelope["payloadType"]
    assert message == f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    key.verify(base64.b64decode(envelope["signatures"][0]["sig"]), message)  # type: ignore[call-arg,union-attr]


def test_the_package_is_complete_small_and_holds_no_private_key() -> None:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file()}
    assert files == {*REQUIRED_FILES, "manifest.json", "signature.dsse.json"}
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*")) <= 5 << 20
    for path in (ROOT / "packages").rglob("*"):
        assert path.is_dir() or b"PRIVATE KEY" not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["encode", "step", "sequence"])
def test_graphs_are_plain_opset_20_without_traces_of_the_machine_that_made_them(name: str) -> None:
    raw = (PACKAGE / f"{name}.onnx").read_bytes()
    model = onnx.load_from_string(raw)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]
    assert not model.metadata_props and b".py" not in raw
    for port in (*model.graph.input, *model.graph.output):
        assert port.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_report_carries_its_baselines_and_the_card_its_limits() -> None:
    report = json.loads((PACKAGE / "validation" / "report.json").read_bytes())
    table = report["normalised_mse"]
    assert set(table) == {"cfc_jepa", "persistence", "arx_dt", "gru_mlp_dt"}
    assert report["points"] == 1000 and not report["latent"]["collapsed"]
    card = (PACKAGE / "MODEL_CARD.md").read_text()
    for text in ("CFC", "Hasani", "## Limits", "persistence", f"{table['cfc_jepa']['mean']:.5f}"):
        assert text in card


def test_golden_vectors_are_plain_arrays() -> None:
    with np.load(PACKAGE / "golden.npz", allow_pickle=False) as golden:
        assert {name.split(".")[0] for name in golden.files} == {"encode", "step", "sequence"}
        assert all(np.isfinite(golden[name]).all() for name in golden.files)
