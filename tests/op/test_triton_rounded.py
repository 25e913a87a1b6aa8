# SPDX-License-Identifier: Apache-2.0
"""fp8 weights times x rounded to fp8, by ``rounded_columns_kernel``.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse.kernels.fp8_product import round_rows
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.rounded_linear import rounded_linear
from vllm_rsparse.op.reference import dense_linear as reference
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

from .weights import store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def case_of(tokens: int, k: int = 272, n: int = 144) -> Case:
    return make_case(tokens, k, [n], [0], DTYPE, device=DEVICE, store=store("fp8"))


# Tokens; columns, channels, splits, warps and stages.
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [
        (1, (64, 32, 1, 4, 2)),
        (19, (128, 64, 3, 4, 3)),
        (70, (256, 128, 2, 8, 1)),
        (130, (128, 128, 1, 4, 2)),
    ],
    ids=str,
)
def test_product(tokens, shape):
    case = case_of(tokens)
    weight, bias = case.operands.weight, case.bias
    rounded, scales = round_rows(case.x, turned=True)
    config = LaunchConfig(*shape, False, packed=True)
    out = rounded_linear(rounded, scales, weight, bias, config)
    assert out.dtype == torch.bfloat16
    exact = reference(round_rows(case.x)[0].float() * scales, weight, bias.float())
    # The interpreter cuts bfloat16 off where a device rounds.
    assert relative_error(out, exact) < tolerance(torch.bfloat16, roundings=2)


def test_a_token_that_is_not_a_number():
    case = case_of(5)
    case.x[3, 200] = float("nan")
    config = LaunchConfig(128, 64, 2, 4, 2, False, packed=True)
    rounded, scales = round_rows(case.x, turned=True)
    out = rounded_linear(rounded, scales, case.operands.weight, case.bias, config)
    assert out.isnan().all(1).tolist() == [False, False, False, True, False]
    assert out[[0, 1, 2, 4]].isfinite().all()


def test_same_bits_every_time():
    case = case_of(20)
    config = LaunchConfig(128, 64, 2, 4, 3, False, packed=True)
    args = *round_rows(case.x, turned=True), case.operands.weight, case.bias, config
    first = rounded_linear(*args)
    for _ in range(1 if DEVICE == "cpu" else 50):
        assert same_bits(rounded_linear(*args), first)


@pytest.mark.parametrize(("columns", "warps"), [(32, 4), (128, 2)])
def test_columns_that_no_warp_could_take(columns, warps):
    case = case_of(5)
    config = LaunchConfig(columns, 64, 1, warps, 2, False, packed=True)
    args = *round_rows(case.x, turned=True), case.operands.weight, None, config
    with pytest.raises(ValueError, match=f"block_n is {columns} and num_warps {warps}"):
        rounded_linear(*args)
