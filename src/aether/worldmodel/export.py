"""ONNX graphs of a trained model: `encode`, `step`, `sequence`; opset 20, float32, physical units, no torch to run.

Normalisation is folded into the graphs, and so are the constants of the cell (LeCun's tanh scales, the unit of time):
a scan iteration at batch 1 costs mostly node dispatch, so nodes are what is saved.

- ``encode(obs[B,O]) -> z[B,d]``
- ``step(z[B,d], action[B,A], dt[B,1], h[B,H]) -> z_hat[B,d], h_next[B,H], obs_mean[B,O], obs_std[B,O], gate_mean[B,1]``
- ``sequence(obs[B,S+1,O], action[B,S,A], dt[B,S], h0[B,H]) ->
  energy[B,S], z[B,S+1,d], z_hat[B,S,d], h_T[B,H], obs_mean[B,S,O], obs_std[B,S,O]``;
  h_T is the state at the last observation, ready for `step`; energy is the mean squared latent error of each step.
"""

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from aether.worldmodel.closed_form import TANH_GAIN, TANH_SLOPE
from aether.worldmodel.data import Normaliser
from aether.worldmodel.model import Jepa

OPSET: Final = 20
_BATCH_MAX: Final = 65_536
_STEPS_MAX: Final = 65_536


def _buffer(module: nn.Module, **values: Tensor) -> None:
    for name, value in values.items():
        module.register_buffer(name, value.detach().clone())


class _Encode(nn.Module):
    mean: Tensor
    scale: Tensor

    def __init__(self, model: Jepa, norm: Normaliser) -> None:
        super().__init__()
        self.net = model.encoder
        _buffer(self, mean=torch.tensor(norm.obs_mean), scale=1.0 / torch.tensor(norm.obs_std))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net((obs - self.mean) * self.scale)  # type: ignore[no-any-return]


