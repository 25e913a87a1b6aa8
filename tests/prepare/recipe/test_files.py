# SPDX-License-Identifier: Apache-2.0
"""Recipes in JSON files: written, read, and refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.recipe.recipes import RECIPES, check_plans, load_recipe


def test_recipes_survive_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for recipe in RECIPES.values():
        fixed = recipe.with_plans({"model.layers.0.mlp.up_proj": LinearPlan(0.4, 0.9)})
        for one in (recipe, fixed):
            path.write_text(one.to_json())
            assert load_recipe(str(path)) == one


PLAN = {"sparsity": 0.5, "rho": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": "l1"},
            "score must be one of magnitude, norm, sensitivity, got 'l1'",
        ),
        ({"allocation": "sensitivity"}, "needs score 'sensitivity', got 'norm'"),
        ({"factors": "regressed"}, "needs score 'sensitivity', got 'norm'"),
        ({"factors": "qr"}, "factors must be one of svd, regressed, got 'qr'"),
        ({"activations": None}, "activations must be one of dense, sparse, got None"),
        ({"correction": 1}, "correction must be true or false"),
        ({"extra": 1}, "unknown key 'extra'; known are name, score"),
        ({"linears": []}, "`linears` must be an object"),
        ({"linears": {"x": 0.5}}, r"linears\['x'\]: expected an object"),
        ({"linears": {"x": {"sparsity": 0.5}}}, "key 'rho' is missing"),
        ({"linears": {"x": PLAN | {"sparsity": 1.5}}}, "sparsity is out of range"),
        ({"linears": {"x": PLAN | {"rho": 0}}}, "rho is out of range"),
    ],
    ids=str,
)
def test_bad_recipe_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(RECIPES["wina"].to_json()) | change))
    with pytest.raises(PrepareError, match=message):
        load_recipe(str(path))


def test_bad_recipe_names(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="neither one of uniform, teal, wina"):
        load_recipe("besst")
    path = tmp_path / "recipe.json"
    path.write_text("{")
    with pytest.raises(PrepareError, match="cannot be read as JSON"):
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
    with pytest.raises(PrepareError, match="lacks b"):
        check_plans(RECIPES["wina"].with_plans({"a": plan}), linears, 0.5)
    three = {"a": plan, "b": plan, "c": plan}
    with pytest.raises(PrepareError, match="lists c"):
        check_plans(RECIPES["wina"].with_plans(three), linears, 0.5)
    two = RECIPES["wina"].with_plans({"a": plan, "b": plan})
    check_plans(two, linears, 0.5)
    with pytest.raises(PrepareError, match=r"adds up to a sparsity of 0\.5000"):
        check_plans(two, linears, 0.4)
