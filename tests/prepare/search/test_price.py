# SPDX-License-Identifier: Apache-2.0
"""The search for the largest sparsity within a price."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.errors import PrepareError
from vllm_rsparse.prepare.recipe.planned import Choice, Planned
from vllm_rsparse.prepare.recipe.recipes import RECIPES
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search.price import (
    LEAST,
    MOST,
    Priced,
    find_priced,
    largest_within,
)
from vllm_rsparse.prepare.store.run_store import RunStore


def growing(steepness: float) -> Callable[[int], float]:
    return lambda percent: 0.008 * math.exp(steepness * (percent - 30))


def step(percent: int) -> float:
    return 0.0 if percent <= 61 else math.inf


@pytest.mark.parametrize(
    ("measure", "limit", "expected", "most"),
    [
        (growing(math.log(7) / 20), 0.02, 39, 3),
        (growing(0.3), 0.02, 33, 5),
        (growing(0.02), 0.02, 75, 5),
        (growing(0.1), 1e9, MOST, 2),
        (growing(0.1), 1e-9, None, 2),
        # At least this much: the smallest that is tried.
        (growing(0.1), 0.008 * math.exp(-2.5) * 1.01, LEAST, 4),
        (step, 0.02, 61, 11),  # interpolation is of no use
    ],
)
def test_the_largest_within_the_limit(
    measure: Callable[[int], float], limit: float, expected: int | None, most: int
) -> None:
    asked: list[int] = []

    def ask(percent: int) -> float:
        asked.append(percent)
        return measure(percent)

    assert largest_within(ask, limit) == expected
    assert len(asked) == len(set(asked)) <= most
    assert set(asked) <= set(range(LEAST, MOST + 1))


A, B = Choice("a", corrected=False), Choice("b", corrected=True, evened=True)


class Planner:
    """Plans that know their sparsity; trials that choose by it.

    Args:
        choices: what trials choose, by percent; A elsewhere. None: there are no trials.
    """

    def __init__(self, choices: dict[int, Choice] | None) -> None:
        self.choices = choices
        self.trials: list[int] = []

    def plan(self, sparsity: float, choice: Choice | None = None) -> Planned:
        percent = round(100 * sparsity)
        if choice is None and self.choices is not None:
            self.trials.append(percent)
            choice = self.choices.get(percent, A)
        return Planned(replace(RECIPES["wina"], name=str(percent)), choice=choice)


class HeldOut:
    """A divergence that grows with the percentage, and more with B.

    Args:
        more: what B loses.
    """

    tokens = 100

    def __init__(self, more: float) -> None:
        self.more = more
        self.measured: list[tuple[int, Choice | None]] = []

    def divergence(self, planned: Planned) -> float:
        percent = int(planned.recipe.name)
        self.measured.append((percent, planned.choice))
        loss = growing(0.1)(percent)
        return loss * self.more if planned.choice == B else loss


def search(
    path: Path, planner: Planner, held_out: HeldOut, limit: float = 0.02
) -> Priced:
    with RunStore(path / "search", {}) as store:
        run = Run(None, (), torch.zeros(1, 1), 0, 0, store)  # type: ignore[arg-type]
        arguments: Any = (planner, held_out)
        return find_priced(run, *arguments, limit)


@pytest.mark.parametrize(
    ("choices", "more", "found", "trials"),
    [
        (None, 1.0, 39, []),
        ({}, 1.0, 39, [40, 39]),
        # Trials at 39% choose what loses more there, but not too much.
        ({39: B}, 1.01, 39, [40, 39]),
        # Too much; at 38% they choose what was measured.
        ({39: B}, 2.0, 38, [40, 39, 38]),
        ({39: B, 38: B, 37: B}, 1.2, 37, [40, 39, 38, 37]),
        # B is repeated up to 42%, where trials choose what loses more.
        ({40: B}, 0.75, 40, [40, 42, 41, 40]),
    ],
)
def test_trials_run_at_the_first_sparsity_and_at_the_one_found(
    tmp_path: Path,
    choices: dict[int, Choice] | None,
    more: float,
    found: int,
    trials: list[int],
) -> None:
    planner, held_out = Planner(choices), HeldOut(more)
    priced = search(tmp_path, planner, held_out)
    assert round(100 * priced.sparsity) == found
    assert planner.trials == trials
    # What is stated is the divergence of the plans that the artifact gets.
    own = planner.plan(priced.sparsity)
    assert priced.divergence == HeldOut(more).divergence(own) <= 0.02
    assert priced.tried[priced.sparsity] == priced.divergence
    assert len(held_out.measured) == len(set(held_out.measured))


def test_what_trials_choose_may_be_out_of_reach(tmp_path: Path) -> None:
    planner = Planner(dict.fromkeys(range(LEAST, 40), B))
    with pytest.raises(PrepareError, match=r"out of reach, .* at a sparsity of 0\.05"):
        search(tmp_path, planner, HeldOut(1e6))
    assert planner.trials[-1] == LEAST
