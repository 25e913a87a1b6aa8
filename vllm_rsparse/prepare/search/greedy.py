# SPDX-License-Identifier: Apache-2.0
"""Allocate each layer's budget by the least added error per byte, without gradients.

In every layer, each linear alone is made sparse at several levels, on a few windows,
and the squared error of the layer's output is recorded. Errors of several linears are
assumed to add up, so the cheapest way to skip bytes is to repeatedly take the step with
the least added error per byte, until the layer has the target sparsity. A layer costs
7 x 8 runs on ``search_windows``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.calibration.propagate import (
    sparse_linears,
    stage_input,
    stages,
)
from vllm_rsparse.prepare.calibration.replay import replaying
from vllm_rsparse.prepare.calibration.thresholds import (
    channel_thresholds,
    column_norms,
    score_thresholds,
)
from vllm_rsparse.prepare.recipe.plan import Allocation, LinearPlan
from vllm_rsparse.prepare.run import LayerLinears, Run
from vllm_rsparse.prepare.search.channels import ChannelAllocator
from vllm_rsparse.prepare.search.scores import Scored
from vllm_rsparse.prepare.store.run_store import Key

LEVELS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Tokens that errors are measured on, in two to four windows.
SEARCH_TOKENS = 2048
# On a CPU, where they are a third of the time of ``best`` (1B, 16 x 512 tokens). With
# half as many, KL is 0.308 instead of 0.309 (bundled model, 50%, 16 x 512 tokens).
CPU_SEARCH_TOKENS = 1024


class Greedy(ChannelAllocator):
    """The same sparsity in every layer, allocated where the output suffers least."""

    def allocation(self, run: Run, scored: Scored) -> Allocation:
        """Measures the errors of every linear alone."""
        return partial(in_layers, run.linears, measure(run, scored.scales))


def measure(run: Run, scales: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Squared error of the layer's output with one linear sparse at each of ``LEVELS``.

    The ``search_windows`` are used; the errors of a layer are kept in the run's store.

    Args:
        run: the model and its calibration text.
        scales: float32 [K] by linear; column norms for linears that are not in it.

    Returns:
        Errors by name of linear.
    """
    model, store = run.model, run.store
    known = [store.recall(Key("greedy", i)) for i in range(len(run.layers))]
    if None not in known:  # of an interrupted run, or for another sparsity
        return {name: curve for errors in known for name, curve in errors.items()}
    result: dict[str, list[float]] = {}
    with tqdm(total=len(run.linears), desc="greedy", unit="linear") as progress:
        hidden = model.embed(search_windows(run.windows, model.device))
        for position, layer in enumerate(run.layers):
            key = Key("greedy", position)
            with model.layer(layer.index) as module:
                exact = hidden.clone()
                model.run_layer(layer.index, exact)
                errors = store.recall(key)
                if errors is None:
                    probe = _Probe(run, module, hidden, exact)
                    errors = probe.errors(layer, scales, progress)
                    store.record({key: errors})
                else:
                    progress.update(len(layer))
            result |= errors
            hidden = exact
    return result


def search_windows(windows: Tensor, device: torch.device) -> Tensor:
    """The first windows [samples, tokens]: two to four, of ``SEARCH_TOKENS`` if so."""
    tokens = CPU_SEARCH_TOKENS if device.type == "cpu" else SEARCH_TOKENS
    return windows[: min(max(tokens // windows.shape[1], 2), 4)]


def in_layers(
    linears: Sequence[Linear], errors: Mapping[str, Sequence[float]], sparsity: float
) -> dict[str, LinearPlan]:
    """Plans from ``measure``: the same sparsity in every layer, no factors."""
    plans: dict[str, LinearPlan] = {}
    for _, group in groupby(linears, lambda linear: linear.layer):
        sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in group}
        shares = allocate({name: errors[name] for name in sizes}, sizes, sparsity)
        plans |= {name: LinearPlan(share, 1.0) for name, share in shares.items()}
    return plans


def allocate(
    errors: Mapping[str, Sequence[float]], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Sparsity of each linear, from its error at each of ``LEVELS``.

    The lower convex hull of each curve is used, so that steps come in order of their
    price; the last step is taken in part, and the budget is met exactly up to the
    highest level.
    """
    steps: list[tuple[float, float, str]] = []
    for name, curve in errors.items():
        hull = _hull(list(zip(LEVELS, curve, strict=True)))
        for (a, low), (b, high) in pairwise(hull):
            steps.append(((high - low) / ((b - a) * sizes[name]), b - a, name))
    shares = dict.fromkeys(errors, 0.0)
    left = sparsity * sum(sizes.values())
    for _, width, name in sorted(steps):
        skipped = min(width * sizes[name], left)
        shares[name] += skipped / sizes[name]
        left -= skipped
    if left > 0:  # more than the highest level: the rest evenly
        rest = left / sum(sizes.values())
        shares = {name: share + rest for name, share in shares.items()}
    return shares


@dataclass(frozen=True)
class _Probe:
    """Makes one linear of a layer sparse at a time.

    Attributes:
        run: the model; its materialised layer is ``module``.
        module: dense except for the linear that is probed.
        hidden: [samples, tokens, hidden], entering the layer.
        exact: the same, leaving the dense layer.
    """

    run: Run
    module: nn.Module
    hidden: Tensor
    exact: Tensor

    def errors(
        self, layer: LayerLinears, scales: Mapping[str, Tensor], progress: tqdm
    ) -> dict[str, list[float]]:
        """Errors of every linear at each of ``LEVELS``."""
        model, prefix = self.run.model, self.run.dense_prefix
        errors = {}
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        with replaying(model, self.module, layer, tokens) as replay:
            for stage in stages(layer):
                x = stage_input(model, stage[0], self.module, self.hidden, prefix)
                for linear in stage:
                    replay.settle(linear)
                for linear in stage:
                    scale = scales.get(linear.name)
                    errors[linear.name] = self._errors(linear, x, scale)
                    progress.update()
        return errors

    def _errors(self, linear: Linear, x: Tensor, scale: Tensor | None) -> list[float]:
        weight = self.module.get_submodule(linear.kind).weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"{linear.name} has no weight")
        scale = column_norms(weight) if scale is None else scale.to(x.device)
        model, prefix = self.run.model, self.run.dense_prefix
        scores = score_thresholds(x, scale, [1 - level for level in LEVELS[1:]])
        norms = []
        for score in scores:
            thresholds = channel_thresholds(score, scale)
            with sparse_linears(self.module) as sparse:
                sparse.install(linear.kind, LinearTensors(thresholds), prefix)
                out = self.hidden.clone()
                model.run_layer(linear.layer, out)
            difference = model.visible(out - self.exact)[:, prefix:]
            norms.append(torch.linalg.vector_norm(difference, dtype=torch.float64))
        # In one transfer: each waits for the device.
        return [0.0, *(norm**2 for norm in torch.stack(norms).tolist())]


def _hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lower convex hull of points in order of their first coordinate."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
