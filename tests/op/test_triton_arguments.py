# SPDX-License-Identifier: Apache-2.0
"""Layouts that the Triton backend takes; ``test_linear_op.py`` has what it refuses."""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse.op.triton_backend import rsparse_linear
from vllm_rsparse.testing import cases
from vllm_rsparse.testing.cases import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
make_case = partial(cases.make_case, device=DEVICE)


@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_of_x_may_lie_apart(tokens: int) -> None:
    case = make_case(tokens)
    wide = torch.full((tokens, 100), float("nan"), device=DEVICE)
    wide[:, 5:82] = case.x
    apart = replace(case, x=wide[:, 5:82])
    assert_close(rsparse_linear(*apart.args()), case.expected())


def test_channels_of_x_may_lie_apart() -> None:
    case = make_case(2)
    apart = replace(case, x=case.x.t().contiguous().t())
    assert_close(rsparse_linear(*apart.args()), case.expected())


def test_factors_in_any_layout() -> None:
    case = make_case(2)
    u, v = case.operands.u.contiguous(), case.operands.v.contiguous()
    other = case.with_operands(u=u, v=v)
    assert_close(rsparse_linear(*other.args()), case.expected())


def test_weight_rows_may_lie_apart() -> None:
    case = make_case(2)
    wide = torch.full((77, 80), float("nan"), device=DEVICE)
    wide[:, :66] = case.operands.weight.data.t()
    apart = case.with_weight(wide[:, :66].t())
    assert_close(rsparse_linear(*apart.args()), case.expected())


def test_factors_without_padding() -> None:
    case = make_case(shard_sizes=(30,), ranks=(6,))
    u, v = case.operands.u[:, :6], case.operands.v[:6]
    other = case.with_operands(u=u, v=v, ranks=(6,))
    assert_close(rsparse_linear(*other.args()), case.expected())
