# SPDX-License-Identifier: Apache-2.0
"""Recipes in JSON files.

A file with ``linears`` fixes what every linear gets, so that what a search found can be
saved, read, edited and used again::

    {"name": "mine", "score": "norm", "allocation": "uniform", "activations": "sparse",
     "correction": "always",
     "linears": {"model.layers.0.mlp.up_proj": {"sparsity": 0.4, "rho": 1.0}, ...}}

``factors``, ``rho`` and ``linears`` may be left out. Files of version 0.1 are read too:
their ``correction`` is true or false, and they have no ``rho``.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import ALWAYS, NEVER, RECIPES, TRY, Recipe

if TYPE_CHECKING:
    from vllm_rsparse.model.linears import Linear

# How far the linears of a file may add up to another sparsity than --sparsity.
BUDGET_TOLERANCE = 0.002


def load_recipe(source: str) -> Recipe:
    """A recipe by name, or from a JSON file.

    Raises:
        PrepareError: neither a known name nor a readable recipe file.
    """
    if source in RECIPES:
        return RECIPES[source]
    where = f"--recipe {source}"
    try:
        raw = json.loads(Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PrepareError(
            f"{where}: neither one of {', '.join(RECIPES)} nor a file"
        ) from None
    except (OSError, ValueError) as error:
        raise PrepareError(f"{where}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise PrepareError(f"{where}: expected a JSON object")
    _check_keys(raw, Recipe, {"factors", "rho", "linears"}, where)
    _upgrade(raw)
    if not _is_share(raw["rho"]) or raw["rho"] == 0:
        raise PrepareError(f"{where}: rho is out of range, got {raw['rho']!r}")
    linears = raw.get("linears")
    if linears is not None:
        if not isinstance(linears, dict):
            raise PrepareError(f"{where}: `linears` must be an object")
        linears = {
            name: _plan(plan, f"{where}: linears[{name!r}]")
            for name, plan in linears.items()
        }
    return Recipe(**{**raw, "linears": linears})


def recipe_json(recipe: Recipe) -> str:
    """Text that ``load_recipe`` reads back."""
    return json.dumps(asdict(recipe), indent=1) + "\n"


def check_plans(recipe: Recipe, linears: Iterable["Linear"], sparsity: float) -> None:
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


def _upgrade(raw: dict[str, Any]) -> None:
    """Version 0.1: a correction of true or false, and rho by the recipe's name."""
    if raw["correction"] is False:
        raw["correction"] = NEVER
    elif raw["correction"] is True:
        searched = raw["allocation"] == "mixed" and raw.get("linears") is None
        raw["correction"] = TRY if searched else ALWAYS
    if "rho" not in raw:
        known = RECIPES.get(raw["name"]) if isinstance(raw["name"], str) else None
        raw["rho"] = 1.0 if known is None else known.rho


def _plan(raw: Any, where: str) -> LinearPlan:
    if not isinstance(raw, dict):
        raise PrepareError(f"{where}: expected an object")
    _check_keys(raw, LinearPlan, set(), where)
    for key, zero_allowed in (("sparsity", True), ("rho", False)):
        if not _is_share(raw[key]) or (raw[key] == 0 and not zero_allowed):
            raise PrepareError(f"{where}: {key} is out of range, got {raw[key]!r}")
    return LinearPlan(float(raw["sparsity"]), float(raw["rho"]))


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= 1


def _check_keys(raw: dict[str, Any], cls: type, optional: set[str], where: str) -> None:
    known = [field.name for field in fields(cls)]
    for key in raw:
        if key not in known:
            raise PrepareError(
                f"{where}: unknown key {key!r}; known are {', '.join(known)}"
            )
    for key in known:
        if key not in raw and key not in optional:
            raise PrepareError(f"{where}: key {key!r} is missing")
