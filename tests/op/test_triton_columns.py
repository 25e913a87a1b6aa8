# SPDX-License-Identifier: Apache-2.0
"""``columns_kernel``, of the dense route for a few tokens, against its definition.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vllm_rsparse.kernels.columns_linear import columns_linear, takes_columns
from vllm_rsparse.kernels.launch_config import LaunchConfig
from vllm_rsparse.kernels.stored_rows import codes_per_word
from vllm_rsparse.op.reference import dense_linear as reference
from vllm_rsparse.testing.cases import Case, make_case, relative_error, same_bits
from vllm_rsparse.testing.tolerances import tolerance

from .weights import WEIGHTS, store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies in float32.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def case_of(name: str, tokens: int, k: int = 256, n: int = 168) -> Case:
    """Rows of x that lie apart, and what must not be read between them."""
    case = make_case(tokens, k, [n], [0], DTYPE, device=DEVICE, store=store(name))
    padded = torch.full((tokens, k + 44), float("inf"), device=DEVICE).to(DTYPE)
    padded[:, :k] = case.x
    return replace(case, x=padded[:, :k])


def config_of(case: Case, words: int, channels: int, splits: int, warps: int, stages):
    columns = 8 * warps * words * codes_per_word(case.operands.weight)
    return LaunchConfig(columns, channels, splits, warps, stages, False, packed=True)


def exact(x: Tensor, case: Case) -> Tensor:
    return reference(x.float(), case.operands.weight, case.bias.float())


# Words of a thread, channels of an iteration, splits, warps, stages.
@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(5, (1, 64, 1, 4, 1)), (33, (2, 32, 3, 4, 3)), (70, (4, 128, 2, 4, 2))],
    ids=str,
)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_format(name, tokens, shape):
    case = case_of(name, tokens)
    config = config_of(case, *shape)
    assert takes_columns(case.x, case.operands.weight, config) == (
        name != "int4-awq" or torch.float32 == DTYPE
    )
    out = columns_linear(case.x, case.operands.weight, case.bias, config)
    assert relative_error(out, exact(case.x, case)) < tolerance(DTYPE, roundings=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_odd_numbers_of_channels(splits):
    case = case_of("fp8", 17, k=77, n=132)
    for stages in (1, 2):
        config = config_of(case, 1, 32, splits, 4, stages)
        out = columns_linear(case.x, case.operands.weight, case.bias, config)
        assert relative_error(out, exact(case.x, case)) < tolerance(DTYPE)


def test_same_bits_every_time():
    case = case_of("int8-planes", 9)
    args = case.x, case.operands.weight, case.bias, config_of(case, 1, 64, 2, 4, 3)
    first = columns_linear(*args)
    for _ in range(1 if DEVICE == "cpu" else 50):
        assert same_bits(columns_linear(*args), first)


def test_columns_that_no_thread_could_take():
    case = case_of("fp8", 5)
    config = LaunchConfig(64, 64, 1, 4, 1, False, packed=True)
    with pytest.raises(ValueError, match="block_n is 64 and num_warps 4"):
        columns_linear(case.x, case.operands.weight, None, config)
