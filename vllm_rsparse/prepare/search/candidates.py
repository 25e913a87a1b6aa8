# SPDX-License-Identifier: Apache-2.0
"""Perplexity of many plans at once, streamed: each layer is loaded once for all.

Every linear's thresholds at any kept fraction, and its factors up to the largest
requested rank, are found once, on dense activations. A candidate is then one sparse
forward pass without calibration.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.prepare.calibration.factors import truncated_svd
from vllm_rsparse.prepare.calibration.loss import text_losses
from vllm_rsparse.prepare.calibration.observers import LayerInputs
from vllm_rsparse.prepare.calibration.propagate import sparse_linears
from vllm_rsparse.prepare.calibration.thresholds import (
    KEEP_ALL,
    channel_thresholds,
    column_norms,
    midway,
)
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.run import Run

# Scores that a linear's quantiles are taken from; the kept fraction is then off by
# 0.0014 (one standard deviation), and 224 linears take 117 MB.
SCORES = 1 << 17
# Hidden states in flight, of all candidates of one pass together.
STATE_BYTES = 4 << 30


class Candidates:
    """Evaluates plans on the run's windows.

    Args:
        run: the model and the text; positions behind its dense prefix count.
        widest: the plan with the largest rank that a candidate may have.
    """

    def __init__(self, run: Run, widest: LinearPlan) -> None:
        self._run = run
        self._tables: dict[str, _Table] = {}
        model = run.model
        hidden = model.embed(run.windows)
        self._state_bytes = hidden.nbytes
        with tqdm(total=len(run.linears), desc="quantiles", unit="linear") as progress:
            for layer in run.layers:
                inputs = LayerInputs(layer, run.windows.numel())
                with model.layer(layer.index) as module, inputs.observe(module):
                    model.run_layer(layer.index, hidden)
                for linear in layer:
                    weight = model.weight(linear)
                    self._tables[linear.name] = _Table(
                        weight.to(model.device),
                        inputs.of(linear),
                        widest.rank(linear.shape),
                        run.seed,
                    )
                    progress.update()

    @property
    def at_once(self) -> int:
        """The largest number of candidates that one call of ``losses`` should take."""
        return max(1, STATE_BYTES // self._state_bytes)

    @torch.no_grad()
    def losses(self, candidates: Sequence[Mapping[str, LinearPlan]]) -> list[float]:
        """Mean negative log likelihood of each, over the sparse positions (nats)."""
        run, model = self._run, self._run.model
        hidden = model.embed(run.windows)
        states = [hidden.clone() for _ in candidates]
        for layer in run.layers:
            with model.layer(layer.index) as module:
                for plans, state in zip(candidates, states, strict=True):
                    with sparse_linears(module) as sparse:
                        for linear in layer:
                            tensors = self._tables[linear.name].tensors(
                                plans[linear.name], linear.shape, model.device
                            )
                            sparse.install(linear.kind, tensors, run.dense_prefix)
                        model.run_layer(layer.index, state)
        return text_losses(run, states)


class _Table:
    """One linear: sorted scores, column norms, and its widest factors, on the CPU."""

    def __init__(self, weight: Tensor, x: Tensor, rank: int, seed: int) -> None:
        norms = column_norms(weight)
        step = max(1, x.numel() // SCORES)
        # A step that shares no factor with the number of channels visits all of them.
        while math.gcd(step, x.shape[1]) != 1:
            step += 1
        picked = torch.arange(0, x.numel(), step, device=x.device)
        flat = x.flatten()[picked].float().abs() * norms[picked % x.shape[1]]
        self._scores = flat.sort().values.cpu()
        self._norms = norms.cpu()
        self._u = self._v = None
        if rank > 0:
            factors = truncated_svd(weight, rank, seed)
            self._u = factors.u.to(weight.dtype).cpu()
            self._v = factors.v.to(weight.dtype).cpu()

    def tensors(
        self, plan: LinearPlan, shape: tuple[int, int], device: torch.device
    ) -> LinearTensors:
        """Those of a plan."""
        thresholds = channel_thresholds(self._score(plan.keep), self._norms).to(device)
        rank = plan.rank(shape)
        if rank == 0 or self._u is None or self._v is None:
            return LinearTensors(thresholds)
        u, v = self._u[:, :rank].to(device), self._v[:rank].to(device)
        return LinearTensors(thresholds, u, v)

    def _score(self, keep: float) -> float:
        """The score that leaves a fraction of all scores above it."""
        dropped = len(self._scores) - round(keep * len(self._scores))
        if dropped == 0:
            return KEEP_ALL
        around = self._scores[dropped - 1 : dropped + 1].tolist()
        return midway(around[0], around[-1])
