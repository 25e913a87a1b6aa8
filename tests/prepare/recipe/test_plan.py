# SPDX-License-Identifier: Apache-2.0
"""Plans of single linears."""

import pytest

from vllm_rsparse.prepare.recipe.plan import LinearPlan


@pytest.mark.parametrize("rank", [0, 1, 7])
@pytest.mark.parametrize("shape", [(384, 384), (128, 384), (4096, 1024)])
def test_plans_with_a_rank(rank: int, shape: tuple[int, int]) -> None:
    plan = LinearPlan.with_rank(0.4, rank, shape)
    assert plan.rank(shape) == rank
    assert plan.keep == pytest.approx(0.4)


def test_factors_that_leave_no_room_are_left_out() -> None:
    assert LinearPlan.with_rank(0.99, 3, (16, 16)) == LinearPlan(1 - 0.99, 1.0)
