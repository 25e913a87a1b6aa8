# SPDX-License-Identifier: Apache-2.0
"""One threshold on the loss per byte for the whole model, from its gradients."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import Allocation, LinearPlan
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.channels import ChannelAllocator
from vllm_rsparse.prepare.search.scores import Scored
from vllm_rsparse.prepare.search.sensitivity import BINS, Sensitivity


class OneThreshold(ChannelAllocator):
    """Drops the channels whose squared score per byte is below one constant."""

    needs_gradients = True

    def allocation(self, run: Run, scored: Scored) -> Allocation:
        """Uses the counts of the sensitivity pass; nothing is run."""
        return partial(at_one_threshold, run.linears, scored.gradients.linears)


def at_one_threshold(
    linears: Sequence[Linear],
    sensitivity_of: Mapping[str, Sensitivity],
    sparsity: float,
) -> dict[str, LinearPlan]:
    """Plans with one threshold on score / sqrt(N) for the whole model; no factors.

    The fraction of the bin that the threshold falls into is chosen so that the plans
    add up to ``sparsity`` exactly.
    """
    counts = [sensitivity_of[linear.name].counts for linear in linears]
    fractions = torch.stack([count.double() / count.sum() for count in counts])
    elements = torch.tensor([float(n * k) for n, k in (x.shape for x in linears)])
    weights = elements.double() / elements.sum()
    dropped = (weights @ fractions).cumsum(0)
    edge = min(int(torch.searchsorted(dropped, sparsity)), BINS - 1)
    inside = float(weights @ fractions[:, edge])
    below = float(dropped[edge]) - inside
    part = min(max((sparsity - below) / inside, 0.0), 1.0) if inside > 0 else 0.0
    shares = fractions[:, :edge].sum(1) + part * fractions[:, edge]
    return {
        linear.name: LinearPlan(min(max(share, 0.0), 1.0), 1.0)
        for linear, share in zip(linears, shares.tolist(), strict=True)
    }
