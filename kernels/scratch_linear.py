# SPDX-License-Identifier: Apache-2.0
"""int4 and fp8 weights as numbers in scratch, for the library; launches ``scratch.py``.

Strips of 24 to 64 MB, which stay in the L2 cache of an H200, are not faster than the
whole weight at once (planes, the four linears of Llama-3-8B and 2048 tokens: 1314 to
1374 us, and 1330), and take more launches, for which a prompt waits on a busy host.
"""

import torch
import triton
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .scratch import dequantise_kernel, dequantise_pairs_kernel
from .stored_rows import column_scales, is_four_bit, rows_of
from .weight_tiles import Codes


def dequantise(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``: the [N, K] view of contiguous [K, N] storage."""
    out = torch.empty(weight.k, weight.n, dtype=dtype, device=weight.device)
    dequantise_into(out, weight)
    return out.t()


def dequantise_into(out: Tensor, weight: StoredWeight) -> None:
    """The weight, as numbers of ``out``'s type.

    Args:
        out: [K, N], contiguous, written.
        weight: int4, planes or fp8.
    """
    n, k = weight.n, weight.k
    data, pitch = rows_of(weight)
    group = weight.group or k
    if _by_pairs(out, weight):
        _dequantise_pairs(out, weight, group)
        return
    block_k = 32
    dequantise_kernel[(triton.cdiv(k, block_k), triton.cdiv(n, 256))](
        Codes(data, weight.scales, weight.zeros, n, k, pitch),
        column_scales(weight),
        out,
        CODE=weight.format.code,
        GROUP=group,
        BLOCK_N=256,
        BLOCK_K=block_k,
        num_warps=4,
    )


def _by_pairs(out: Tensor, weight: StoredWeight) -> bool:
    """Whether whole words become pairs of bfloat16, with scales of the same type."""
    return (
        is_four_bit(weight)
        and weight.scales is not None
        and out.dtype == weight.scales.dtype == torch.bfloat16
        and weight.scales.is_contiguous()
    )


def _dequantise_pairs(out: Tensor, weight: StoredWeight, group: int) -> None:
    assert weight.scales is not None
    data, pitch = rows_of(weight)
    planes = data.dim() == 3
    block_k, block_w = min(32, triton.next_power_of_2(group)), 64
    grid = (triton.cdiv(weight.k, block_k), triton.cdiv(weight.n // 8, block_w))
    dequantise_pairs_kernel[grid](
        Codes(
            data[0] if planes else data,
            weight.scales.reshape(-1).view(torch.int32),
            weight.zeros,
            weight.n,
            weight.k,
            pitch,
        ),
        data[1] if planes else None,
        out.view(torch.int32),
        GROUP=group,
        BLOCK_W=block_w,
        BLOCK_K=block_k,
        BITS=not triton.knobs.runtime.interpret,
        num_warps=4,
    )
