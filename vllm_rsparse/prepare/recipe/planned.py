# SPDX-License-Identifier: Apache-2.0
"""What calibration needs to know."""

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import Recipe


@dataclass(frozen=True)
class Planned:
    """A recipe with all that its searches have found.

    Attributes:
        recipe: with the plan of every linear.
        plans: the same plans.
        rho: share of exact channels where the recipe itself does not fix it.
        scales: float32 [K] by linear, the score is |x| times it; a linear that is not
            in it has the norms of its columns.
        metrics: [N, N] by linear, for regressed factors; others have the SVD.
        first: leading positions of a window that stay dense; 0 on dense activations.
        trials: KL(dense || sparse), nats, of each candidate where some were tried, in
            that order.
    """

    recipe: Recipe
    plans: dict[str, LinearPlan]
    rho: float
    scales: dict[str, Tensor]
    metrics: dict[str, Tensor]
    first: int
    trials: dict[str, float] = field(default_factory=dict)

    def with_plans(self, plans: dict[str, LinearPlan]) -> Self:
        """The same with other plans."""
        return replace(self, plans=plans, recipe=self.recipe.with_plans(plans))

    def with_correction(self, correction: bool) -> Self:
        """The same with or without the constant correction."""
        return replace(self, recipe=replace(self.recipe, correction=correction))
