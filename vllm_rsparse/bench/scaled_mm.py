# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The dense FP8 product of the library, with its activations rounded to FP8 first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_rsparse.formats.fp8 import LARGEST


@triton.jit
def _quantise_kernel(
    x_ptr, element_ptr, scale_ptr, k, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    live = offsets < k
    x = tl.load(x_ptr + row * k + offsets, mask=live, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / LARGEST, 1e-12)
    tl.store(scale_ptr + row, scale)
    tl.store(
        element_ptr + row * k + offsets,
        (x / scale).to(element_ptr.dtype.element_ty),
        mask=live,
    )


def scaled_linear(x: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
    """Two launches: a scale per token, and ``torch._scaled_mm``.

    Args:
        x: bfloat16 [M, K], contiguous.
        rows: float8_e4m3fn [N, K], contiguous.
        scales: float32 [N].
    """
    tokens, k = x.shape
    elements = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device=x.device)
    token_scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    _quantise_kernel[(tokens,)](
        x,
        elements,
        token_scales,
        k,
        LARGEST=LARGEST,
        BLOCK=block,
        num_warps=max(4, min(32, block // 1024)),
    )
    return torch._scaled_mm(
        elements,
        rows.t(),
        token_scales,
        scales[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
