# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: tiles of int4 and fp8 weights as the numbers that they stand for."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .codes import FP8_BLOCK, INT4, INT8_PLANES, PLANE_STEPS, int4_offset
from .packed_scales import SCALE_BLOCK
from .widen import join_planes, scale_codes, unpack_quads, widen_fp8


class Codes(NamedTuple):
    """A stored weight: codes [k, n], ``pitch`` elements between rows, and their scales.

    Scales and zero points are pointers or None, as the format has them.
    """

    ptr: Any
    scale_ptr: Any
    zero_ptr: Any
    n: Any
    k: Any
    pitch: Any


@triton.jit
def wide_tile(
    weight,
    begin_k,
    begin_n,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Channels and columns from a place of the weight: [BLOCK_K, BLOCK_N].

    A block of channels lies in one group: BLOCK_K divides GROUP, or GROUP is K. The
    scales of columns are left out (the format fp8): they leave the sum. Elements of
    fp8 and fp8-block are bytes where there is a DTYPE, and their scales are left out;
    they are float8_e4m3fn where it is None: the conversion of the instruction set,
    which keeps NaN and issues at a sixteenth of the rate.
    """
    n, k, pitch = weight.n, weight.k, weight.pitch
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
            weight.ptr + rows * pitch + words_n[None, :], mask=mask, other=0
        )
        codes = (words[:, :, None] >> shifts[None, None, :]) & 15
        codes = tl.reshape(codes, (BLOCK_K, BLOCK_N))
        if weight.zero_ptr is None:
            codes -= 8
        else:
            packed = tl.load(
                weight.zero_ptr + group * (n // 8) + words_n[None, :],
                mask=mask_w,
                other=0,
            )
            zeros = (packed[:, :, None] >> shifts[None, None, :]) & 15
            codes -= tl.reshape(zeros, (1, BLOCK_N))
        scale = tl.load(
            weight.scale_ptr + group * n + offs_n[None, :], mask=mask_n, other=0.0
        )
        tile = codes.to(tl.float32)
        if CODE == INT8_PLANES:
            words = tl.load(
                weight.ptr + (rows + k) * pitch + words_n[None, :], mask=mask, other=0
            )
            rest = (words[:, :, None] >> shifts[None, None, :]) & 15
            rest = tl.reshape(rest, (BLOCK_K, BLOCK_N)) - 8
            tile += rest.to(tl.float32) * (1.0 / PLANE_STEPS)
        tile *= scale.to(tl.float32)
    else:
        offsets = offs_k.to(tl.int64)[:, None] * pitch + offs_n[None, :]
        if DTYPE is None:
            tile = tl.load(weight.ptr + offsets, mask=mask_k & mask_n, other=0.0)
        else:
            tile = tl.load(weight.ptr + offsets, mask=mask_k & mask_n, other=0)
            tile = widen_fp8(tile, DTYPE)
        if CODE == FP8_BLOCK and DTYPE is None:
            scale = block_scales(weight, begin_k // GROUP, offs_n)
            tile = tile.to(tl.float32) * scale
    return tile


@triton.jit
def block_scales(weight, group, offs_n):
    """fp8-block's scales of a block of channels by column, float32 [1, columns]."""
    blocks_n = (weight.n + SCALE_BLOCK - 1) // SCALE_BLOCK
    place = group * blocks_n + offs_n // SCALE_BLOCK
    return tl.load(weight.scale_ptr + place, mask=offs_n < weight.n, other=0.0)[None, :]


@triton.jit
def tile_of_quads(
    weight,
    begin_k,
    begin_n,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``wide_tile`` of int4 or planes as int16: [BLOCK_K, BLOCK_N], code by code.

    Column 4 j + i of the tile comes at i BLOCK_N / 4 + j: neighbours in a register are
    the same codes of neighbouring halves, as one instruction unpacks them. Scales are
    of the type DTYPE.
    """
    n, k, pitch = weight.n, weight.k, weight.pitch
    QUARTER: tl.constexpr = BLOCK_N // 4
    offs_k = begin_k + tl.arange(0, BLOCK_K)
    group = begin_k // GROUP
    offs_h = begin_n // 4 + tl.arange(0, QUARTER)
    mask_h = (offs_h < n // 4)[None, :]
    rows = offs_k.to(tl.int64)[:, None]
    place = rows * pitch + offs_h[None, :]
    mask = (offs_k < k)[:, None] & mask_h
    halves = tl.load(weight.ptr + place, mask=mask, other=0)
    c0, c1, c2, c3 = unpack_quads(halves, DTYPE)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    scale = tl.load(weight.scale_ptr + group * n + offs_n, mask=offs_n < n, other=0.0)
    scale = tl.reshape(scale.to(DTYPE), (1, QUARTER, 2, 2))
    even, odd = tl.split(scale)
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    if weight.zero_ptr is None:
        z0 = tl.full((1, QUARTER), int4_offset(DTYPE) + 8.0, dtype=DTYPE)
        z1 = z0
        z2 = z0
        z3 = z0
    else:
        zeros = tl.load(
            weight.zero_ptr + group * (n // 4) + offs_h[None, :], mask=mask_h, other=0
        )
        z0, z1, z2, z3 = unpack_quads(zeros, DTYPE)
    if CODE == INT8_PLANES:
        place = (rows + k) * pitch + offs_h[None, :]
        halves = tl.load(weight.ptr + place, mask=mask, other=0)
        d0, d1, d2, d3 = unpack_quads(halves, DTYPE)
        c0 = join_planes(c0, z0, d0, DTYPE)
        c1 = join_planes(c1, z1, d1, DTYPE)
        c2 = join_planes(c2, z2, d2, DTYPE)
        c3 = join_planes(c3, z3, d3, DTYPE)
        z0 = tl.zeros((1, QUARTER), dtype=DTYPE)
        z1 = z0
        z2 = z0
        z3 = z0
    c0 = scale_codes(c0, z0, s0, DTYPE)
    c1 = scale_codes(c1, z1, s1, DTYPE)
    c2 = scale_codes(c2, z2, s2, DTYPE)
    c3 = scale_codes(c3, z3, s3, DTYPE)
    tile = tl.join(tl.join(c0, c1), tl.join(c2, c3))
    return tl.reshape(tl.permute(tile, (0, 3, 2, 1)), (BLOCK_K, BLOCK_N))
