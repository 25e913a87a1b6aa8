# SPDX-License-Identifier: Apache-2.0
"""The strategies that a recipe's ``allocation`` can name, with their options."""

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.recipe.recipes import TRY, Recipe
from vllm_rsparse.prepare.search.allocator import Allocator
from vllm_rsparse.prepare.search.evolution import Evolution
from vllm_rsparse.prepare.search.greedy import Greedy
from vllm_rsparse.prepare.search.one_threshold import OneThreshold
from vllm_rsparse.prepare.search.trials import Mixed
from vllm_rsparse.prepare.search.uniform import Uniform

ALLOCATORS: dict[str, Allocator] = {
    "uniform": Uniform(),
    "greedy": Greedy(),
    "sensitivity": OneThreshold(),
    "mixed": Mixed(),
    "evolutionary": Evolution(joint=False),
    "evolutionary-joint": Evolution(joint=True),
}


def takes_planes(recipe: Recipe) -> bool:
    """Whether a recipe allocates bits of weights that are read in planes."""
    known = ALLOCATORS.get(recipe.allocation)
    return known is not None and known.takes_planes and recipe.rho == 1.0


def allocator_of(recipe: Recipe) -> Allocator:
    """The strategy of a recipe.

    Raises:
        PrepareError: the name is unknown, or the strategy is not compatible with the
            recipe's other choices.
    """
    name, allocation = recipe.name, recipe.allocation
    allocator = ALLOCATORS.get(allocation)
    if allocator is None:
        raise PrepareError(
            f"recipe {name!r}: allocation must be one of {', '.join(ALLOCATORS)},"
            f" got {allocation!r}"
        )
    if allocator.needs_gradients and recipe.score != "sensitivity":
        raise PrepareError(
            f"recipe {name!r}: allocation {allocation!r} uses the loss's gradients, so"
            f" it needs score 'sensitivity', got {recipe.score!r}"
        )
    if recipe.rho < 1.0 and not allocator.takes_rho:
        raise PrepareError(
            f"--rho {recipe.rho}: recipe {name!r} chooses the factors itself, if it"
            " uses any; leave --rho out, or use --recipe uniform"
        )
    if recipe.correction == TRY and not allocator.tries_correction:
        trying = [key for key, other in ALLOCATORS.items() if other.tries_correction]
        raise PrepareError(
            f"recipe {name!r}: correction {TRY!r} needs an allocation that tries"
            f" candidates ({', '.join(trying)}), got {allocation!r}; choose 'never' or"
            " 'always'"
        )
    return allocator
