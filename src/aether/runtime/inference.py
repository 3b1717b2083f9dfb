"""The three operations of one loaded model, each over a batch of queries that fit together.

A batch holds queries of one operation and one `shape_of`; the caller keeps tenants and labels apart. Rows never
influence each other: each query gets the answer that it would get alone, up to the last bits of float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aether.contract.jobs import ModelOp
from aether.contract.modelwire import (
    EncodeResult,
    HorizonPrediction,
    PredictResult,
    ScoreResult,
)
from aether.runtime.calibration import nll_of, sequence_score
from aether.runtime.graphs import Float
from aether.runtime.modelpackage import LoadedPackage
from aether.runtime.queries import EncodeQuery, PredictQuery, Query, QueryParser, ScoreQuery

Result = PredictResult | EncodeResult | ScoreResult


@dataclass(frozen=True, slots=True)
class Inference:
    """Parses and answers requests for one package; immutable, so one bad request leaves nothing behind."""

    package: LoadedPackage
    parser: QueryParser

    @classmethod
    def of(cls, package: LoadedPackage) -> Inference:
        return cls(package, QueryParser.of(package.schema, package.manifest))

    def parse(self, op: ModelOp, params: dict[str, Any], inputs: dict[str, Any]) -> Query:
        """Raises AetherError with one of the codes of `queries`."""
        if op == "predict_next_state":
            return self.parser.predict(params, inputs)
        if op == "encode_state":
            return self.parser.encode(params, inputs)
        return self.parser.score(params, inputs)

    @staticmethod
    def shape_of(query: Query) -> int:
        """Tasks of one operation may share a batch when this is equal: the length of the history or sequence."""
        return 0 if isinstance(query, EncodeQuery) else len(query.obs)

    def run(self, queries: Sequence[Query]) -> Sequence[Result]:
        """One result for each of ``queries``, which are of one kind and one `shape_of`."""
        first = queries[0]
        if isinstance(first, PredictQuery):
            return self.predict([query for query in queries if isinstance(query, PredictQuery)])
        if isinstance(first, EncodeQuery):
            return self.encode([query for query in queries if isinstance(query, EncodeQuery)])
        return self.score([query for query in queries if isinstance(query, ScoreQuery)])

    def encode(self, queries: Sequence[EncodeQuery]) -> list[EncodeResult]:
        z = self.package.graphs.encoded(_joined([query.obs for query in queries]))
        ends = np.cumsum([len(query.obs) for query in queries])
        parts = np.split(z, ends[:-1])
        return [EncodeResult(z=part.tolist()) for part in parts]

    def predict(self, queries: Sequence[PredictQuery]) -> list[PredictResult]:
        graphs, schema = self.package.graphs, self.package.schema
        z, h = graphs.state_after(*_stacked(queries))
        horizon_s = _joined([query.horizon_s for query in queries])
        held = _stack([query.held for query in queries])
        if len(horizon_s) > len(queries):
            rows = np.repeat(np.arange(len(queries)), [len(query.horizon_s) for query in queries])
            z, h, held = z[rows], h[rows], held[rows]
        ahead = graphs.rolled_out(z, h, held, horizon_s, schema.dt_max_s)
        half = self.package.tables.half_widths(len(queries[0].obs), horizon_s, ahead.obs_std)
        lows, highs = (ahead.obs_mean - half).tolist(), (ahead.obs_mean + half).tolist()
        means, stds, latents = ahead.obs_mean.tolist(), ahead.obs_std.tolist(), ahead.z_hat.tolist()
        results, row = [], 0
        for query in queries:
            predictions = []
            for horizon in query.horizons_s:
                predictions.append(
                    HorizonPrediction(
                        horizon_s=horizon,
                        mean=means[row],
                        std=stds[row],
                        interval90=list(zip(lows[row], highs[row], strict=True)),
                        z_hat=latents[row],
                        extrapolating=query.outside or horizon > schema.dt_max_s,
                    )
                )
                row += 1
            results.append(PredictResult(predictions=predictions))
        return results

    def score(self, queries: Sequence[ScoreQuery]) -> list[ScoreResult]:
        tables = self.package.tables
        obs, action, dt = _stacked(queries)
        walked = self.package.graphs.walked(obs, action, dt)
        surprise = tables.surprise(walked.energy, dt)
        nll = nll_of(obs[:, 1:], walked.obs_mean, walked.obs_std)
        p_values = tables.p_values(surprise)
        threshold = tables.threshold_for(dt.shape[1])
        return [
            ScoreResult(
                energy=walked.energy[i].tolist(),
                surprise=surprise[i].tolist(),
                nll=nll[i].tolist(),
                p_value=p_values[i].tolist(),
                seq_score=sequence_score(surprise[i]),
                threshold_id=threshold.id,
                threshold=threshold.value,
            )
            for i in range(len(queries))
        ]


def _stack(arrays: Sequence[Float]) -> Float:
    """Rows into one batch; a lone row is only viewed, which is most of the cost at batch 1."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def _joined(arrays: Sequence[Float]) -> Float:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _stacked(queries: Sequence[PredictQuery] | Sequence[ScoreQuery]) -> tuple[Float, Float, Float]:
    return (
        _stack([query.obs for query in queries]),
        _stack([query.action for query in queries]),
        _stack([query.dt for query in queries]),
    )
