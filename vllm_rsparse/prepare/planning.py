# SPDX-License-Identifier: Apache-2.0
"""From a recipe to what every linear gets, before any threshold is calibrated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import PrepareError
from .linears import Linear
from .options import PrepareOptions
from .recipe import LinearPlan, uniform
from .recipes import DEFAULT_RHO, Recipe, check_plans
from .search_greedy import greedy
from .search_sensitivity import sensitivities, share_out
from .streaming import StreamedModel

# Leading part of each calibration window that runs dense and is not counted, where the
# sparse model is calibrated on its own activations: a prompt before decoded tokens.
DENSE_FRACTION = 0.1


@dataclass(frozen=True)
class Planned:
    """What calibration needs to know.

    Attributes:
        recipe: with the plan of every linear.
        plans: the same plans.
        rho: share of exact channels where the recipe itself does not fix it.
        scales: float32 [K] by linear, the score is |x| times it; a linear that is not
            in it has the norms of its columns.
        first: leading positions of a window that stay dense; 0 on dense activations.
    """

    recipe: Recipe
    plans: dict[str, LinearPlan]
    rho: float
    scales: dict[str, Tensor]
    first: int


def plan_linears(
    recipe: Recipe,
    options: PrepareOptions,
    model: StreamedModel,
    linears: Sequence[Linear],
    windows: Tensor,
) -> Planned:
    """Run whatever search the recipe asks for.

    Raises:
        PrepareError: the recipe does not fit the model or the options.
    """
    rho = options.rho
    if rho is None:
        rho = DEFAULT_RHO.get(recipe.name, 1.0)
    if rho < 1.0 and recipe.allocation != "uniform":
        raise PrepareError(
            f"--rho {rho}: recipe {recipe.name!r} shares out exact channels only; leave"
            " --rho out, or use --recipe uniform"
        )
    check_plans(recipe, linears, options.sparsity)
    first = 0
    if recipe.activations == "sparse":
        first = int(DENSE_FRACTION * windows.shape[1])
    scales: dict[str, Tensor] = {}
    plans = recipe.linears
    if recipe.score == "magnitude":
        scales = {one.name: torch.ones(one.shape[1]) for one in linears}
    elif recipe.score == "sensitivity":
        found = sensitivities(model, linears, windows, first, options.seed)
        scales = {name: one.scale for name, one in found.items()}
        if plans is None and recipe.allocation == "sensitivity":
            plans = share_out(linears, found, options.sparsity)
    if plans is None and recipe.allocation == "greedy":
        plans = greedy(model, linears, windows, first, scales, options.sparsity)
    if plans is None:
        plans = uniform(linears, options.sparsity, rho)
    return Planned(recipe.with_plans(plans), plans, rho, scales, first)
