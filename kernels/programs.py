# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The two launches: sums over channels, and what finishes them.

Programmatic dependent launch (PDL): a program signals that the next launch may start
once its own reads are done (earlier, and waiting programs crowd out working ones:
kernels/README.md), and waits for the previous launch before it uses anything that it
reads or writes (``list_channels``, ``sum_masked``, ``dot_masked``). Every program
waits, so a launch never completes before all earlier ones have.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .sums import sum_channels
from .tiles import locate_tile


@triton.jit
def sums_kernel(
    x_ptr,
    weight_ptr,
    threshold_ptr,
    v_ptr,
    correction_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    list_ptr,
    value_ptr,
    tokens,
    n,
    k,
    rank_columns,
    stride_xm,
    stride_wk,
    stride_vk,
    stride_vr,
    shard_sizes,
    ranks,
    SHARDS: tl.constexpr,
    FACTORS: tl.constexpr,
    DIRECT: tl.constexpr,
    USE_DOT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_BLOCK_N: tl.constexpr,
    RANK_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One column tile of W (or V^T) over one part of the channels."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    group_m = tl.program_id(2)
    offs_m = group_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if LISTED:
        # This program's part of the workspace.
        program = (group_m * splits + split).to(tl.int64) * tl.num_programs(0) + tile
        list_ptr += program * (CHANNELS + BLOCK_K)
        value_ptr += program * (CHANNELS + BLOCK_K) * BLOCK_M
    factor_tiles = 0
    if FACTORS:
        for index in tl.static_range(SHARDS):
            factor_tiles += tl.cdiv(ranks[index], RANK_BLOCK_N)
        if tile < factor_tiles:
            shard, begin_n, end_n = locate_tile(tile, 0, ranks, SHARDS, RANK_BLOCK_N)
            offs_n = begin_n + tl.arange(0, RANK_BLOCK_N)
            z = sum_channels(
                x_ptr,
                threshold_ptr + shard.to(tl.int64) * k,
                v_ptr,
                list_ptr,
                value_ptr,
                stride_xm,
                stride_vk,
                stride_vr,
                offs_m,
                tokens,
                offs_n,
                end_n,
                k,
                split,
                splits,
                DROPPED=True,
                USE_DOT=USE_DOT,
                LISTED=LISTED,
                BLOCK_M=BLOCK_M,
                BLOCK_N=RANK_BLOCK_N,
                BLOCK_K=BLOCK_K,
                ROWS=RANK_ROWS,
                CHANNELS=CHANNELS,
                EVEN_N=False,
                STAGES=STAGES,
                DOT_DTYPE=DOT_DTYPE,
                WIDE=WIDE,
                PDL=PDL,
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
    shard, begin_n, end_n = locate_tile(
        tile - factor_tiles, 0, shard_sizes, SHARDS, BLOCK_N
    )
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    y = sum_channels(
        x_ptr,
        threshold_ptr + shard.to(tl.int64) * k,
        weight_ptr,
        list_ptr,
        value_ptr,
        stride_xm,
        stride_wk,
        1,
        offs_m,
        tokens,
        offs_n,
        end_n,
        k,
        split,
        splits,
        DROPPED=False,
        USE_DOT=USE_DOT,
        LISTED=LISTED,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
        EVEN_N=EVEN_N,
        STAGES=STAGES,
        DOT_DTYPE=DOT_DTYPE,
        WIDE=WIDE,
        PDL=PDL,
    )
    if PDL:
        gdc_launch_dependents()
    mask_n = offs_n < end_n
    mask = (offs_m < tokens)[:, None] & mask_n[None, :]
    if DIRECT:
        y += _column_constants(correction_ptr, bias_ptr, offs_n, mask_n)[None, :]
        out = out_ptr + offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        row = (split * tokens + offs_m[:, None]).to(tl.int64)
        column = rank_columns + offs_n[None, :]
        tl.store(partial_ptr + row * (rank_columns + n) + column, y, mask=mask)


@triton.jit
def finish_kernel(
    partial_ptr,
    u_ptr,
    correction_ptr,
    bias_ptr,
    out_ptr,
    splits,
    tokens,
    n,
    rank_columns,
    stride_un,
    stride_ur,
    shard_sizes,
    ranks,
    SHARDS: tl.constexpr,
    FACTORS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add a column tile's partial sums, always in the same order, and its U z."""
    shard, begin_n, end_n = locate_tile(
        tl.program_id(0), 0, shard_sizes, SHARDS, BLOCK_N
    )
    token = tl.program_id(1).to(tl.int64)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < end_n
    if FACTORS:
        rank = 0
        first_rank = 0
        seen = 0
        for index in tl.static_range(SHARDS):
            rank = tl.where(shard == index, ranks[index], rank)
            first_rank = tl.where(shard == index, seen, first_rank)
            seen += ranks[index]
        # Before the wait: the launch before this one is sums_kernel, which has itself
        # waited for whatever may have written U.
        u = _load_u(u_ptr, 0, rank, offs_n, mask_n, stride_un, stride_ur, BLOCK_R)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # [SPLITS_BLOCK, 1]: where each split's sums of this token begin.
    offs_s = tl.arange(0, SPLITS_BLOCK)[:, None]
    mask_s = offs_s < splits
    row_ptr = partial_ptr + (offs_s * tokens + token) * (rank_columns + n)
    y = _column_constants(correction_ptr, bias_ptr, offs_n, mask_n)
    parts = tl.load(
        row_ptr + rank_columns + offs_n[None, :],
        mask=mask_s & mask_n[None, :],
        other=0.0,
    )
    y += tl.sum(parts, axis=0)
    if FACTORS:
        z_ptr = row_ptr + first_rank
        y += _multiply_u(z_ptr, 0, rank, mask_s, u, BLOCK_R)
        for start_r in range(BLOCK_R, rank, BLOCK_R):
            u = _load_u(
                u_ptr, start_r, rank, offs_n, mask_n, stride_un, stride_ur, BLOCK_R
            )
            y += _multiply_u(z_ptr, start_r, rank, mask_s, u, BLOCK_R)
    tl.store(out_ptr + token * n + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _load_u(
    u_ptr, start_r, rank, offs_n, mask_n, stride_un, stride_ur, BLOCK_R: tl.constexpr
):
    """Rows [start_r, start_r + BLOCK_R) of U's storage: [BLOCK_R, BLOCK_N]."""
    offs_r = start_r + tl.arange(0, BLOCK_R)
    offsets = offs_r.to(tl.int64)[:, None] * stride_ur
    offsets += offs_n.to(tl.int64)[None, :] * stride_un
    mask = (offs_r < rank)[:, None] & mask_n[None, :]
    return tl.load(u_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _multiply_u(z_ptr, start_r, rank, mask_s, u, BLOCK_R: tl.constexpr):
    """Add up the splits' parts of z, then U z: float32 [BLOCK_N]."""
    offs_r = (start_r + tl.arange(0, BLOCK_R))[None, :]
    parts = tl.load(z_ptr + offs_r, mask=mask_s & (offs_r < rank), other=0.0)
    z = tl.sum(parts, axis=0)
    return tl.sum(z[:, None] * u.to(tl.float32), axis=0)


@triton.jit
def _column_constants(correction_ptr, bias_ptr, offs_n, mask_n):
    """What every token of a column gets: correction and bias, each optional."""
    total = tl.zeros(offs_n.shape, dtype=tl.float32)
    if correction_ptr is not None:
        total += tl.load(correction_ptr + offs_n, mask=mask_n, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
        total += bias.to(tl.float32)
    return total
