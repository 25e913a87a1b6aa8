# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The two launches: sums over channels, and what finishes them.

Programmatic dependent launch (PDL): a program signals that the next launch may start
once its own reads are done (earlier, and waiting programs crowd out working ones:
kernels/README.md), and waits for the previous launch before it uses anything that it
reads or writes (``list_channels``, ``sum_masked``, ``dot_masked``). Every program
waits, so a launch never completes before all earlier ones have.

Rows of the workspace are counted in 32 bits, since 2^31 of them fit into no memory;
what is multiplied by the length of a row is 64 bits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .sums import count_tiles, store_factor_tile, store_partial, sum_channels
from .tiles import Lists, Range, Split, locate_tile


@triton.jit
def sums_kernel(
    x,
    weight,
    v,
    threshold_ptr,
    constants,
    out_ptr,
    partial_ptr,
    lists,
    tokens,
    n,
    rank_columns,
    shard_sizes,
    ranks,
    TILING: tl.constexpr,
    FACTOR_TILING: tl.constexpr,
):
    """One column tile of W (or V^T) over one part of the channels.

    Args:
        x: the ``Input``.
        weight, v: the ``Matrix`` of each; v's pointer is None without factors.
        threshold_ptr: float32 [S, K].
        constants: the ``Constants``, used where the output is written.
        out_ptr: [tokens, n], written where partial_ptr is None.
        partial_ptr: float32 [splits, tokens, rank_columns + n], or None.
        lists: ``Lists`` of all programs.
        tokens, n, rank_columns: sizes.
        shard_sizes, ranks: tuples, one number a shard.
        TILING: of tiles of W.
        FACTOR_TILING: of tiles of V^T; None without factors.
    """
    BLOCK_M: tl.constexpr = TILING.block_m
    BLOCK_N: tl.constexpr = TILING.block_n
    tile = tl.program_id(0)
    split = Split(tl.program_id(1), tl.num_programs(1))
    group_m = tl.program_id(2)
    offs_m = group_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = Range(offs_m, tokens)
    if TILING.channels is not None:
        # This program's part of the workspace.
        length: tl.constexpr = TILING.channels + TILING.block_k
        program = (group_m * split.count + split.index).to(tl.int64)
        program = program * tl.num_programs(0) + tile
        lists = Lists(
            lists.channel_ptr + program * length,
            lists.value_ptr + program * length * BLOCK_M,
        )
    factor_tiles = 0
    if FACTOR_TILING is not None:
        factor_tiles = count_tiles(ranks, FACTOR_TILING.block_n)
        if tile < factor_tiles:
            store_factor_tile(
                x,
                threshold_ptr,
                v,
                lists,
                tile,
                rows,
                split,
                ranks,
                partial_ptr,
                rank_columns + n,
                TILING=FACTOR_TILING,
            )
            return
    shard, begin_n, end_n = locate_tile(tile - factor_tiles, 0, shard_sizes, BLOCK_N)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    y = sum_channels(
        x,
        threshold_ptr + shard.to(tl.int64) * x.k,
        weight,
        lists,
        rows,
        Range(offs_n, end_n),
        split,
        DROPPED=False,
        TILING=TILING,
    )
    if TILING.pdl:
        gdc_launch_dependents()
    if partial_ptr is None:
        mask_n = offs_n < end_n
        mask = (offs_m < tokens)[:, None] & mask_n[None, :]
        if constants.scale_ptr is not None:
            y *= tl.load(constants.scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        y += column_constants(constants, offs_n, mask_n)[None, :]
        out = out_ptr + offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        columns = Range(offs_n, end_n)
        store_partial(
            partial_ptr, y, split, rows, columns, rank_columns, rank_columns + n
        )


@triton.jit
def finish_kernel(
    partial_ptr,
    u,
    constants,
    out_ptr,
    splits,
    tokens,
    n,
    rank_columns,
    shard_sizes,
    ranks,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add a column tile's partial sums, always in the same order, and its U z.

    Args:
        partial_ptr: float32 [splits, tokens, rank_columns + n].
        u: a ``Matrix`` whose rows are the ranks; its pointer is None without factors.
        constants: the ``Constants``.
        out_ptr: [tokens, n].
        splits, tokens, n, rank_columns: sizes.
        shard_sizes, ranks: tuples, one number a shard.
        SPLITS_BLOCK: splits, as a power of two.
        BLOCK_N: columns of a program.
        BLOCK_R: ranks that are multiplied at a time.
        PDL: programmatic dependent launch.
    """
    shard, begin_n, end_n = locate_tile(tl.program_id(0), 0, shard_sizes, BLOCK_N)
    token = tl.program_id(1).to(tl.int64)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end_n
    if u.ptr is not None:
        rank = 0
        first_rank = 0
        seen = 0
        for index in tl.static_range(len(ranks)):
            rank = tl.where(shard == index, ranks[index], rank)
            first_rank = tl.where(shard == index, seen, first_rank)
            seen += ranks[index]
        # Before the wait: the launch before this one is sums_kernel, which has itself
        # waited for whatever may have written U.
        u_rows = _load_u(u, 0, rank, offs_n, mask_n, BLOCK_R)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # [SPLITS_BLOCK, 1]: where each split's sums of this token begin.
    offs_s = tl.arange(0, SPLITS_BLOCK)[:, None]
    mask_s = offs_s < splits
    row_ptr = partial_ptr + (offs_s * tokens + token) * (rank_columns + n)
    y = column_constants(constants, offs_n, mask_n)
    parts = tl.load(
        row_ptr + rank_columns + offs_n[None, :],
        mask=mask_s & mask_n[None, :],
        other=0.0,
    )
    total = tl.sum(parts, axis=0)
    if constants.scale_ptr is not None:
        total *= tl.load(constants.scale_ptr + offs_n, mask=mask_n, other=0.0)
    y += total
    if u.ptr is not None:
        z_ptr = row_ptr + first_rank
        y += _multiply_u(z_ptr, 0, rank, mask_s, u_rows, BLOCK_R)
        for start_r in range(BLOCK_R, rank, BLOCK_R):
            u_rows = _load_u(u, start_r, rank, offs_n, mask_n, BLOCK_R)
            y += _multiply_u(z_ptr, start_r, rank, mask_s, u_rows, BLOCK_R)
    tl.store(out_ptr + token * n + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def finish_dense_kernel(
    partial_ptr,
    row_scale_ptr,
    constants,
    out_ptr,
    splits,
    tokens,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """``finish_kernel`` without factors, for a block of tokens and columns.

    A program of one token and 64 columns spends its time on being launched: with 64
    tokens there would be 28,672 of them for gate_up of Llama-3-8B.

    Args:
        partial_ptr: float32 [splits, tokens, n].
        row_scale_ptr: float32 [tokens] that multiply a token's sums, or None.
        constants: the ``Constants``.
        out_ptr: [tokens, n].
        splits, tokens, n: sizes.
        BLOCK_M, BLOCK_N: tokens and columns of a program.
        AT_ONCE: splits whose sums are in flight together.
        PDL: programmatic dependent launch.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_n = offs_n < n
    mask = (offs_m < tokens)[:, None] & mask_n[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for begin in range(0, splits, AT_ONCE):
        for index in tl.static_range(AT_ONCE):
            # A tensor, also where the interpreter counts with Python's own integers.
            split = tl.program_id(0) * 0 + begin + index
            rows = split * tokens + offs_m
            live = tl.broadcast_to(split, (1, 1)) < splits
            total += tl.load(
                partial_ptr + rows[:, None] * n + offs_n[None, :],
                mask=mask & live,
                other=0.0,
            )
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + offs_m, mask=offs_m < tokens, other=0.0)
        total *= scale[:, None]
    if constants.scale_ptr is not None:
        scale = tl.load(constants.scale_ptr + offs_n, mask=mask_n, other=0.0)
        total *= scale[None, :]
    total += column_constants(constants, offs_n, mask_n)[None, :]
    out_ptr += offs_m[:, None] * n + offs_n[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_u(u, start_r, rank, offs_n, mask_n, BLOCK_R: tl.constexpr):
    """Rows [start_r, start_r + BLOCK_R) of U's storage: [BLOCK_R, BLOCK_N]."""
    offs_r = start_r + tl.arange(0, BLOCK_R)
    offsets = offs_r.to(tl.int64)[:, None] * u.stride_k
    offsets += offs_n.to(tl.int64)[None, :] * u.stride_n
    mask = (offs_r < rank)[:, None] & mask_n[None, :]
    return tl.load(u.ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _multiply_u(z_ptr, start_r, rank, mask_s, u_rows, BLOCK_R: tl.constexpr):
    """Add up the splits' parts of z, then U z: float32 [BLOCK_N]."""
    offs_r = (start_r + tl.arange(0, BLOCK_R))[None, :]
    parts = tl.load(z_ptr + offs_r, mask=mask_s & (offs_r < rank), other=0.0)
    z = tl.sum(parts, axis=0)
    return tl.sum(z[:, None] * u_rows.to(tl.float32), axis=0)


@triton.jit
def column_constants(constants, offs_n, mask_n):
    """What is added to a column for every token: correction and bias, each optional."""
    total = tl.zeros(offs_n.shape, dtype=tl.float32)
    if constants.correction_ptr is not None:
        total += tl.load(constants.correction_ptr + offs_n, mask=mask_n, other=0.0)
    if constants.bias_ptr is not None:
        bias = tl.load(constants.bias_ptr + offs_n, mask=mask_n, other=0.0)
        total += bias.to(tl.float32)
    return total
