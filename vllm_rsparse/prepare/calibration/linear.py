# SPDX-License-Identifier: Apache-2.0
"""One linear: weight, calibration inputs and plan in, tensors and entry out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_rsparse.artifact.schema import LinearEntry
from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.prepare.calibration.dropped import Dropped, count_dropped
from vllm_rsparse.prepare.calibration.factors import Factors, truncated_svd
from vllm_rsparse.prepare.calibration.planes import plane_thresholds
from vllm_rsparse.prepare.calibration.regress import regressed
from vllm_rsparse.prepare.calibration.thresholds import (
    channel_thresholds,
    column_norms,
    score_threshold,
)
from vllm_rsparse.prepare.recipe.plan import LinearPlan

# The error takes two dense products per token. For all of 16 x 4096 tokens this is
# twice the calibration's own forward; whole windows in random order represent the rest.
ERROR_TOKENS = 8192
# On a CPU the same 8192 tokens took half of the time of ``wina`` (1B, 16 x 512 tokens).
CPU_ERROR_TOKENS = 1024


@dataclass(frozen=True)
class CalibratedLinear:
    """What the artifact holds of one linear.

    Attributes:
        tensors: on the device of the inputs.
        entry: its entry in ``rsparse.json``; None where nothing was measured.
        factors: how the factors were found, or None.
    """

    tensors: LinearTensors
    entry: LinearEntry | None
    factors: Factors | None


@torch.inference_mode()
def calibrate_linear(
    planes: Sequence[Tensor],
    x: Tensor,
    plan: LinearPlan,
    seed: int,
    scale: Tensor | None = None,
    correction: bool = False,
    metric: Tensor | None = None,
    error_tokens: int = ERROR_TOKENS,
) -> CalibratedLinear:
    """Thresholds, factors and their error for one linear.

    Args:
        planes: the weight [N, K] in the checkpoint's dtype, on the device of ``x``; or
            what each of its planes stands for, if it is read in several.
        x: calibration inputs [tokens, K].
        plan: sparsity and rho.
        seed: of the randomised methods.
        scale: float32 [K], the score is |x| times it; None takes the column norms.
        correction: add the mean contribution of the dropped part, a constant.
        metric: [N, N], the cost of an error of the output; with it factors are
            regressed (see ``regress``), without it they are the weight's SVD.
        error_tokens: leading tokens of ``x`` that the relative error is measured on; 0
            leaves the entry out.

    Returns:
        Tensors in the artifact's dtypes, and the entry with the kept fraction (counted
        as at run time) on all of ``x``, and the relative error.
    """
    weight = planes[0] if len(planes) == 1 else sum_of(planes)
    n, k = weight.shape
    scale = column_norms(weight) if scale is None else scale
    if len(planes) == 1:
        thresholds = channel_thresholds(score_threshold(x, scale, plan.keep), scale)
        rows = [thresholds]
    else:
        thresholds = plane_thresholds(planes, x, scale, 1 - plan.sparsity)
        rows = list(thresholds)
    rank = plan.rank((n, k)) if len(planes) == 1 else 0
    dropped = [
        count_dropped(
            x,
            row,
            total=correction,
            outer=rank > 0 and metric is not None,
            leading=error_tokens,
        )
        for row in rows
        if correction or rank > 0 or error_tokens > 0
    ]
    tensors = LinearTensors(thresholds)
    factors = None
    if rank > 0:
        if metric is None:
            factors = truncated_svd(weight, rank, seed)
        else:
            covariance = dropped[0].covariance(centred=correction)
            factors = regressed(weight, covariance, metric, rank, seed)
        u, v = factors.u.to(weight.dtype), factors.v.to(weight.dtype)
        tensors = replace(tensors, u=u, v=v)
    if correction:
        lost = mean_lost(planes, dropped, tensors)
        tensors = replace(tensors, correction=lost)
    entry = None
    if error_tokens > 0:
        first, *later = dropped
        entry = LinearEntry(
            shape=(n, k),
            sparsity=plan.sparsity,
            rho=plan.rho,
            rank=rank,
            kept_fraction=first.kept_fraction,
            relative_error=relative_error(planes, dropped, tensors),
            correction=correction,
            full_fraction=later[0].kept_fraction if later else None,
        )
    return CalibratedLinear(tensors, entry, factors)


def sum_of(planes: Sequence[Tensor]) -> Tensor:
    """The weight [N, K] that planes add up to."""
    return torch.stack(list(planes)).sum(0)


def mean_lost(
    planes: Sequence[Tensor], dropped: Sequence[Dropped], tensors: LinearTensors
) -> Tensor:
    """E[W d - U V d] over the tokens, float32 [N]; d is the dropped part of x.

    Of several planes, W d is a sum over them and d in U V d is what the first drops.
    """
    mean = dropped[0].mean.float()
    lost = planes[0].float() @ mean
    for plane, part in zip(planes[1:], dropped[1:], strict=True):
        lost += plane.float() @ part.mean.float()
    if tensors.u is not None and tensors.v is not None:
        lost -= tensors.u.float() @ (tensors.v.float() @ mean)
    return lost


def relative_error(
    planes: Sequence[Tensor], dropped: Sequence[Dropped], tensors: LinearTensors
) -> float:
    """||y_sparse - y|| / ||y|| with y = W x, without the layer's own bias.

    Over the leading tokens. Only the dropped part d of x differs:
    y_sparse - y = U V d + correction - W d. Of several planes, W d is a sum over them
    and d in U V d is what the first drops.
    """
    dtype = dropped[0].x.dtype
    parts = [plane.to(dtype) for plane in planes]
    w = parts[0] if len(parts) == 1 else sum_of(parts)
    u = None if tensors.u is None else tensors.u.to(dtype)
    v = None if tensors.v is None else tensors.v.to(dtype)
    error, energy = torch.zeros(2, dtype=torch.float64, device=w.device)
    for chunks in zip(*(part.leading() for part in dropped), strict=True):
        x, d = chunks[0]
        difference = d @ parts[0].mT
        for part, (_, later) in zip(parts[1:], chunks[1:], strict=True):
            difference += later @ part.mT
        if u is not None and v is not None:
            difference -= (d @ v.mT) @ u.mT
        if tensors.correction is not None:
            difference -= tensors.correction.to(dtype)
        error += _energy(difference)
        energy += _energy(x @ w.mT)
    return math.sqrt(error / energy) if energy > 0 else 0.0


def _energy(y: Tensor) -> Tensor:
    # float64, because float32's running sum is off by 5e-5 at 10^5 elements.
    return torch.linalg.vector_norm(y, dtype=torch.float64) ** 2
