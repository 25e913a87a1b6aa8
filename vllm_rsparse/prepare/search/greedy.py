# SPDX-License-Identifier: Apache-2.0
"""Share each layer's budget by the least added error per byte, without gradients.

In every layer each linear alone is made sparse at some levels, on a few windows, and
the squared error of the layer's output is noted. Errors of several linears are taken to
add up, so the cheapest way to skip bytes is to take, again and again, the step with the
least added error per byte, until the layer has the sparsity asked for. A layer costs
7 x 8 runs on ``SEARCH_WINDOWS`` windows.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration.propagate import (
    sparse_linears,
    stage_input,
    stages,
)
from vllm_rsparse.prepare.calibration.thresholds import (
    channel_thresholds,
    column_norms,
    score_threshold,
)
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.store.journal import Journal

LEVELS = (0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEARCH_WINDOWS = 4


def measure(
    model: StreamedModel,
    linears: Sequence[Linear],
    windows: Tensor,
    first: int,
    scales: Mapping[str, Tensor],
    journal: Journal,
) -> dict[str, list[float]]:
    """Squared error of the layer's output with one linear sparse at each of ``LEVELS``.

    Args:
        model: the streamed base model.
        linears: all linears that take part, layer by layer.
        windows: int64 [samples, tokens]; the first ``SEARCH_WINDOWS`` are used.
        first: leading positions of each window that stay dense.
        scales: float32 [K] by linear; column norms where there is none.
        journal: keeps the errors of every layer.

    Returns:
        Errors by name of linear.
    """
    result: dict[str, list[float]] = {}
    with tqdm(total=len(linears), desc="greedy", unit="linear") as progress:
        hidden = model.embed(windows[:SEARCH_WINDOWS])
        for index, group in groupby(linears, lambda linear: linear.layer):
            members = list(group)
            errors: dict[str, list[float]] = {}
            with model.layer(index) as layer:
                exact = hidden.clone()
                model.run_layer(index, exact)
                known = journal.get(str(index))
                if known is not None:
                    errors = known
                    progress.update(len(members))
                for stage in stages(members) if known is None else ():
                    x = stage_input(model, stage[0], layer, hidden, first)
                    for linear in stage:
                        scale = scales.get(linear.name)
                        errors[linear.name] = _errors(
                            model, linear, layer, hidden, exact, x, scale, first
                        )
                        progress.update()
            if known is None:
                journal.note({str(index): errors})
            result |= errors
            hidden = exact
    return result


def share_in_layers(
    linears: Sequence[Linear], errors: Mapping[str, Sequence[float]], sparsity: float
) -> dict[str, LinearPlan]:
    """Plans from ``measure``: the same sparsity in every layer, no factors."""
    plans: dict[str, LinearPlan] = {}
    for _, group in groupby(linears, lambda linear: linear.layer):
        sizes = {one.name: one.shape[0] * one.shape[1] for one in group}
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
        taken = min(width * sizes[name], left)
        shares[name] += taken / sizes[name]
        left -= taken
    if left > 0:  # asked for more than the highest level: the rest evenly
        rest = left / sum(sizes.values())
        shares = {name: share + rest for name, share in shares.items()}
    return shares


def _errors(
    model: StreamedModel,
    linear: Linear,
    layer: nn.Module,
    hidden: Tensor,
    exact: Tensor,
    x: Tensor,
    scale: Tensor | None,
    first: int,
) -> list[float]:
    weight = layer.get_submodule(linear.kind).weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{linear.name} has no weight")
    scale = column_norms(weight) if scale is None else scale.to(x.device)
    errors = [0.0]
    for level in LEVELS[1:]:
        thresholds = channel_thresholds(score_threshold(x, scale, 1 - level), scale)
        with sparse_linears(layer) as sparse:
            sparse.install(linear.kind, {"thresholds": thresholds}, first)
            out = hidden.clone()
            model.run_layer(linear.layer, out)
        difference = (out - exact)[:, first:]
        errors.append(
            torch.linalg.vector_norm(difference, dtype=torch.float64).item() ** 2
        )
    return errors


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
