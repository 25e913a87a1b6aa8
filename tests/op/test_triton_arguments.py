# SPDX-License-Identifier: Apache-2.0
"""Arguments of the Triton backend: layouts that it takes, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_case import DEVICE, assert_close, make_case

pytest.importorskip("triton")

from vllm_rsparse.kernels import rsparse_linear as backend
from vllm_rsparse.op import reference


class TestLayouts:
    @pytest.mark.parametrize("tokens", [1, 4])
    def test_rows_of_x_may_lie_apart(self, tokens: int) -> None:
        case = make_case(tokens)
        expected = case.expected()
        wide = torch.full((tokens, 100), float("nan"), device=DEVICE)
        wide[:, 5:82] = case.x
        case.x = wide[:, 5:82]
        assert_close(backend.rsparse_linear(*case.args()), expected)

    def test_channels_of_x_may_lie_apart(self) -> None:
        case = make_case(2)
        expected = case.expected()
        case.x = case.x.t().contiguous().t()
        assert_close(backend.rsparse_linear(*case.args()), expected)

    def test_factors_in_any_layout(self) -> None:
        case = make_case(2)
        expected = case.expected()
        case.u, case.v = case.u.contiguous(), case.v.contiguous()
        assert_close(backend.rsparse_linear(*case.args()), expected)

    def test_weight_rows_may_lie_apart(self) -> None:
        case = make_case(2)
        wide = torch.full((77, 80), float("nan"), device=DEVICE)
        wide[:, :66] = case.weight.t()
        expected = case.expected()
        case.weight = wide[:, :66].t()
        assert_close(backend.rsparse_linear(*case.args()), expected)

    def test_unpadded_factors_are_the_defaults(self) -> None:
        case = make_case(shard_sizes=(30,), ranks=(6,))
        u, v = case.u[:, :6], case.v[:6]
        out = backend.rsparse_linear(case.x, case.weight, case.thresholds, u, v)
        expected = reference.rsparse_linear(case.x, case.weight, case.thresholds, u, v)
        assert_close(out, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(1, 76)}, r"x must be \[M, 77\]"),
            ({"x": torch.zeros(1, 77, dtype=torch.int32)}, "x must be bfloat16"),
            ({"weight": torch.zeros(66, 77)}, r"must be stored \[K, N\]"),
            ({"thresholds": torch.zeros(2, 77)}, r"thresholds must be \[3, 77\]"),
            (
                {"thresholds": torch.zeros(3, 77, dtype=torch.bfloat16)},
                "thresholds must be torch.float32",
            ),
            ({"v": torch.zeros(3, 77)}, r"v must be \[48, 77\]"),
            ({"u": torch.zeros(66, 3)}, r"u must be \[66, 32\]"),
            ({"correction": torch.zeros(65)}, r"correction must be \[66\]"),
            ({"bias": torch.zeros(132, device=DEVICE)[::2]}, "bias must be contiguous"),
            ({"shard_sizes": [40, 17, 8]}, "must add up to N = 66"),
        ],
        ids=lambda value: value if isinstance(value, str) else next(iter(value)),
    )
    def test_names_the_parameter(self, change: dict, message: str) -> None:
        change = {
            name: value.to(DEVICE) if isinstance(value, Tensor) else value
            for name, value in change.items()
        }
        case = replace(make_case(), **change)
        with pytest.raises(ValueError, match=message):
            backend.rsparse_linear(*case.args())
