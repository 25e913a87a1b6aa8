# SPDX-License-Identifier: Apache-2.0
"""int4 and fp8 weights as numbers in scratch.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

import pytest
import torch

pytest.importorskip("triton")

from vllm_rsparse.kernels import scratch_linear
from vllm_rsparse.kernels.scratch_linear import dequantise_into
from vllm_rsparse.testing.cases import make_case, relative_error
from vllm_rsparse.testing.tolerances import tolerance

from .weights import WEIGHTS, store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", WEIGHTS)
def test_scratch_is_the_weight_rounded_once(name, dtype):
    case = make_case(1, 128, [200], [0], dtype, device=DEVICE, store=store(name))
    weight = case.operands.weight
    if name == "int8-planes":
        assert scratch_linear._by_pairs(case.x.new_empty(128, 200), weight) == (
            dtype == torch.bfloat16
        )
    scratch = torch.full((128, 200), float("nan"), dtype=dtype, device=DEVICE)
    dequantise_into(scratch, weight)
    expected = weight.dequantise().t()
    if name == "fp8" and DEVICE == "cpu" and dtype == torch.bfloat16:
        # The interpreter cuts off where a device rounds.
        assert relative_error(scratch, expected) < 2 * tolerance(dtype)
        return
    # float32 scales of AWQ and fp8-block aside, a code times a scale is rounded once.
    torch.testing.assert_close(
        scratch.float(), expected.to(dtype).float(), rtol=8e-3, atol=0
    )
    assert relative_error(scratch, expected) < tolerance(dtype)
