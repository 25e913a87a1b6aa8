# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: sums over channels of int4 and fp8 weights on the matrix units.

Each warp of a program multiplies the words that its threads load, without a detour
through shared memory: columns are the rows of the first operand, tokens the columns of
the second (``codes.dot_operand``). The warps have different columns and one list.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import natural_order
from .group_list import list_groups
from .packed_integers import load_scales
from .packed_steps import sum_steps
from .packing import STEP, UNIT_ROWS, Bounds, GroupLists, Words
from .sums import count_tiles, store_factor_tile
from .tiles import Range, Split, locate_tile


@triton.jit
def packed_kernel(
    x,
    words,
    scales,
    threshold_ptr,
    v,
    partial_ptr,
    lists,
    tokens,
    rank_columns,
    shard_sizes,
    ranks,
    PACKING: tl.constexpr,
    FACTOR_TILING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One column tile of W (or V^T) over one part of the channels, into a workspace.

    Args of note:
        words: the ``Words`` of W.
        scales: the ``Scales`` of W; per column, the pointer is None.
        v: the ``Matrix`` of V; its pointer is None without factors.
        lists: the ``GroupLists`` of all programs; all None where nothing is listed.
        FACTOR_TILING: of tiles of V^T, masked; None without factors.
        DTYPE: of the operands that are multiplied.
    """
    TOKENS: tl.constexpr = PACKING.tokens
    group_m = tl.program_id(0)
    tile = tl.program_id(1)
    split = Split(tl.program_id(2), tl.num_programs(2))
    n = scales.n
    factor_tiles = 0
    if FACTOR_TILING is not None:
        factor_tiles = count_tiles(ranks, FACTOR_TILING.block_n)
        if tile < factor_tiles:
            store_factor_tile(
                x,
                threshold_ptr,
                v,
                None,
                tile,
                Range(group_m * TOKENS + tl.arange(0, TOKENS), tokens),
                split,
                ranks,
                partial_ptr,
                rank_columns + n,
                TILING=FACTOR_TILING,
            )
            return
    COLUMNS: tl.constexpr = PACKING.columns
    WORDS: tl.constexpr = PACKING.words
    GROUPED: tl.constexpr = PACKING.grouped
    INTEGER: tl.constexpr = PACKING.integer
    KEPT_SLOTS: tl.constexpr = 4 if PACKING.spread else PACKING.tokens
    shard, begin_n, end_n = locate_tile(tile - factor_tiles, 0, shard_sizes, COLUMNS)
    # Columns of a thread, of a word and of a warp.
    WIDTH: tl.constexpr = COLUMNS // PACKING.warps // 8
    begin_word = begin_n // (WIDTH // WORDS)
    if PACKING.aligned:
        begin_n = tl.multiple_of(begin_n, WIDTH)
        begin_word = tl.multiple_of(begin_word, WORDS)
    mine = Bounds(group_m * TOKENS, tokens)
    early = ()
    if PACKING.sparse:
        LENGTH: tl.constexpr = PACKING.length
        UNIT: tl.constexpr = UNIT_ROWS if GROUPED else STEP
        if INTEGER:
            early = load_scales(
                scales, Bounds(begin_n, end_n), split, x.k, True, PACKING
            )
        program = (group_m * split.count + split.index).to(tl.int64)
        program = program * tl.num_programs(1) + tile
        second_ptr = lists.second_ptr
        if second_ptr is not None:
            second_ptr += program * (LENGTH // STEP * TOKENS)
        block_ptr = lists.block_ptr
        if block_ptr is not None:
            block_ptr += program * (3 * PACKING.blocks * TOKENS)
        lists = GroupLists(
            lists.row_ptr + program * LENGTH,
            lists.value_ptr + program * (LENGTH * TOKENS),
            lists.head_ptr + program * (LENGTH // UNIT),
            second_ptr,
            block_ptr,
        )
        steps = list_groups(
            x,
            threshold_ptr + shard.to(tl.int64) * x.k,
            len(shard_sizes) * x.k,
            lists,
            mine,
            split,
            PACKING,
            DTYPE,
        )
    else:
        SPAN: tl.constexpr = PACKING.span
        PLANES: tl.constexpr = PACKING.planes
        blocks = tl.cdiv(tl.cdiv(x.k, SPAN) - split.index, split.count)
        steps = blocks * (PLANES * SPAN // STEP)
        if PACKING.pdl:
            gdc_wait()
    sums = sum_steps(
        x,
        Words(words.ptr + begin_word, words.pitch),
        scales,
        lists,
        steps,
        Bounds(begin_n, end_n),
        mine,
        split,
        early,
        PACKING,
        DTYPE,
    )
    if PACKING.pdl:
        gdc_launch_dependents()
    # Back to the natural order of columns: [warps, 8, columns of a thread, tokens].
    sums = natural_order(sums, 8 * WIDTH, KEPT_SLOTS)
    lane = tl.arange(0, 8)[None, :, None, None]
    offs_n = (tl.arange(0, PACKING.warps)[:, None, None, None] * 8 + lane) * WIDTH
    offs_n = begin_n + offs_n + tl.arange(0, WIDTH)[None, None, :, None]
    slot = tl.arange(0, KEPT_SLOTS)[None, None, None, :]
    offs_m = group_m * TOKENS + slot
    row = (split.index * tokens + offs_m).to(tl.int64)
    tl.store(
        partial_ptr + row * (rank_columns + n) + rank_columns + offs_n,
        sums,
        mask=(slot < TOKENS) & (offs_m < tokens) & (offs_n < end_n),
    )
