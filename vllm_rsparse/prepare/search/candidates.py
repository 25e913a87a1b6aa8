# SPDX-License-Identifier: Apache-2.0
"""Perplexity of many plans at once, streamed: each layer is loaded once for all.

Every linear's thresholds at any kept fraction, and its factors up to the largest rank
asked for, are found once, on dense activations. A candidate is then one sparse forward
pass, with nothing calibrated.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.factors import truncated_svd
from vllm_rsparse.prepare.calibration.loss import text_losses
from vllm_rsparse.prepare.calibration.observers import LayerInputs
from vllm_rsparse.prepare.calibration.propagate import sparse_linears
from vllm_rsparse.prepare.calibration.thresholds import (
    KEEP_ALL,
    channel_thresholds,
    column_norms,
)
from vllm_rsparse.prepare.recipe.plan import LinearPlan

# Scores that a linear's quantiles are taken from; the kept fraction is then off by
# 0.0014 (one standard deviation), and 224 linears take 117 MB.
SCORES = 1 << 17
# Hidden states in flight, of all candidates of one pass together.
STATE_BYTES = 4 << 30


class Candidates:
    """Evaluates plans on fixed windows.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        windows: int64 [samples, tokens].
        first: leading positions of each window that stay dense and are not counted.
        widest: the plan with the largest rank that a candidate may have.
        seed: of the randomised SVD.
    """

    def __init__(
        self,
        model: StreamedModel,
        linears: Sequence[Linear],
        windows: Tensor,
        first: int,
        widest: LinearPlan,
        seed: int,
    ) -> None:
        self._model = model
        self._layers = [
            (index, list(group)) for index, group in groupby(linears, lambda x: x.layer)
        ]
        self._windows = windows
        self._first = first
        self._tables: dict[str, _Table] = {}
        hidden = model.embed(windows)
        self._state_bytes = hidden.nbytes
        with tqdm(total=len(linears), desc="quantiles", unit="linear") as progress:
            for index, members in self._layers:
                inputs = LayerInputs(members, windows.numel())
                with model.layer(index) as layer, inputs.observe(layer):
                    model.run_layer(index, hidden)
                for linear in members:
                    weight = model.checkpoint.read([linear.weight])[linear.weight]
                    self._tables[linear.name] = _Table(
                        weight.to(model.device),
                        inputs[linear.kind],
                        widest.rank(linear.shape),
                        seed,
                    )
                    progress.update()

    @property
    def at_once(self) -> int:
        """How many candidates one call of ``losses`` should take at most."""
        return max(1, STATE_BYTES // self._state_bytes)

    @torch.no_grad()
    def losses(self, candidates: Sequence[Mapping[str, LinearPlan]]) -> list[float]:
        """Mean negative log likelihood of each, over the sparse positions (nats)."""
        model, first = self._model, self._first
        hidden = model.embed(self._windows)
        states = [hidden.clone() for _ in candidates]
        for index, members in self._layers:
            with model.layer(index) as layer:
                for plans, state in zip(candidates, states, strict=True):
                    with sparse_linears(layer) as sparse:
                        for linear in members:
                            tensors = self._tables[linear.name].tensors(
                                plans[linear.name], linear.shape, model.device
                            )
                            sparse.install(linear.kind, tensors, first)
                        model.run_layer(index, state)
        return text_losses(model, states, self._windows, first)


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
    ) -> dict[str, Tensor]:
        """Named as in the artifact."""
        dropped = len(self._scores) - round(plan.keep * len(self._scores))
        # Midway between two scores, as `score_threshold` does.
        around = self._scores[max(0, dropped - 1) : dropped + 1]
        score = KEEP_ALL if dropped == 0 else around.mean().item()
        result = {"thresholds": channel_thresholds(score, self._norms)}
        rank = plan.rank(shape)
        if rank > 0 and self._u is not None and self._v is not None:
            result["u"], result["v"] = self._u[:, :rank], self._v[:rank]
        return {name: tensor.to(device) for name, tensor in result.items()}
