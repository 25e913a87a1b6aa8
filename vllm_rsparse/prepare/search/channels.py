# SPDX-License-Identifier: Apache-2.0
"""Strategies that allocate channels; factors are paid for with channels."""

from abc import abstractmethod

from vllm_rsparse.prepare.recipe.plan import Allocation
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import ALWAYS
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.allocator import Allocator
from vllm_rsparse.prepare.search.factors import find_ranks, with_factors
from vllm_rsparse.prepare.search.scores import Scored


class ChannelAllocator(Allocator):
    """Allocates channels at any sparsity of the model."""

    @abstractmethod
    def allocation(self, run: Run, scored: Scored) -> Allocation:
        """Run what the strategy needs; the returned allocation runs nothing."""

    def allocate(self, run: Run, scored: Scored, sparsity: float) -> Planned:
        """Channels alone, or with factors if the recipe regresses them."""
        allocation = self.allocation(run, scored)
        plans = allocation(sparsity)
        if scored.metrics:
            corrected = scored.recipe.correction == ALWAYS
            ranks = find_ranks(run, scored, plans, [corrected])[corrected]
            plans = with_factors(run.linears, ranks, allocation, sparsity)
        return scored.planned(plans)
