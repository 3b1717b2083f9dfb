"""The torch side: the cell against the closed form, the anchored readout, export parity. Needs the extra `train`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aether.worldmodel.closed_form import CfcWeights, cfc_step
from aether.worldmodel.data import Normaliser, generate

torch = pytest.importorskip("torch", reason="the extra `train` is not installed")

from aether.worldmodel.model import CfcCell, Jepa, Sizes, spread_penalty  # noqa: E402


def weights_of(cell: CfcCell) -> CfcWeights:
    def array(value: torch.Tensor) -> np.ndarray:
        return value.detach().numpy().astype(np.float64)

    return CfcWeights(
        array(cell.w_in.weight),
        array(cell.w_in.bias),
        array(cell.w_state.weight),
        array(cell.heads.weight),
        array(cell.heads.bias),
    )


@pytest.mark.parametrize("rows", [1, 5, 16])
def test_cell_is_the_closed_form_for_every_batch(rows: int) -> None:
    """Batches of 1, more, and exactly the state size, where ncps 1.0.1 is silently wrong."""
    torch.manual_seed(rows)
    cell = CfcCell(inputs=3, state=16, backbone=12)
    x, h, dt = torch.randn(rows, 3), torch.randn(rows, 16).tanh(), torch.rand(rows, 1) * 3
    with torch.no_grad():
        got = cell.step(cell.w_in(x), h, dt)
    wanted = cfc_step(weights_of(cell), x.numpy(), h.numpy(), dt.numpy())
    for ours, reference in zip(got, wanted, strict=True):
        assert np.abs(ours.numpy() - reference).max() < 1e-6


def test_a_sequence_is_its_steps() -> None:
    torch.manual_seed(0)
    cell = CfcCell(inputs=2, state=8, backbone=6)
    x, dt, h = torch.randn(4, 7, 2), torch.rand(4, 7), torch.zeros(4, 8)
    with torch.no_grad():
        readouts, _, last = cell(x, dt, h)
        for k in range(7):
            h, readout, _ = cell.step(cell.w_in(x[:, k]), h, dt[:, k, None])
            assert torch.allclose(readout, readouts[:, k])
    assert torch.equal(h, last)


def test_a_prediction_over_no_time_is_the_present() -> None:
    torch.manual_seed(1)
    model = Jepa(Sizes(state=8, backbone=6, hidden=16))
    z, action = torch.randn(3, 5, 8), torch.randn(3, 5, 1)
    with torch.no_grad():
        z_hat, _ = model.predict(z, action, torch.zeros(3, 5))
    assert torch.equal(z_hat, z)


def test_the_regulariser_punishes_collapse() -> None:
    torch.manual_seed(2)
    healthy = torch.randn(512, 8)
    assert spread_penalty(healthy * 1e-3) > spread_penalty(healthy) + 0.5
    assert spread_penalty(healthy[:, :1].repeat(1, 8)) > spread_penalty(healthy) + 0.1


def test_exported_graphs_agree_with_torch(tmp_path: Path) -> None:
    """Folded constants and the scan change nothing: 1e-5 in normalised units, other batch sizes and lengths."""
    from aether.worldmodel.export import export_graphs
    from aether.worldmodel.fit import normalised
    from aether.worldmodel.package import open_graphs

    torch.manual_seed(3)
    model = Jepa(Sizes(state=12, backbone=10, hidden=16)).eval()
    data = generate(6, 12, 8)
    norm = Normaliser.of(data)
    export_graphs(model, norm, tmp_path)
    graphs, batch = open_graphs(tmp_path, 12), normalised(data, norm)
    with torch.no_grad():
        z = model.encoder(batch.obs)
        z_hat, _ = model.predict(z[:, :-1], batch.action, batch.dt)
        mean = model.decode(z_hat)[0] * torch.tensor(norm.obs_std) + torch.tensor(norm.obs_mean)
    walked = graphs.walked(data.obs, data.action, data.dt)
    assert np.abs(walked.z - z.numpy()).max() < 1e-5 and np.abs(walked.z_hat - z_hat.numpy()).max() < 1e-5
    assert np.abs(walked.obs_mean - mean.numpy()).max() < 1e-5
    before, h = graphs.state_after(data.obs[:, :-1], data.action[:, :-1], data.dt[:, :-1])
    stepped = graphs.stepped(before, data.action[:, -1], data.dt[:, -1:], h)
    assert np.abs(stepped.z_hat - walked.z_hat[:, -1]).max() < 1e-5
    assert np.abs(stepped.h_next - walked.h_last).max() < 1e-5
