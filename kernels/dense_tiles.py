# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: all channels of int4 and fp8 weights, for more than a few tokens.

``dense_kernel`` widens a tile to x's type and multiplies it with a block of tokens.
``dequantise_kernel`` writes the widened weight, for the library's own product.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import (
    FP8,
    FP8_BLOCK,
    INT4,
    INT8_PLANES,
    PLANE_STEPS,
    int4_offset,
)
from .packed_scales import SCALE_BLOCK
from .widen import scale_codes, unpack_quads, widen_fp8


@triton.jit
def dense_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    partial_ptr,
    tokens,
    n,
    k,
    pitch,
    stride_xm,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    QUADS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M tokens by BLOCK_N columns over one part of the channels.

    Neighbouring programs take the same tile of the weight for other tokens, so that
    memory is read once and the L2 cache serves the rest.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin_n = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    mask_m = (offs_m < tokens)[:, None]
    x_row_ptr = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PDL:
        gdc_wait()
    for begin_k in tl.range(split * BLOCK_K, k, splits * BLOCK_K, num_stages=STAGES):
        offs_k = begin_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k
        x = tl.load(
            x_row_ptr + offs_k[None, :], mask=mask_m & mask_k[None, :], other=0.0
        )
        if QUADS:
            tile = _tile_of_quads(
                weight_ptr,
                scale_ptr,
                zero_ptr,
                begin_k,
                begin_n,
                n,
                k,
                pitch,
                GROUP,
                BLOCK_N,
                BLOCK_K,
                DTYPE,
            )
        else:
            tile = _wide_tile(
                weight_ptr,
                scale_ptr,
                zero_ptr,
                begin_k,
                begin_n,
                n,
                k,
                pitch,
                CODE,
                GROUP,
                BLOCK_N,
                BLOCK_K,
                DTYPE,
            ).to(DTYPE)
        acc = tl.dot(x.to(DTYPE), tile, acc, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    if QUADS:
        acc = tl.reshape(acc, (BLOCK_M, 4, BLOCK_N // 4))
        acc = tl.reshape(tl.permute(acc, (0, 2, 1)), (BLOCK_M, BLOCK_N))
    row = (split * tokens + offs_m[:, None]).to(tl.int64)
    tl.store(
        partial_ptr + row * n + offs_n[None, :],
        acc,
        mask=mask_m & (offs_n < n)[None, :],
    )


@triton.jit
def dequantise_kernel(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    column_scale_ptr,
    out_ptr,
    n,
    k,
    pitch,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight in ``out``'s type, stored [K, N]."""
    begin_k = tl.program_id(0) * BLOCK_K
    begin_n = tl.program_id(1) * BLOCK_N
    tile = _wide_tile(
        weight_ptr,
        scale_ptr,
        zero_ptr,
        begin_k,
        begin_n,
        n,
        k,
        pitch,
        CODE,
        GROUP,
        BLOCK_N,
        BLOCK_K,
        None,
    )
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    if CODE == FP8:
        scale = tl.load(column_scale_ptr + offs_n, mask=offs_n < n, other=0.0)
        tile = tile.to(tl.float32) * scale[None, :]
    tl.store(
        out_ptr + offs_k.to(tl.int64)[:, None] * n + offs_n[None, :],
        tile.to(out_ptr.dtype.element_ty),
        mask=(offs_k < k)[:, None] & (offs_n < n)[None, :],
    )


@triton.jit
def _wide_tile(
    weight_ptr,
    scale_ptr,
    zero_ptr,
    begin_k,
    begin_n,
    n,
    k,
    pitch,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Channels and columns from a place of the weight: [BLOCK_K, BLOCK_N].

    A block of channels lies in one group: BLOCK_K divides GROUP, or GROUP is K. The
    scales of columns are left out (the format fp8): they leave the sum. Elements of fp8
    are bytes where there is a DTYPE, and float8_e4m3fn where it is None: the conversion
    of the instruction set, which keeps NaN and issues at a sixteenth of the rate.
    """
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    mask_k = (offs_k < k)[:, None]
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < n)[None, :]
    if CODE == INT4 or CODE == INT8_PLANES:  # noqa: SIM109 (Triton has no "in")
        group = begin_k // GROUP
        words_n = begin_n // 8 + tl.arange(0, BLOCK_N // 8)
        mask_w = (words_n < n // 8)[None, :]
        shifts = 4 * tl.arange(0, 8)
        rows = offs_k.to(tl.int64)[:, None]
        mask = mask_k & mask_w
        words = tl.load(
            weight_ptr + rows * pitch + words_n[None, :], mask=mask, other=0
        )
        codes = (words[:, :, None] >> shifts[None, None, :]) & 15
        codes = tl.reshape(codes, (BLOCK_K, BLOCK_N))
        if zero_ptr is None:
            codes -= 8
        else:
            packed = tl.load(
                zero_ptr + group * (n // 8) + words_n[None, :], mask=mask_w, other=0
            )
            zeros = (packed[:, :, None] >> shifts[None, None, :]) & 15
            codes -= tl.reshape(zeros, (1, BLOCK_N))
        scale = tl.load(scale_ptr + group * n + offs_n[None, :], mask=mask_n, other=0.0)
        tile = codes.to(tl.float32)
        if CODE == INT8_PLANES:
            words = tl.load(
                weight_ptr + (rows + k) * pitch + words_n[None, :], mask=mask, other=0
            )
            rest = (words[:, :, None] >> shifts[None, None, :]) & 15
            rest = tl.reshape(rest, (BLOCK_K, BLOCK_N)) - 8
            tile += rest.to(tl.float32) * (1.0 / PLANE_STEPS)
        tile *= scale.to(tl.float32)
    else:
        offsets = offs_k.to(tl.int64)[:, None] * pitch + offs_n[None, :]
        if DTYPE is None:
            tile = tl.load(weight_ptr + offsets, mask=mask_k & mask_n, other=0.0)
        else:
            tile = tl.load(weight_ptr + offsets, mask=mask_k & mask_n, other=0)
            tile = widen_fp8(tile, DTYPE)
        if CODE == FP8_BLOCK:
            blocks_n = (n + SCALE_BLOCK - 1) // SCALE_BLOCK
            place = begin_k // GROUP * blocks_n + offs_n // SCALE_BLOCK
            scale = tl.load(scale_ptr + place[None, :], mask=mask_n, other=0.0)
            tile = tile.to(tl.float32) * scale
    return tile


@triton.jit
def _tile_of_quads(
    halves_ptr,
    scale_ptr,
    zero_ptr,
    begin_k,
    begin_n,
    n,
    k,
    pitch,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``_wide_tile`` of int4 read as int16: [BLOCK_K, BLOCK_N], code by code.

    Column 4 j + i of the tile comes at i BLOCK_N / 4 + j: neighbours in a register are
    the same codes of neighbouring halves, as one instruction unpacks them. Scales are
    of the type DTYPE.
    """
    QUARTER: tl.constexpr = BLOCK_N // 4
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    group = begin_k // GROUP
    offs_h = begin_n // 4 + tl.arange(0, QUARTER)
    mask_h = (offs_h < n // 4)[None, :]
    halves = tl.load(
        halves_ptr + offs_k.to(tl.int64)[:, None] * pitch + offs_h[None, :],
        mask=(offs_k < k)[:, None] & mask_h,
        other=0,
    )
    c0, c1, c2, c3 = unpack_quads(halves, DTYPE)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + group * n + offs_n, mask=offs_n < n, other=0.0)
    scale = tl.reshape(scale.to(DTYPE), (1, QUARTER, 2, 2))
    even, odd = tl.split(scale)
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    if zero_ptr is None:
        z0 = tl.full((1, QUARTER), int4_offset(DTYPE) + 8.0, dtype=DTYPE)
        z1 = z0
        z2 = z0
        z3 = z0
    else:
        zeros = tl.load(
            zero_ptr + group * (n // 4) + offs_h[None, :], mask=mask_h, other=0
        )
        z0, z1, z2, z3 = unpack_quads(zeros, DTYPE)
    c0 = scale_codes(c0, z0, s0, DTYPE)
    c1 = scale_codes(c1, z1, s1, DTYPE)
    c2 = scale_codes(c2, z2, s2, DTYPE)
    c3 = scale_codes(c3, z3, s3, DTYPE)
    tile = tl.join(tl.join(c0, c1), tl.join(c2, c3))
    return tl.reshape(tl.permute(tile, (0, 3, 2, 1)), (BLOCK_K, BLOCK_N))
