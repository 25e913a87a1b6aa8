# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton does not compile starred tuples)
"""Device code: all channels of int4 and fp8 weights for up to 64 tokens a program.

As ``packed.py``, with two differences: a thread loads eight neighbouring channels of x,
and the scales and zero points of int4 are applied to the unpacked codes, which leaves
registers for the sums of more tokens.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import INT4, int4_offset, unpack_fp8, unpack_int4
from .packing import STEP
from .programs import column_constants
from .widen import int4_zeros, rescale_fp8, scale_eight, split_eight


class Wide(NamedTuple):
    """Constants of a compiled program; numbers, for the reason of ``Tiling``.

    Attributes:
        code: the format, int4 or fp8.
        tokens: of a program.
        columns: of a program.
        words: words of a row that a thread loads at once, 1, 2 or 4.
        steps: steps of 16 channels of one iteration, 2 or 4.
        group: channels that share a row of scales of int4.
        even_n: no tile ends before its last column.
        even_k: no iteration ends before its last channel.
        pdl: programmatic dependent launch.
    """

    code: int
    tokens: int
    columns: int
    words: int
    steps: int
    group: int
    even_n: bool
    even_k: bool
    pdl: bool


@triton.jit
def wide_kernel(
    x,
    words,
    scales,
    constants,
    out_ptr,
    partial_ptr,
    tokens,
    WIDE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums of a column tile over one part of the channels.

    Args:
        x: the ``Input``.
        words: the ``Words``.
        scales: the ``Scales``; of fp8, the pointers are None.
        constants: the ``Constants``, used where the output is written.
        out_ptr: [tokens, n], written where partial_ptr is None.
        partial_ptr: float32 [splits, tokens, n], or None.
        tokens: rows of x.
        WIDE: the ``Wide``.
        DTYPE: of the operands that are multiplied.
    """
    TOKENS: tl.constexpr = WIDE.tokens
    COLUMNS: tl.constexpr = WIDE.columns
    WORDS: tl.constexpr = WIDE.words
    CHANNELS: tl.constexpr = WIDE.steps * STEP
    PAIRS: tl.constexpr = WIDE.steps // 2
    begin_n = tl.program_id(0) * COLUMNS
    begin_m = tl.program_id(1) * TOKENS
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    # [4, 8, ...]: four threads share a column, eight a row.
    quad = tl.arange(0, 4)[:, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None]
    place = lane * WORDS
    if WORDS == 1 and tl.float32 != DTYPE:
        place = hide_order(place)
    column = quad * 0 + place + tl.arange(0, WORDS)[None, None, None, :]
    mask_n = column < (scales.n - begin_n) // (COLUMNS // 8 // WORDS)
    column += begin_n // (COLUMNS // 8 // WORDS)
    # x: [4, 8, TOKENS / 8, 8].
    token = begin_m + tl.arange(0, TOKENS // 8)[None, None, :, None] * 8 + lane
    token = token + quad * 0
    mask_m = token < tokens
    inner = quad * 8 + lane * 0
    inner_x = inner + tl.arange(0, 8)[None, None, None, :]
    x_ptr = x.ptr + token.to(tl.int64) * x.stride_m
    acc = tl.zeros([COLUMNS, TOKENS], dtype=tl.float32)
    if WIDE.pdl:
        gdc_wait()
    for first in range(split * CHANNELS, x.k, splits * CHANNELS):
        loaded = _load_words(words, first + inner, column, mask_n, x.k, WIDE)
        scaling = None
        if WIDE.code == INT4:
            scaling = _load_scales(scales, first + quad * 0, begin_n, lane, WIDE, DTYPE)
        for pair in tl.static_range(PAIRS):
            channel = first + pair * 32 + inner_x
            mask = mask_m
            if not WIDE.even_k:
                mask = mask & (channel < x.k)
            values = tl.load(x_ptr + channel, mask=mask, other=0.0)
            values = tl.reshape(values, (4, 8, TOKENS // 8, 2, 4))
            low, high = tl.split(tl.permute(values, (0, 1, 2, 4, 3)))
            acc = _multiply(loaded[2 * pair], low, scaling, acc, WIDE, DTYPE)
            acc = _multiply(loaded[2 * pair + 1], high, scaling, acc, WIDE, DTYPE)
    if WIDE.pdl:
        gdc_launch_dependents()
    # From the order of the operand's rows, see ``codes.dot_operand``.
    sums = tl.permute(tl.reshape(acc, (COLUMNS // 8, 8, TOKENS)), (1, 0, 2))
    offs_n = begin_n + (tl.arange(0, 8) * (COLUMNS // 8))[:, None, None]
    offs_n = offs_n + tl.arange(0, COLUMNS // 8)[None, :, None]
    offs_m = begin_m + tl.arange(0, TOKENS)[None, None, :]
    mask_n = offs_n < scales.n
    mask = (offs_m < tokens) & mask_n
    if partial_ptr is None:
        if constants.scale_ptr is not None:
            sums *= tl.load(constants.scale_ptr + offs_n, mask=mask_n, other=0.0)
        sums += column_constants(constants, offs_n, mask_n)
        out = out_ptr + offs_m.to(tl.int64) * scales.n + offs_n
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        row = (split * tokens + offs_m).to(tl.int64)
        tl.store(partial_ptr + row * scales.n + offs_n, sums, mask=mask)


@triton.jit
def hide_order(place):
    """The same numbers; the compiler does not see that they follow one another.

    It would otherwise let a thread load the words of several lanes.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [place], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _load_words(words, first, column, mask_n, k, WIDE: tl.constexpr):
    """The words of an iteration's steps, int32 [4, 8, 4, W] each.

    Args of note:
        first: [4, 8, 1, 1], the first channel of a thread.
    """
    STEPS: tl.constexpr = WIDE.steps
    loaded = ()
    for step in tl.static_range(STEPS):
        row = first + step // 2 * 32 + step % 2 * 4
        row = row + tl.arange(0, 4)[None, None, :, None]
        pointers = words.ptr + row * words.pitch + column
        if WIDE.even_k and WIDE.even_n:
            part = tl.load(pointers, eviction_policy="evict_first")
        else:
            mask = (row < k) & mask_n
            part = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
        loaded = loaded + (part,)
    return loaded


@triton.jit
def _load_scales(scales, first, begin_n, lane, WIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Scales and zero points of an iteration's group: two tuples by code.

    Each [4, 8, W, 1, 1] of DTYPE; ``int4_offset`` is in the zero points.
    """
    W: tl.constexpr = WIDE.words
    group = first // WIDE.group
    inner = lane * (8 * W) + (tl.arange(0, W) * 8)[None, None, :, None]
    code = inner + tl.arange(0, 8)[None, None, None, :]
    pointers = scales.ptr + group * scales.n + begin_n + code
    if WIDE.even_n:
        parts = tl.load(pointers)
    else:
        parts = tl.load(pointers, mask=begin_n + code < scales.n, other=0.0)
    parts = split_eight(tl.reshape(parts.to(DTYPE), (4, 8, W, 1, 1, 2, 2, 2)))
    if scales.zero_ptr is None:
        z = tl.full((1, 1, 1, 1, 1), int4_offset(DTYPE) + 8.0, dtype=DTYPE)
        zeros = (z, z, z, z, z, z, z, z)
    else:
        place = begin_n // 8 + inner // 8
        pointers = scales.zero_ptr + group * (scales.n // 8) + place
        packed = tl.load(pointers, mask=place < scales.n // 8, other=0)
        zeros = int4_zeros(packed[:, :, :, :, None], DTYPE)
    return parts, zeros


@triton.jit
def _multiply(words, x, scaling, acc, WIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Add the products of 16 channels; see ``codes.dot_operand``."""
    W: tl.constexpr = WIDE.words
    # [4, 8, W, 2, 2]: pairs of channels in neighbouring registers.
    pairs = tl.permute(tl.reshape(words, (4, 8, 2, 2, W)), (0, 1, 4, 2, 3))
    even, odd = tl.split(pairs)
    pairs = tl.join(even, odd)
    if WIDE.code == INT4:
        s, z = scaling
        c = unpack_int4(pairs, DTYPE)
        codes = scale_eight(c, z, s, DTYPE)
        codes = tl.permute(codes, (2, 7, 6, 5, 1, 0, 3, 4))
        first = tl.reshape(codes, (W * 64, STEP))
    else:
        c = unpack_fp8(pairs, DTYPE)
        c0 = rescale_fp8(c[0], DTYPE)
        c1 = rescale_fp8(c[1], DTYPE)
        c2 = rescale_fp8(c[2], DTYPE)
        c3 = rescale_fp8(c[3], DTYPE)
        codes = tl.join(tl.join(c0, c1), tl.join(c2, c3))
        codes = tl.permute(codes, (2, 6, 5, 1, 0, 3, 4))
        first = tl.reshape(codes, (W * 32, STEP))
    # [4, 8, TOKENS / 8, 4]
    second = tl.reshape(tl.permute(x, (0, 3, 2, 1)), (STEP, WIDE.tokens)).to(DTYPE)
    return tl.dot(first, second, acc, input_precision="ieee")
