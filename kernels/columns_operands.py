# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: words of ``columns.py`` as the first operand, rows in its order."""

import triton
import triton.language as tl

from .codes import INT8_PLANES, int4_offset, unpack_fp8, unpack_int4
from .widen import (
    int4_zeros,
    join_planes,
    rescale_fp8,
    scale_eight,
    split_eight,
)


@triton.jit
def _pairs(words, COLUMNS: tl.constexpr):
    """[4, 8, warps, W, steps, 2, 2]: two channels in neighbouring registers."""
    W: tl.constexpr = COLUMNS.words
    STEPS: tl.constexpr = COLUMNS.channels // 16
    pairs = tl.reshape(words, (4, 8, COLUMNS.warps, STEPS, 2, 2, W))
    even, odd = tl.split(tl.permute(pairs, (0, 1, 2, 6, 3, 4, 5)))
    return tl.join(even, odd)


@triton.jit
def operand_of_bytes(words, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """fp8 codes as numbers."""
    WARPS: tl.constexpr = COLUMNS.warps
    W: tl.constexpr = COLUMNS.words
    c = unpack_fp8(_pairs(words, COLUMNS), DTYPE)
    c0 = rescale_fp8(c[0], DTYPE)
    c1 = rescale_fp8(c[1], DTYPE)
    c2 = rescale_fp8(c[2], DTYPE)
    c3 = rescale_fp8(c[3], DTYPE)
    codes = tl.join(tl.join(c0, c1), tl.join(c2, c3))
    codes = tl.permute(codes, (3, 8, 2, 7, 1, 4, 5, 0, 6))
    return tl.reshape(codes, (8 * WARPS * W * 4, COLUMNS.channels))


@triton.jit
def operand_of_nibbles(
    words,
    second,
    scales,
    group,
    begin_n,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """int4 codes, or those of two planes, as numbers.

    Args of note:
        second: the second plane's words; unused for int4.
    """
    WARPS: tl.constexpr = COLUMNS.warps
    W: tl.constexpr = COLUMNS.words
    lane = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None]
    word = (warp * 8 + lane) * W + tl.arange(0, W)[None, None, None, :, None]
    word = begin_n // 8 + word + tl.arange(0, 4)[:, None, None, None, None] * 0
    column = word * 8 + tl.arange(0, 8)[None, None, None, None, :]
    scale = tl.load(
        scales.ptr + group * scales.n + column, mask=column < scales.n, other=0.0
    )
    scale = tl.reshape(scale.to(DTYPE), (4, 8, WARPS, W, 1, 1, 1, 2, 2, 2))
    s = split_eight(scale)
    if scales.zero_ptr is None:
        zero = tl.full((1, 1, 1, 1, 1, 1, 1), int4_offset(DTYPE) + 8.0, dtype=DTYPE)
        z = (zero, zero, zero, zero, zero, zero, zero, zero)
    else:
        count = scales.n // 8
        packed = tl.load(
            scales.zero_ptr + group * count + word, mask=word < count, other=0
        )
        z = int4_zeros(tl.reshape(packed, (4, 8, WARPS, W, 1, 1, 1)), DTYPE)
    c = unpack_int4(_pairs(words, COLUMNS), DTYPE)
    if COLUMNS.code == INT8_PLANES:
        d = unpack_int4(_pairs(second, COLUMNS), DTYPE)
        c = (
            join_planes(c[0], z[0], d[0], DTYPE),
            join_planes(c[1], z[1], d[1], DTYPE),
            join_planes(c[2], z[2], d[2], DTYPE),
            join_planes(c[3], z[3], d[3], DTYPE),
            join_planes(c[4], z[4], d[4], DTYPE),
            join_planes(c[5], z[5], d[5], DTYPE),
            join_planes(c[6], z[6], d[6], DTYPE),
            join_planes(c[7], z[7], d[7], DTYPE),
        )
        zero = tl.full((1, 1, 1, 1, 1, 1, 1), 0.0, dtype=DTYPE)
        z = (zero, zero, zero, zero, zero, zero, zero, zero)
    codes = scale_eight(c, z, s, DTYPE)
    codes = tl.permute(codes, (3, 9, 8, 2, 7, 1, 4, 5, 0, 6))
    return tl.reshape(codes, (8 * WARPS * W * 8, COLUMNS.channels))
