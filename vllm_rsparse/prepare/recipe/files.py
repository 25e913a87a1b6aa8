# SPDX-License-Identifier: Apache-2.0
"""Recipes in JSON files.

A file with ``linears`` fixes what every linear gets, so that what a search found can be
saved, read, edited and used again::

    {"name": "mine", "score": "norm", "allocation": "uniform", "activations": "sparse",
     "correction": "always",
     "linears": {"model.layers.0.mlp.up_proj": {"sparsity": 0.4, "rho": 1.0}, ...}}

``factors``, ``rho`` and ``linears`` are optional. Files of version 0.1 are read too:
their ``correction`` is true or false, and they have no ``rho``.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from pydantic import StrictBool, StrictFloat, StrictStr
from pydantic.dataclasses import dataclass

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import (
    ACTIVATIONS,
    ALWAYS,
    CORRECTIONS,
    FACTORS,
    NEVER,
    RECIPES,
    SCORES,
    TRY,
    Recipe,
)
from vllm_rsparse.validation import CONFIG, must, one_of, read_json, validate

_REMEDY = "; write one with --save-recipe, or see docs/recipes.md for the keys"

# How far the linears of a file may add up to another sparsity than --sparsity.
BUDGET_TOLERANCE = 0.002


@dataclass(frozen=True, config=CONFIG)
class _PlanFile:
    sparsity: StrictFloat = must("lie in [0, 1]", ge=0, le=1)
    rho: StrictFloat = must("lie in (0, 1]", gt=0, le=1)


@dataclass(frozen=True, config=CONFIG)
class _RecipeFile:
    name: StrictStr = must("be a string")
    score: StrictStr = one_of(*SCORES)
    # Which allocations there are is known to the search, which is above.
    allocation: StrictStr = must("be the name of an allocation")
    activations: StrictStr = one_of(*ACTIVATIONS)
    correction: StrictBool | StrictStr = must(f"be one of {', '.join(CORRECTIONS)}")
    factors: StrictStr = one_of(*FACTORS, default="svd")
    rho: StrictFloat | None = must("lie in (0, 1]", gt=0, le=1, default=None)
    linears: dict[str, _PlanFile] | None = must("be an object", default=None)


def load_recipe(source: str) -> Recipe:
    """A recipe by name, or from a JSON file.

    Raises:
        PrepareError: neither a known name nor a readable recipe file.
    """
    if source in RECIPES:
        return RECIPES[source]
    where = f"--recipe {source}"
    file = Path(source)
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "there is no such file"
        raise PrepareError(
            f"{where}: {found}; give a recipe's name ({', '.join(RECIPES)}) or a file"
            " that --save-recipe wrote"
        )
    raw = read_json(file, PrepareError, _REMEDY, where)
    return _recipe(validate(_RecipeFile, raw, where, PrepareError, _REMEDY))


def recipe_json(recipe: Recipe) -> str:
    """Text that ``load_recipe`` reads back."""
    return json.dumps(asdict(recipe), indent=1) + "\n"


def check_plans(recipe: Recipe, linears: Iterable[Linear], sparsity: float) -> None:
    """Check that a file's plans match the model and add up to the target sparsity.

    Raises:
        PrepareError: a linear is missing or unknown, or the budget differs.
    """
    if recipe.linears is None:
        return
    shapes = {linear.name: linear.shape for linear in linears}
    for name in shapes.keys() ^ recipe.linears.keys():
        state = "lacks" if name in shapes else "lists"
        raise PrepareError(
            f"recipe {recipe.name!r} {state} {name}, so it is for another model"
        )
    dense = sum(n * k for n, k in shapes.values())
    skipped = sum(
        plan.sparsity * shapes[name][0] * shapes[name][1]
        for name, plan in recipe.linears.items()
    )
    if abs(skipped / dense - sparsity) > BUDGET_TOLERANCE:
        raise PrepareError(
            f"recipe {recipe.name!r} adds up to a sparsity of {skipped / dense:.4f},"
            f" but --sparsity is {sparsity}; change one of them"
        )


def _recipe(file: _RecipeFile) -> Recipe:
    """The recipe of a file; of version 0.1, correction and rho are worked out."""
    correction, rho, linears = file.correction, file.rho, None
    if correction is False:
        correction = NEVER
    elif correction is True:
        searched = file.allocation == "mixed" and file.linears is None
        correction = TRY if searched else ALWAYS
    if rho is None:
        known = RECIPES.get(file.name)
        rho = 1.0 if known is None else known.rho
    if file.linears is not None:
        linears = {
            name: LinearPlan(plan.sparsity, plan.rho)
            for name, plan in file.linears.items()
        }
    return Recipe(
        name=file.name,
        score=file.score,
        allocation=file.allocation,
        activations=file.activations,
        correction=str(correction),
        factors=file.factors,
        rho=rho,
        linears=linears,
    )
