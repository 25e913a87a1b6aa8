# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what every linear gets, before any threshold is calibrated."""

from functools import cached_property

from vllm_rsparse.prepare.recipe.files import check_plans
from vllm_rsparse.prepare.recipe.planned import Choice, Planned
from vllm_rsparse.prepare.recipe.recipes import Recipe
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.allocators import allocator_of
from vllm_rsparse.prepare.search.scores import Scored, score_channels


class Planner:
    """Plans of one model at any sparsity; the channels are scored once.

    Args:
        run: the model, its calibration text, and the store of results.
        recipe: plans that it fixes are used unchanged.

    Raises:
        PrepareError: the recipe's choices are not compatible.
    """

    def __init__(self, run: Run, recipe: Recipe) -> None:
        self._run = run
        self._recipe = recipe
        self._allocator = allocator_of(recipe)

    @cached_property
    def _scored(self) -> Scored:
        return score_channels(self._run, self._recipe)

    def plan(self, sparsity: float, choice: Choice | None = None) -> Planned:
        """Run the recipe's search.

        Args:
            sparsity: of the model, factors counted.
            choice: that trials led to at another sparsity, to be repeated at this one;
                None: there are trials, where the recipe has any.

        Raises:
            PrepareError: the recipe does not fit the model or the sparsity.
        """
        check_plans(self._recipe, self._run.linears, sparsity)
        if self._recipe.linears is not None:
            return self._scored.planned(self._recipe.linears)
        run = self._run.at(sparsity)
        if choice is not None:
            return self._allocator.repeat(run, self._scored, sparsity, choice)
        return self._allocator.allocate(run, self._scored, sparsity)
