# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what every linear gets, before any threshold is calibrated."""

from vllm_rsparse.prepare.recipe.files import check_plans
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import Recipe
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.allocators import allocator_of
from vllm_rsparse.prepare.search.scores import score_channels


def plan_linears(run: Run, recipe: Recipe, sparsity: float) -> Planned:
    """Score the channels, and run the recipe's search.

    Args:
        run: the model, its calibration text, and the store of results.
        recipe: plans that it fixes are used unchanged.
        sparsity: of the model, factors counted.

    Raises:
        PrepareError: the recipe does not fit the model or the sparsity.
    """
    allocator = allocator_of(recipe)
    check_plans(recipe, run.linears, sparsity)
    scored = score_channels(run, recipe)
    if recipe.linears is not None:
        return scored.planned(recipe.linears)
    return allocator.allocate(run, scored, sparsity)
