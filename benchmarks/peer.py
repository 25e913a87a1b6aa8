# SPDX-License-Identifier: Apache-2.0
"""The nearest peer, TEAL's formulation written anew: masked split-K with atomics.

Every program sums a few channels of a column tile and adds its sums to the output
atomically, in the output's type; a separate launch zeroes the output. One token, one
threshold for all channels, float16 (as in TEAL, whose atomics are float16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# (block_n, block_k, num_warps), tried for each shape; TEAL's own range and wider.
CONFIGS = [
    (block_n, block_k, warps)
    for block_n in (256, 512, 1024)
    for block_k in (16, 32, 64)
    for warps in (1, 2, 4)
    if 2048 <= block_n * block_k // warps <= 16384
]


@triton.jit
def _peer_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    threshold,
    n,
    k,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < n
    x = tl.load(x_ptr + offs_k, mask=offs_k < k, other=0.0)
    kept = tl.abs(x.to(tl.float32)) > threshold
    weight = tl.load(
        weight_ptr + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n[None, :],
        mask=kept[:, None] & mask_n[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    sums = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[:, None], axis=0)
    tl.atomic_add(
        out_ptr + offs_n, sums.to(out_ptr.dtype.element_ty), mask=mask_n, sem="relaxed"
    )


def peer_linear(
    x: Tensor, weight: Tensor, threshold: float, config: tuple[int, int, int]
) -> Tensor:
    """W s(x) for x [1, K] and a weight [N, K] stored [K, N], both float16: [1, N]."""
    n, k = weight.shape
    block_n, block_k, warps = config
    out = torch.zeros(1, n, dtype=x.dtype, device=x.device)
    _peer_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
        x,
        weight,
        out,
        threshold,
        n,
        k,
        weight.stride(1),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return out
