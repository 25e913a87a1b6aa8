# SPDX-License-Identifier: Apache-2.0
"""What a preparation on a CPU is expected to take, and when that is a warning."""

import logging

import pytest
import torch

from vllm_rsparse.model.linears import Linear
from vllm_rsparse.prepare import estimate
from vllm_rsparse.prepare.estimate import passes, warn_if_long
from vllm_rsparse.prepare.recipe.recipes import RECIPES

# A billion weights.
LINEARS = [Linear(f"l{i}", i, "mlp.up_proj", (8192, 2048)) for i in range(60)]
TOKENS = 8192


def test_recipes_in_order_of_their_cost() -> None:
    cost = {name: passes(recipe, TOKENS) for name, recipe in RECIPES.items()}
    order = ["wina", "greedy", "best", "evolutionary", "evolutionary-joint"]
    assert sorted(order, key=cost.__getitem__) == order
    # One forward pass, and products for the error of an eighth of the tokens.
    assert cost["wina"] == pytest.approx(1.25)


def test_sparsities_share_a_part_of_the_cost() -> None:
    for name in ("wina", "greedy", "best"):
        alone = passes(RECIPES[name], TOKENS)
        assert alone < passes(RECIPES[name], TOKENS, 3, 3) < 3 * alone


def test_what_is_found_by_trials_is_repeated() -> None:
    best = RECIPES["best"]
    assert passes(best, TOKENS, 4, 2) < 0.7 * passes(best, TOKENS, 4, 4)
    assert passes(RECIPES["wina"], TOKENS, 4, 2) == passes(
        RECIPES["wina"], TOKENS, 4, 4
    )


@pytest.mark.parametrize(
    ("recipe", "speed", "level", "message"),
    [
        ("best", 8e10, logging.WARNING, "'best' will take about 66 minutes on this"),
        ("best", 8e10, logging.WARNING, "--recipe wina takes about 4 minutes"),
        ("wina", 8e10, logging.INFO, "about 4 minutes on this CPU"),
        ("best", 8e11, logging.INFO, "about 7 minutes on this CPU"),
        ("wina", 8e12, None, ""),
        ("wina", 1e9, logging.INFO, "about 5.7 hours"),  # nothing is cheaper
    ],
)
def test_what_is_said(
    recipe: str,
    speed: float,
    level: int | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(estimate, "product_speed", lambda dtype: speed)
    with caplog.at_level(logging.INFO):
        warn_if_long(RECIPES[recipe], LINEARS, TOKENS, torch.float32, 1, 1)
    assert [record.levelno for record in caplog.records] == [level] * bool(level)
    assert message in caplog.text


@pytest.mark.parametrize(
    ("dtype", "speed", "message"),
    [
        (torch.float32, 2e11, "; --dtype bfloat16 takes about 27 minutes, --recipe"),
        (torch.float32, 1e11, "this CPU; --recipe wina"),
        (torch.bfloat16, 8e10, "this CPU; --recipe wina"),
    ],
)
def test_bfloat16_is_named_where_it_is_faster(
    dtype: torch.dtype,
    speed: float,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    speeds = {torch.float32: 8e10, torch.bfloat16: speed}
    monkeypatch.setattr(estimate, "product_speed", speeds.__getitem__)
    warn_if_long(RECIPES["best"], LINEARS, TOKENS, dtype, 1, 1)
    assert message in caplog.text


def test_the_speed_is_not_measured_for_what_takes_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(estimate, "product_speed", None)  # not callable
    with caplog.at_level(logging.INFO):
        warn_if_long(RECIPES["wina"], LINEARS[:1], 200, torch.float32, 1, 1)
    assert not caplog.records
    with pytest.raises(TypeError):
        warn_if_long(RECIPES["best"], LINEARS[:1], 200, torch.float32, 1, 1)


def test_the_speed_of_products() -> None:
    assert estimate.product_speed(torch.float32) > 0
