# SPDX-License-Identifier: Apache-2.0
"""Every linear the same."""

from vllm_rsparse.prepare.recipe.plan import uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.allocator import Allocator
from vllm_rsparse.prepare.search.scores import Scored


class Uniform(Allocator):
    """The model's sparsity, and the recipe's rho, for every linear."""

    takes_rho = True
    takes_planes = True

    def allocate(self, run: Run, scored: Scored, sparsity: float) -> Planned:
        """Runs nothing."""
        return scored.planned(uniform(run.linears, sparsity, scored.recipe.rho))
