# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: sums over channels of int4 and fp8 weights on the matrix units.

A program is one warp. It multiplies the words that its threads load, without a detour
through shared memory: columns are the rows of the first operand, tokens the columns of
the second (``codes.dot_operand``).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import INT4, natural_order
from .group_list import STEP, list_groups
from .packed_steps import sum_steps
from .sums import sum_channels
from .tiles import Input, Range, Split, locate_tile


@triton.jit
def packed_kernel(
    x_ptr,
    word_ptr,
    scale_ptr,
    zero_ptr,
    threshold_ptr,
    v,
    partial_ptr,
    row_ptr,
    value_ptr,
    head_ptr,
    second_ptr,
    tokens,
    n,
    k,
    pitch,
    rank_columns,
    stride_xm,
    shard_sizes,
    ranks,
    CODE: tl.constexpr,
    PLANES: tl.constexpr,
    SPARSE: tl.constexpr,
    TOKENS: tl.constexpr,
    W: tl.constexpr,
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCKS: tl.constexpr,
    FACTOR_TILING: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One column tile of W (or V^T) over one part of the channels, into a workspace.

    Args of note:
        word_ptr: int32 [K, pitch].
        v: the ``Matrix`` of V; its pointer is None without factors.
        CODE: the format; that of a plane, where there are several.
        PLANES: planes of the weight, one after the other, like their thresholds: 1, or
            2 of int4. Both are listed and summed in one go, block by block.
        SPARSE: read the channels that thresholds keep; otherwise all of them.
        W: words of a row that a thread loads at once; the tile has 8 W of them.
        ROUND: steps of 16 channels whose words are in flight together, 1, 2 or 4.
        GROUP: channels that share a row of scales, 0 for scales per column, which
            ``finish_kernel`` applies.
        SPAN: channels of one block; a program takes blocks in turns with the splits.
        BLOCKS: most blocks of a program, a power of two.
        FACTOR_TILING: of tiles of V^T, masked; None without factors.
        ALIGNED: every tile begins at a multiple of W words, for 4 W-byte loads.
    """
    group_m = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    factor_tiles = 0
    if FACTOR_TILING is not None:
        RANK_BLOCK_N: tl.constexpr = FACTOR_TILING.block_n
        offs_m = group_m * TOKENS + tl.arange(0, TOKENS)
        for index in tl.static_range(len(ranks)):
            factor_tiles += tl.cdiv(ranks[index], RANK_BLOCK_N)
        if tile < factor_tiles:
            shard, begin_n, end_n = locate_tile(tile, 0, ranks, RANK_BLOCK_N)
            offs_n = begin_n + tl.arange(0, RANK_BLOCK_N)
            z = sum_channels(
                Input(x_ptr, stride_xm, k),
                threshold_ptr + shard.to(tl.int64) * k,
                v,
                None,
                Range(offs_m, tokens),
                Range(offs_n, end_n),
                Split(split, splits),
                DROPPED=True,
                TILING=FACTOR_TILING,
            )
            if PDL:
                gdc_launch_dependents()
            row = (split * tokens + offs_m[:, None]).to(tl.int64)
            tl.store(
                partial_ptr + row * (rank_columns + n) + offs_n[None, :],
                z,
                mask=(offs_m < tokens)[:, None] & (offs_n < end_n)[None, :],
            )
            return
    program = (group_m * splits + split).to(tl.int64) * tl.num_programs(1) + tile
    codes_per_word: tl.constexpr = 8 if CODE == INT4 else 4
    columns: tl.constexpr = 8 * W * codes_per_word
    shard, begin_n, end_n = locate_tile(tile - factor_tiles, 0, shard_sizes, columns)
    begin_word = begin_n // codes_per_word
    if ALIGNED:
        begin_n = tl.multiple_of(begin_n, W * codes_per_word)
        begin_word = tl.multiple_of(begin_word, W)
    spread: tl.constexpr = TOKENS <= 4
    kept_slots: tl.constexpr = 4 if spread else TOKENS
    length: tl.constexpr = BLOCKS * PLANES * SPAN
    if SPARSE:
        row_ptr += program * length
        value_ptr += program * (length * TOKENS)
        head_ptr += program * (length // STEP)
        if second_ptr is not None:
            second_ptr += program * (length // STEP * TOKENS)
        steps = list_groups(
            x_ptr,
            threshold_ptr + shard.to(tl.int64) * k,
            row_ptr,
            value_ptr,
            head_ptr,
            second_ptr,
            stride_xm,
            group_m * TOKENS,
            tokens,
            k,
            len(shard_sizes) * k,
            split,
            splits,
            PLANES=PLANES,
            SPAN=SPAN,
            BLOCKS=BLOCKS,
            TOKENS=TOKENS,
            PDL=PDL,
        )
    else:
        blocks = tl.cdiv(tl.cdiv(k, SPAN) - split, splits)
        steps = blocks * (PLANES * SPAN // STEP)
        if PDL:
            gdc_wait()
    sums = sum_steps(
        x_ptr,
        word_ptr + begin_word,
        scale_ptr,
        zero_ptr,
        row_ptr,
        value_ptr,
        head_ptr,
        second_ptr,
        steps,
        begin_n,
        end_n,
        n,
        k,
        pitch,
        stride_xm,
        group_m * TOKENS,
        tokens,
        split,
        splits,
        CODE=CODE,
        PLANES=PLANES,
        SPARSE=SPARSE,
        TOKENS=TOKENS,
        SPREAD=spread,
        W=W,
        ROUND=ROUND,
        GROUP=GROUP,
        SPAN=SPAN,
        LENGTH=length,
        EVEN_N=EVEN_N,
        EVEN_K=EVEN_K,
        DTYPE=DTYPE,
    )
    if PDL:
        gdc_launch_dependents()
    # Back to the natural order of columns: [8, columns / 8, tokens].
    sums = natural_order(sums, columns, kept_slots)
    offs_n = begin_n + (tl.arange(0, 8) * (columns // 8))[:, None, None]
    offs_n = offs_n + tl.arange(0, columns // 8)[None, :, None]
    slot = tl.arange(0, kept_slots)[None, None, :]
    offs_m = group_m * TOKENS + slot
    row = (split * tokens + offs_m).to(tl.int64)
    tl.store(
        partial_ptr + row * (rank_columns + n) + rank_columns + offs_n,
        sums,
        mask=(slot < TOKENS) & (offs_m < tokens) & (offs_n < end_n),
    )
