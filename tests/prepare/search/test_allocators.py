# SPDX-License-Identifier: Apache-2.0
"""Which strategy a recipe names, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.recipe.recipes import RECIPES
from vllm_rsparse.prepare.search.allocators import ALLOCATORS, allocator_of


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_a_strategy_that_suits_it(name: str) -> None:
    assert allocator_of(RECIPES[name]) is ALLOCATORS[RECIPES[name].allocation]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allocation": "even"}, "must be one of uniform, greedy, .* got 'even'"),
        ({"allocation": "sensitivity"}, "needs score 'sensitivity', got 'norm'"),
        ({"allocation": "mixed"}, "needs score 'sensitivity', got 'norm'"),
        ({"allocation": "greedy", "rho": 0.9}, "'wina' chooses the factors itself"),
        ({"correction": "try"}, r"tries candidates \(mixed\), got 'uniform'; choose"),
    ],
    ids=str,
)
def test_choices_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        allocator_of(replace(RECIPES["wina"], **changes))


def test_nothing_depends_on_the_name() -> None:
    uniform, wina = RECIPES["uniform"], RECIPES["wina"]
    assert replace(uniform, name="wina", rho=1.0) == wina
