# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity are told with their place and the remedy."""

import math

import pytest
import torch

from vllm_rsparse.errors import NotFiniteError
from vllm_rsparse.model.finite import check_activations, check_weight, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(5, 7).to(dtype)
    assert is_finite(weight)
    check_weight(weight, weight.float(), "x")
    weight[3, 5] = bad
    assert not is_finite(weight)
    with pytest.raises(
        NotFiniteError, match=rf"^x contains {bad} at \[3, 5\]; .*again"
    ):
        check_weight(weight, weight.float(), "x")
    with pytest.raises(NotFiniteError, match=r"^y: NaN or infinity .* --dtype bfl"):
        check_activations(weight, "y")


def test_integers_and_nothing_are_finite() -> None:
    assert is_finite(torch.arange(3))
    assert is_finite(torch.empty(0, 4))


def test_weights_that_float16_cannot_hold() -> None:
    weight = torch.tensor([[1.0, -70000.0]])
    check_weight(weight, weight.bfloat16(), "x")
    with pytest.raises(
        NotFiniteError, match=r"x has values up to 7e\+04, too large fo"
    ):
        check_weight(weight, weight.half(), "x")
