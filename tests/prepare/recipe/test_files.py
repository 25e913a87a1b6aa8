# SPDX-License-Identifier: Apache-2.0
"""Recipes in JSON files: written, read, and refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.files import check_plans, load_recipe, recipe_json
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import RECIPES, Recipe


def test_recipes_survive_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for recipe in RECIPES.values():
        plans = {"model.layers.0.mlp.up_proj": LinearPlan(0.4, 0.9)}
        fixed = replace(recipe, correction="always", linears=plans)
        for original in (recipe, fixed):
            path.write_text(recipe_json(original))
            assert load_recipe(str(path)) == original


@pytest.mark.parametrize(
    ("change", "correction", "rho"),
    [
        ({"correction": True}, "try", 1.0),
        ({"correction": False}, "never", 1.0),
        # What a search has settled, and what has no search.
        ({"correction": True, "linears": {}}, "always", 1.0),
        ({"correction": True, "allocation": "greedy"}, "always", 1.0),
        ({"correction": False, "name": "uniform"}, "never", 0.95),
    ],
)
def test_files_of_version_0_1(
    tmp_path: Path, change: dict[str, Any], correction: str, rho: float
) -> None:
    path = tmp_path / "recipe.json"
    raw = {
        "name": "best",
        "score": "sensitivity",
        "allocation": "mixed",
        "activations": "sparse",
        "linears": None,
        "factors": "regressed",
    }
    path.write_text(json.dumps(raw | change))
    recipe = load_recipe(str(path))
    assert (recipe.correction, recipe.rho) == (correction, rho)


PLAN = {"sparsity": 0.5, "rho": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": "l1"},
            "score must be one of magnitude, norm, sensitivity, got 'l1'",
        ),
        ({"factors": "regressed"}, "needs score 'sensitivity', got 'norm'"),
        ({"factors": "qr"}, "factors must be one of svd, regressed, got 'qr'"),
        ({"activations": None}, "activations must be one of dense, sparse, got None"),
        ({"correction": 1}, "correction must be one of never, always, try, got 1"),
        ({"correction": "try", "linears": {}}, "'try' goes with a search, but"),
        ({"rho": 0}, r"rho must lie in \(0, 1\], got 0"),
        ({"rho": "1"}, r"rho must lie in \(0, 1\], got '1'"),
        ({"extra": 1}, "unknown key 'extra'; known are name, score"),
        ({"linears": []}, r"linears must be an object, got \[\]"),
        ({"linears": {"x": 0.5}}, r"linears\['x'\]: expected an object"),
        ({"linears": {"x": {"sparsity": 0.5}}}, "key 'rho' is missing"),
        (
            {"linears": {"x": PLAN | {"sparsity": 1.5}}},
            r"linears\['x'\].sparsity must lie in \[0, 1\], got 1.5",
        ),
        (
            {"linears": {"x": PLAN | {"rho": 0}}},
            r"linears\['x'\].rho must lie in \(0, 1\], got 0",
        ),
    ],
    ids=str,
)
def test_bad_recipe_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(recipe_json(RECIPES["wina"])) | change))
    with pytest.raises(PrepareError, match=message):
        load_recipe(str(path))


def test_bad_recipe_names(tmp_path: Path) -> None:
    with pytest.raises(
        PrepareError, match=r"besst: there is no such file.* \(uniform, teal, wina"
    ):
        load_recipe("besst")
    path = tmp_path / "recipe.json"
    path.write_text("{")
    with pytest.raises(PrepareError, match="not valid JSON"):
        load_recipe(str(path))
    path.write_text("[]")
    with pytest.raises(PrepareError, match="expected a JSON object"):
        load_recipe(str(path))
    path.write_text('{"name": "x"}')
    with pytest.raises(PrepareError, match="key 'score' is missing"):
        load_recipe(str(path))


def test_recipe_of_another_model_or_budget() -> None:
    linears = [Linear("a", 0, "a", (4, 4)), Linear("b", 0, "b", (4, 4))]
    plan = LinearPlan(0.5, 1.0)

    def recipe(*names: str) -> Recipe:
        return replace(RECIPES["wina"], linears=dict.fromkeys(names, plan))

    with pytest.raises(PrepareError, match="lacks b"):
        check_plans(recipe("a"), linears, 0.5)
    with pytest.raises(PrepareError, match="lists c"):
        check_plans(recipe("a", "b", "c"), linears, 0.5)
    two = recipe("a", "b")
    check_plans(two, linears, 0.5)
    with pytest.raises(PrepareError, match=r"adds up to a sparsity of 0\.5000"):
        check_plans(two, linears, 0.4)
