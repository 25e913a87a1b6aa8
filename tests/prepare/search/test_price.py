# SPDX-License-Identifier: Apache-2.0
"""The search for the largest sparsity within a price."""

import math
from collections.abc import Callable

import pytest

from vllm_rsparse.prepare.search.price import LEAST, MOST, largest_within


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
