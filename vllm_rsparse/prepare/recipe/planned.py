# SPDX-License-Identifier: Apache-2.0
"""What calibration needs to know."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import ALWAYS, Recipe


@dataclass(frozen=True, eq=False)
class Planned:
    """A recipe with the results of its searches.

    Attributes:
        recipe: with the plan of every linear, and its correction settled.
        scales: float32 [K] by linear, the score is |x| times it; a linear that is not
            in it has the norms of its columns.
        metrics: [N, N] by linear, for regressed factors; others have the SVD.
        trials: KL(dense || sparse), nats, of each candidate where some were tried, in
            that order.
    """

    recipe: Recipe
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    trials: Mapping[str, float] = field(default_factory=dict)

    @property
    def plans(self) -> Mapping[str, LinearPlan]:
        """The plan of every linear by name."""
        if self.recipe.linears is None:
            raise ValueError(f"recipe {self.recipe.name!r} has no plans yet")
        return self.recipe.linears

    @property
    def corrected(self) -> bool:
        """Whether every linear has a constant correction."""
        return self.recipe.correction == ALWAYS
