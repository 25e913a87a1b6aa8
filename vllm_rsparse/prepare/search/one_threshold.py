# SPDX-License-Identifier: Apache-2.0
"""One threshold on the loss per byte for the whole model, from its gradients."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_rsparse.formats.plane_bits import plane_bits
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import Allocation, LinearPlan
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.channels import ChannelAllocator
from vllm_rsparse.prepare.search.scores import Scored
from vllm_rsparse.prepare.search.sensitivity import BINS, Sensitivity

# Bins from the first plane's threshold to the second's, 128 an octave: ten times the
# score, as four-bit rounding leaves about a tenth of a weight (``calibration.planes``).
PLANE_BINS = 425


class OneThreshold(ChannelAllocator):
    """Drops the channels whose squared score per byte is below one constant."""

    needs_gradients = True
    takes_planes = True

    def allocation(self, run: Run, scored: Scored) -> Allocation:
        """Uses the counts of the sensitivity pass; nothing is run."""
        in_planes = run.model.plane_count > 1
        shares = shares_by_bin(run.linears, scored.gradients.linears, in_planes)
        return partial(at_one_threshold, run.linears, shares)


def shares_by_bin(
    linears: Sequence[Linear],
    sensitivity_of: Mapping[str, Sensitivity],
    in_planes: bool = False,
) -> Tensor:
    """What is not read of each linear when the threshold passes a bin of scores.

    A weight in two planes has a second threshold, a multiple of the first, below which
    its second plane is not read.

    Returns:
        float64 [linears, BINS], shares of the linear's bits.
    """
    counts = [sensitivity_of[linear.name].counts for linear in linears]
    shares = [count.double() / count.sum() for count in counts]
    if in_planes:
        shares = [_unread(f, x.shape[1]) for f, x in zip(shares, linears, strict=True)]
    return torch.stack(shares)


def at_one_threshold(
    linears: Sequence[Linear], shares: Tensor, sparsity: float
) -> dict[str, LinearPlan]:
    """Plans with one threshold on score / sqrt(N) for the whole model; no factors.

    The fraction of the bin that the threshold falls into is chosen so that the plans
    add up to ``sparsity`` exactly.

    Args:
        linears: all linears that take part.
        shares: of ``shares_by_bin``.
        sparsity: of the model.
    """
    elements = torch.tensor([float(n * k) for n, k in (x.shape for x in linears)])
    weights = elements.double() / elements.sum()
    dropped = (weights @ shares).cumsum(0)
    edge = min(int(torch.searchsorted(dropped, sparsity)), BINS - 1)
    inside = float(weights @ shares[:, edge])
    below = float(dropped[edge]) - inside
    part = min(max((sparsity - below) / inside, 0.0), 1.0) if inside > 0 else 0.0
    dropped_of = shares[:, :edge].sum(1) + part * shares[:, edge]
    return {
        linear.name: LinearPlan(min(max(share, 0.0), 1.0), 1.0)
        for linear, share in zip(linears, dropped_of.tolist(), strict=True)
    }


def _unread(fractions: Tensor, k: int) -> Tensor:
    """Share of the bits that is not read once the first threshold passes each bin.

    Args:
        fractions: float64 [BINS], channels by bin of their score.
        k: input channels of the linear.
    """
    first, second = plane_bits(k)
    later = torch.zeros_like(fractions)
    later[: BINS - PLANE_BINS] = fractions[PLANE_BINS:]
    later[0] += fractions[:PLANE_BINS].sum()
    return (first * fractions + second * later) / (first + second)
