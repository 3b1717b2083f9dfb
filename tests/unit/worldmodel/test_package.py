"""The signing tool: keys, signatures, refusals; and the small pure parts of calibration and the card."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aether.contract.canonical import digest_bytes
from aether.contract.errors import EXIT_FAILED, EXIT_USAGE
from aether.worldmodel.calibrate import conformal_quantile, horizon_edges_s
from aether.worldmodel.card import verdict
from aether.worldmodel.package import golden_difference, main, open_graphs

SAMPLE = Path(__file__).parents[3] / "packages" / "pendulum" / "1.0.0"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    directory = tmp_path / "pendulum" / "1.0.0"
    shutil.copytree(SAMPLE, directory)
    return directory


def test_a_user_signs_with_his_own_key(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, public = tmp_path / "my.key", tmp_path / "my.pub"
    assert main(["keygen", "--key", str(key), "--public", str(public)]) == 0
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = (copy / "manifest.json").read_bytes()
    assert main(["verify", "--public", str(public), str(copy)]) == EXIT_FAILED
    assert "no given key verifies its signature" in capsys.readouterr().err
    assert main(["sign", "--key", str(key), str(copy)]) == 0
    assert main(["verify", "--public", str(public), str(copy)]) == 0
    assert capsys.readouterr().out == f"pendulum@1.0.0 {digest_bytes(before)}\n"


def test_keys_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, public = tmp_path / "my.key", tmp_path / "my.pub"
    key.write_text("precious")
    assert main(["keygen", "--key", str(key), "--public", str(public)]) == EXIT_USAGE
    assert key.read_text() == "precious" and not public.exists()
    assert capsys.readouterr().err.startswith("cannot keygen: ")


def test_a_public_key_does_not_sign(copy: Path, tmp_path: Path) -> None:
    public = tmp_path / "my.pub"
    main(["keygen", "--key", str(tmp_path / "my.key"), "--public", str(public)])
    assert main(["sign", "--key", str(public), str(copy)]) == EXIT_USAGE


def test_the_samples_graphs_reproduce_its_golden_vectors() -> None:
    assert golden_difference(SAMPLE / "golden.npz", open_graphs(SAMPLE, 96)) < 2e-5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=9, max_size=200))
def test_the_conformal_quantile_covers_its_share_of_calibration(scores: list[float]) -> None:
    column = np.array(scores)[:, None]
    level = conformal_quantile(column)[0]
    assert level in scores
    assert (column <= level).sum() >= 0.9 * (len(scores) + 1) - 1e-9


def test_horizon_bins_join_at_the_longest_interval() -> None:
    edges = horizon_edges_s()
    assert (np.diff(edges) > 0).all() and edges[0] == pytest.approx(0.01) and edges[-1] == pytest.approx(1.0)
    assert 0.25 in edges.round(12)


def test_the_verdict_says_only_what_the_intervals_allow() -> None:
    def row(low: float, high: float) -> dict[str, Any]:
        return {"difference_to_cfc_jepa_interval95": [low, high]}

    table = {"cfc_jepa": {}, "persistence": row(0.1, 0.2), "arx_dt": row(-0.1, 0.1), "gru_mlp_dt": row(-0.2, -0.1)}
    said = verdict(table)
    assert said.startswith("Better than persistence (nothing changes)")
    assert "a tie with ARX, 8 lags, with dt" in said and "worse than GRU" in said
