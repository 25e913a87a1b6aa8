# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: int4 and fp8 weights as numbers in memory."""

import triton
import triton.language as tl

from .codes import FP8
from .halves import (
    high_halves,
    low_halves,
    pairs_of_codes,
    scale_pairs,
    scale_plane_pairs,
)
from .weight_tiles import wide_tile


@triton.jit
def dequantise_kernel(
    weight,
    column_scale_ptr,
    out_ptr,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight, ``Codes``, in ``out``'s type, stored [K, N]."""
    n, k = weight.n, weight.k
    begin_k = tl.program_id(0) * BLOCK_K
    begin_n = tl.program_id(1) * BLOCK_N
    tile = wide_tile(weight, begin_k, begin_n, CODE, GROUP, BLOCK_N, BLOCK_K, None)
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    if CODE == FP8:
        scale = tl.load(column_scale_ptr + offs_n, mask=mask_n, other=0.0)
        tile = tile.to(tl.float32) * scale[None, :]
    tl.store(
        out_ptr + offs_k.to(tl.int64)[:, None] * n + offs_n[None, :],
        tile.to(out_ptr.dtype.element_ty),
        mask=(offs_k < k)[:, None] & mask_n[None, :],
    )


@triton.jit
def dequantise_pairs_kernel(
    weight,
    out_ptr,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
):
    """``dequantise_kernel`` of int4 and planes in bfloat16, by operations on pairs.

    Args of note:
        weight: the ``Codes``, with scales in bfloat16.
        out_ptr: bfloat16 [K, N].
        PLANES: there is a second plane after the first.
        BLOCK_K: divides GROUP, or GROUP is K.
    """
    n, k = weight.n, weight.k
    # Two numbers a word.
    scale_ptr = weight.scale_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    out_ptr = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    begin_k = tl.program_id(0) * BLOCK_K
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < n // 8
    mask = (offs_k < k)[:, None] & mask_w[None, :]
    rows = offs_k.to(tl.int64)[:, None]
    place = rows * weight.pitch + offs_w[None, :]
    codes = tl.load(
        weight.ptr + place, mask=mask, other=0, eviction_policy="evict_first"
    )
    group = begin_k // GROUP
    quarters = offs_w[:, None] * 4 + tl.arange(0, 4)[None, :]
    scale = tl.load(
        scale_ptr + group * (n // 2) + quarters, mask=mask_w[:, None], other=0
    )
    even, odd = tl.split(tl.reshape(scale, (1, BLOCK_W, 2, 2)))
    s01, s45 = tl.split(even)
    s23, s67 = tl.split(odd)
    s0 = low_halves(s01, s45, BITS)
    s1 = high_halves(s01, s45, BITS)
    s2 = low_halves(s23, s67, BITS)
    s3 = high_halves(s23, s67, BITS)
    if weight.zero_ptr is None:
        # Zero point 8.
        z0 = tl.full((1, BLOCK_W), 0x43084308, dtype=tl.int32)
        z1 = z0
        z2 = z0
        z3 = z0
    else:
        zeros = weight.zero_ptr + group * (n // 8) + offs_w
        packed = tl.load(zeros, mask=mask_w, other=0)[None, :]
        z0, z1, z2, z3 = pairs_of_codes(packed, BITS)
    c0, c1, c2, c3 = pairs_of_codes(codes, BITS)
    if not PLANES:
        c0 = scale_pairs(c0, z0, s0, BITS)
        c1 = scale_pairs(c1, z1, s1, BITS)
        c2 = scale_pairs(c2, z2, s2, BITS)
        c3 = scale_pairs(c3, z3, s3, BITS)
    else:
        second_ptr = weight.ptr + tl.cast(k, tl.int64) * weight.pitch
        second = tl.load(
            second_ptr + place, mask=mask, other=0, eviction_policy="evict_first"
        )
        d0, d1, d2, d3 = pairs_of_codes(second, BITS)
        c0 = scale_plane_pairs(c0, z0, d0, s0, BITS)
        c1 = scale_plane_pairs(c1, z1, d1, s1, BITS)
        c2 = scale_plane_pairs(c2, z2, d2, s2, BITS)
        c3 = scale_plane_pairs(c3, z3, d3, s3, BITS)
    # (0, 4), (1, 5), (2, 6), (3, 7) become (0, 1), (2, 3), (4, 5), (6, 7).
    front = tl.join(low_halves(c0, c1, BITS), low_halves(c2, c3, BITS))
    back = tl.join(high_halves(c0, c1, BITS), high_halves(c2, c3, BITS))
    pairs = tl.permute(tl.join(front, back), (0, 1, 3, 2))
    pairs = tl.reshape(pairs, (BLOCK_K, BLOCK_W * 4))
    columns = tl.program_id(1) * BLOCK_W * 4 + tl.arange(0, BLOCK_W * 4)
    tl.store(
        out_ptr + rows * (n // 2) + columns[None, :],
        pairs,
        mask=(offs_k < k)[:, None] & (columns < n // 2)[None, :],
    )
