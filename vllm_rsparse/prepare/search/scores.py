# SPDX-License-Identifier: Apache-2.0
"""The factors that rank the channels of every linear, by the recipe's score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import Recipe
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.sensitivity import SensitivityPass, sensitivities


@dataclass(frozen=True, eq=False)
class Scored:
    """A recipe with its scores, before sparsity is allocated.

    Attributes:
        recipe: the recipe, with ``--rho`` if it was given.
        scales: float32 [K] by linear, the score is |x| times it; a linear that is not
            in it has the norms of its columns.
        metrics: [N, N] by linear, for regressed factors; others have the SVD.
        sensitivity: for the score "sensitivity", else None.
    """

    recipe: Recipe
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    sensitivity: SensitivityPass | None = None

    @property
    def gradients(self) -> SensitivityPass:
        """``sensitivity``, for allocators that need it (see ``allocator_of``)."""
        if self.sensitivity is None:
            raise RuntimeError(f"recipe {self.recipe.name!r} has no gradients")
        return self.sensitivity

    def planned(
        self, plans: Mapping[str, LinearPlan], correction: str | None = None
    ) -> Planned:
        """The recipe with the plan of every linear.

        Args:
            plans: by linear.
            correction: "always" or "never"; None leaves the recipe's.
        """
        correction = correction or self.recipe.correction
        recipe = replace(self.recipe, linears=dict(plans), correction=correction)
        return Planned(recipe, self.scales, self.metrics)


def score_channels(run: Run, recipe: Recipe) -> Scored:
    """Find the factors of |x| for the recipe's score."""
    return _SCORES[recipe.score](run, recipe)


def _magnitude(run: Run, recipe: Recipe) -> Scored:
    scales = {linear.name: torch.ones(linear.shape[1]) for linear in run.linears}
    return Scored(recipe, scales)


def _norm(run: Run, recipe: Recipe) -> Scored:
    return Scored(recipe)


def _sensitivity(run: Run, recipe: Recipe) -> Scored:
    gradients = sensitivities(run)
    metrics = {}
    # What the planes leave out is too little for factors.
    if recipe.factors == "regressed" and run.model.plane_count == 1:
        metrics = {
            name: sensitivity.metric
            for name, sensitivity in gradients.linears.items()
            if sensitivity.metric is not None
        }
    scales = {
        name: sensitivity.scale for name, sensitivity in gradients.linears.items()
    }
    return Scored(recipe, scales, metrics, gradients)


# One function per entry of `recipes.SCORES`.
_SCORES: dict[str, Callable[[Run, Recipe], Scored]] = {
    "magnitude": _magnitude,
    "norm": _norm,
    "sensitivity": _sensitivity,
}
