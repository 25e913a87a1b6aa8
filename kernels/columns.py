# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: all channels of int4 and fp8 weights on a warpgroup's matrix units.

Columns of the weight are the rows of the first operand, which Hopper's ``wgmma`` takes
from registers: words go from memory through the registers that unpack them to the
matrix units, as in ``packed_wide.py``. The second operand is a tile of x in shared
memory, which all warps of the program read.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import FP8, FP8_BLOCK, INT8_PLANES
from .columns_operands import operand_of_bytes, operand_of_nibbles
from .packed_scales import SCALE_BLOCK
from .packed_wide import hide_order
from .programs import column_constants
from .tiles import prefetch


class Columns(NamedTuple):
    """Constants of a compiled program; numbers, for the reason of ``Tiling``.

    Attributes:
        code: the format.
        tokens: of a program.
        warps: of a program, 4 or 8.
        words: words of a row that a thread multiplies, 1, 2 or 4.
        codes: of a word, 4 or 8.
        channels: of an iteration.
        stages: iterations whose loads are in flight. With 1, a thread loads its words
            into registers; with more, they pass through shared memory.
        group: channels that share scales; 0 for scales per column.
        pdl: programmatic dependent launch.
        ahead: iterations whose words are asked for while the launch before ends.
    """

    code: int
    tokens: int
    warps: int
    words: int
    codes: int
    channels: int
    stages: int
    group: int
    pdl: bool
    ahead: int