class _Cell(nn.Module):
    """The CfC step with every constant folded into its weights; h and the readout as in `closed_form`."""

    w_in: Tensor
    b_in: Tensor
    w_state: Tensor
    w_heads: Tensor
    b_heads: Tensor

    def __init__(self, model: Jepa, norm: Normaliser) -> None:
        super().__init__()
        cell, states = model.cell, model.sizes.state
        per_second = torch.ones(4 * states)
        per_second[2 * states : 3 * states] /= norm.dt_mean_s
        _buffer(
            self,
            w_in=cell.w_in.weight.T * TANH_SLOPE,
            b_in=cell.w_in.bias * TANH_SLOPE,
            w_state=cell.w_state.weight.T * TANH_SLOPE,
            w_heads=cell.heads.weight.T * TANH_GAIN * per_second,
            b_heads=cell.heads.bias * per_second,
        )
        self.states = states

    def drive(self, z: Tensor, action: Tensor) -> Tensor:
        return torch.cat([z, action], -1) @ self.w_in + self.b_in

    def advance(self, driven: Tensor, h: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """(h_next[B, H], heads[B, 4H]): what has to happen in order; a scan iteration is these twelve nodes."""
        backbone = torch.tanh(torch.addmm(driven, h, self.w_state))
        heads = torch.addmm(self.b_heads, backbone, self.w_heads)
        branches, ta, tb = torch.split(heads, [2 * self.states, self.states, self.states], dim=-1)
        f1, f2 = torch.tanh(branches).chunk(2, -1)
        return f1 + torch.sigmoid(ta * dt + tb) * (f2 - f1), heads

    def readout(self, heads: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        """(readout, gate) from heads[..., 4H] and dt[..., 1]; needs no order, so a sequence does it at once."""
        branches, ta, tb = torch.split(heads, [2 * self.states, self.states, self.states], dim=-1)
        f1, f2 = torch.tanh(branches).chunk(2, -1)
        gate = torch.sigmoid(ta * dt + tb)
        return (gate - torch.sigmoid(tb)) * (f2 - f1), gate


class _Decode(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, model: Jepa, norm: Normaliser) -> None:
        super().__init__()
        self.model = model
        _buffer(self, mean=torch.tensor(norm.obs_mean), std=torch.tensor(norm.obs_std))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.model.decode(z)
        return mean * self.std + self.mean, torch.exp(0.5 * log_variance) * self.std


class _Step(nn.Module):
    def __init__(self, model: Jepa, norm: Normaliser) -> None:
        super().__init__()
        self.cell, self.decode, self.project = _Cell(model, norm), _Decode(model, norm), model.readout

    def forward(self, z: Tensor, action: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        h_next, heads = self.cell.advance(self.cell.drive(z, action), h, dt)
        readout, gate = self.cell.readout(heads, dt)
        z_hat = z + self.project(readout)
        mean, std = self.decode(z_hat)
        return z_hat, h_next, mean, std, gate.mean(-1, keepdim=True)


class _Sequence(nn.Module):
    def __init__(self, model: Jepa, norm: Normaliser) -> None:
        super().__init__()
        self.encode, self.cell, self.decode = _Encode(model, norm), _Cell(model, norm), _Decode(model, norm)
        self.project = model.readout

    def forward(self, obs: Tensor, action: Tensor, dt: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
        z = self.encode(obs)
        driven = self.cell.drive(z[:, :-1], action).transpose(0, 1)

        def one(h: Tensor, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.cell.advance(x[0], h, x[1])

        h_last, heads = scan(one, h0, (driven, dt.transpose(0, 1).unsqueeze(-1)))
        readouts, _ = self.cell.readout(heads.transpose(0, 1), dt.unsqueeze(-1))
        z_hat = z[:, :-1] + self.project(readouts)
        energy = ((z_hat - z[:, 1:]) ** 2).mean(-1)
        return energy, z, z_hat, h_last, *self.decode(z_hat)


def export_graphs(model: Jepa, norm: Normaliser, out: Path) -> None:
    """Writes encode.onnx, step.onnx and sequence.onnx into ``out``, each self-contained and without metadata."""
    sizes = model.sizes
    batch = torch.export.Dim("batch", min=1, max=_BATCH_MAX)
    steps = torch.export.Dim("steps", min=1, max=_STEPS_MAX)
    rows, several = 3, 5
    obs, action = torch.zeros(rows, several + 1, sizes.obs), torch.zeros(rows, several, sizes.action)
    dt, h = torch.full((rows, several), norm.dt_mean_s), torch.zeros(rows, sizes.state)
    z = torch.zeros(rows, sizes.latent)
    outputs = ["z_hat", "h_next", "obs_mean", "obs_std", "gate_mean"]
    _export(_Encode(model, norm), out / "encode.onnx", {"obs": obs[:, 0]}, [{0: batch}], ["z"])
    step_inputs = {"z": z, "action": action[:, 0], "dt": dt[:, :1], "h": h}
    _export(_Step(model, norm), out / "step.onnx", step_inputs, [{0: batch}] * 4, outputs)
    _export(
        _Sequence(model, norm),
        out / "sequence.onnx",
        {"obs": obs, "action": action, "dt": dt, "h0": h},
        [{0: batch, 1: steps + 1}, {0: batch, 1: steps}, {0: batch, 1: steps}, {0: batch}],
        ["energy", "z", "z_hat", "h_T", "obs_mean", "obs_std"],
    )


def _export(
    module: nn.Module, path: Path, inputs: dict[str, Tensor], dims: list[dict[int, object]], outputs: list[str]
) -> None:
    program = torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes=tuple(dims),
        input_names=list(inputs),
        output_names=outputs,
        opset_version=OPSET,
        verbose=False,
    )
    if program is None:
        raise RuntimeError(f"cannot export {path.name}: the exporter returned no program")
    path.write_bytes(_plain(program.model_proto.SerializeToString()))


def _plain(graph: bytes) -> bytes:
    """The same graph without the exporter's notes: they hold stack traces with paths of the building machine."""
    import onnx

    proto = onnx.load_from_string(graph)
    proto.producer_version = ""
    del proto.metadata_props[:]
    pending = [proto.graph]
    while pending:
        current = pending.pop()
        del current.metadata_props[:], current.value_info[:]
        current.doc_string = ""
        for node in current.node:
            del node.metadata_props[:]
            node.doc_string = ""
            pending.extend(a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    onnx.checker.check_model(proto, full_check=True)
    plain: bytes = proto.SerializeToString(deterministic=True)
    return plain