@triton.jit
def columns_kernel(
    x,
    words,
    words_n,
    scales,
    constants,
    out_ptr,
    partial_ptr,
    tokens,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums of a column tile over one part of the channels.

    Neighbouring programs take the same words for other tokens.

    Args:
        x: the ``Input``.
        words: the ``Words``.
        words_n: of a row.
        scales: the ``Scales``; of fp8, the pointers are None.
        constants: the ``Constants``, used where the output is written.
        out_ptr: [tokens, n], written where partial_ptr is None.
        partial_ptr: float32 [splits, tokens, n], or None.
        tokens: rows of x.
        COLUMNS: the ``Columns``.
        DTYPE: of the operands that are multiplied.
    """
    TOKENS: tl.constexpr = COLUMNS.tokens
    WARPS: tl.constexpr = COLUMNS.warps
    W: tl.constexpr = COLUMNS.words
    CHANNELS: tl.constexpr = COLUMNS.channels
    CODES: tl.constexpr = COLUMNS.codes
    WIDTH: tl.constexpr = 8 * WARPS * W * CODES
    begin_m = tl.program_id(0) * TOKENS
    begin_n = tl.program_id(1) * WIDTH
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    offs_m = begin_m + tl.arange(0, TOKENS)
    offs_n = begin_n + tl.arange(0, WIDTH)
    mask_m = offs_m < tokens
    mask_n = offs_n < scales.n
    x_ptr = x.ptr + offs_m.to(tl.int64)[:, None] * x.stride_m
    acc = tl.zeros([WIDTH, TOKENS], dtype=tl.float32)
    if COLUMNS.pdl:
        _fetch_ahead(words, split, splits, begin_n // CODES, words_n, x.k, COLUMNS)
        gdc_wait()
    for first in tl.range(
        split * CHANNELS, x.k, splits * CHANNELS, num_stages=COLUMNS.stages
    ):
        channel = first + tl.arange(0, CHANNELS)
        mask = mask_m[:, None] & (channel < x.k)[None, :]
        values = tl.load(x_ptr + channel[None, :], mask=mask, other=0.0)
        loaded = _load_words(
            words, first, begin_n // CODES, words_n, x.k, 0, COLUMNS, DTYPE
        )
        if COLUMNS.code == FP8 or COLUMNS.code == FP8_BLOCK:
            operand = operand_of_bytes(loaded, COLUMNS, DTYPE)
        else:
            second = loaded
            if COLUMNS.code == INT8_PLANES:
                second = _load_words(
                    words, first, begin_n // CODES, words_n, x.k, x.k, COLUMNS, DTYPE
                )
            group = first // COLUMNS.group
            operand = operand_of_nibbles(
                loaded, second, scales, group, begin_n, COLUMNS, DTYPE
            )
        values = tl.trans(values).to(DTYPE)
        if COLUMNS.code == FP8_BLOCK:
            # The scale leaves the sum over its block of channels.
            blocks_n = (scales.n + SCALE_BLOCK - 1) // SCALE_BLOCK
            column = begin_n + _column_of_row(tl.arange(0, WIDTH), COLUMNS)
            place = first // COLUMNS.group * blocks_n + column // SCALE_BLOCK
            scale = tl.load(scales.ptr + place, mask=column < scales.n, other=0.0)
            product = tl.dot(operand, values, input_precision="ieee")
            acc += product * scale[:, None]
        else:
            acc = tl.dot(operand, values, acc, input_precision="ieee")
    if COLUMNS.pdl:
        gdc_launch_dependents()
    # To the natural order, see ``_column_of_row``.
    sums = tl.reshape(acc, (W, CODES // 2, WARPS, 2, 8, TOKENS))
    sums = tl.reshape(tl.permute(sums, (2, 4, 0, 1, 3, 5)), (WIDTH, TOKENS))
    sums = tl.trans(sums)
    mask = mask_m[:, None] & mask_n[None, :]
    if partial_ptr is None:
        if constants.scale_ptr is not None:
            scale = tl.load(constants.scale_ptr + offs_n, mask=mask_n, other=0.0)
            sums *= scale[None, :]
        sums += column_constants(constants, offs_n, mask_n)[None, :]
        out = out_ptr + offs_m.to(tl.int64)[:, None] * scales.n + offs_n[None, :]
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        row = (split * tokens + offs_m).to(tl.int64)
        place = partial_ptr + row[:, None] * scales.n + offs_n[None, :]
        tl.store(place, sums, mask=mask)


@triton.jit
def _column_of_row(row, COLUMNS: tl.constexpr):
    """The column of the tile that is this row of the operand and of the sums.

    A warp holds rows r and r + 8 of each 16; a thread's columns lie together in memory.
    """
    WARPS: tl.constexpr = COLUMNS.warps
    CODES: tl.constexpr = COLUMNS.codes
    thread = row // 16 % WARPS * 8 + row % 8
    code = row // (16 * WARPS) * 2 + row // 8 % 2
    return thread * (COLUMNS.words * CODES) + code


@triton.jit
def _fetch_ahead(words, split, splits, begin_word, words_n, k, COLUMNS: tl.constexpr):
    """Bring the first words into L2, which no launch before this one has written."""
    CHANNELS: tl.constexpr = COLUMNS.channels
    AHEAD: tl.constexpr = COLUMNS.ahead
    # 32 words are a line of the cache.
    LINES: tl.constexpr = COLUMNS.warps * COLUMNS.words // 4
    column = begin_word + 32 * tl.arange(0, LINES)
    for index in tl.static_range(AHEAD):
        channel = (split + index * splits) * CHANNELS + tl.arange(0, CHANNELS)
        live = (channel < k)[:, None] & (column < words_n)[None, :]
        place = tl.where(live, channel[:, None] * words.pitch + column[None, :], 0)
        prefetch(words.ptr + place)


@triton.jit
def _load_words(
    words,
    first,
    begin_word,
    words_n,
    k,
    rows_before,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Words of an iteration: int32 [4, 8, warps, steps, 4, W].

    In a step of 16 channels, thread [i, :, :] of four multiplies channels 2 i and
    2 i + 1 of each half: the order in which ``wgmma`` takes x from shared memory.

    Args of note:
        rows_before: of the planes before the one that is loaded.
    """
    WARPS: tl.constexpr = COLUMNS.warps
    W: tl.constexpr = COLUMNS.words
    STEPS: tl.constexpr = COLUMNS.channels // 16
    ptr = words.ptr + rows_before * words.pitch
    if COLUMNS.stages > 1:
        # Rows as they lie in memory, for copies of 16 bytes.
        channel = first + tl.arange(0, COLUMNS.channels)
        column = begin_word + tl.arange(0, 8 * WARPS * W)
        mask = (channel < k)[:, None] & (column < words_n)[None, :]
        pointers = ptr + channel[:, None] * words.pitch + column[None, :]
        loaded = tl.load(pointers, mask=mask, other=0)
        loaded = tl.reshape(loaded, (STEPS, 2, 4, 2, WARPS, 8, W))
        loaded = tl.permute(loaded, (2, 5, 4, 0, 1, 3, 6))
        return tl.reshape(loaded, (4, 8, WARPS, STEPS, 4, W))
    else:
        quad = tl.arange(0, 4)[:, None, None, None, None, None]
        lane = tl.arange(0, 8)[None, :, None, None, None, None]
        warp = tl.arange(0, WARPS)[None, None, :, None, None, None]
        step = tl.arange(0, STEPS)[None, None, None, :, None, None]
        part = tl.arange(0, 4)[None, None, None, None, :, None]
        channel = first + step * 16 + part // 2 * 8 + quad * 2 + part % 2
        place = (warp * 8 + lane) * W
        if W == 1 and tl.float32 != DTYPE:
            place = hide_order(place)
        column = begin_word + place + tl.arange(0, W)[None, None, None, None, None, :]
        return tl.load(
            ptr + channel * words.pitch + column,
            mask=(channel < k) & (column < words_n),
            other=0,
            eviction_policy="evict_first",
        )
