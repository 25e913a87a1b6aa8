# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: sums that skip the unwanted channels in place."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .channels import wanted_channels
from .tiles import load_tile


@triton.jit
def sum_masked(
    x,
    threshold_ptr,
    matrix,
    tokens,
    columns,
    split,
    DROPPED: tl.constexpr,
    TILING: tl.constexpr,
):
    """Column sums of BLOCK_M tokens on the vector units: float32 [BLOCK_M, BLOCK_N].

    Does not wait for a list, which pays if there is little to read. An iteration reads
    ROWS x PASSES channels. All threads together read ROWS with one 16-byte load each,
    so the sum over PASSES stays inside a thread; threads synchronise once, after the
    loop. Splits interleave, so that at any time all programs read one stretch of
    memory.
    """
    BLOCK_M: tl.constexpr = TILING.block_m
    BLOCK_N: tl.constexpr = TILING.block_n
    ROWS: tl.constexpr = TILING.rows
    PASSES: tl.constexpr = TILING.block_k // TILING.rows
    # [ROWS, PASSES]: a thread's channels are adjacent, to read x in one piece.
    # PASSES comes after ROWS because Triton spreads warps over the leading dimensions.
    rows = tl.arange(0, ROWS)[:, None] * PASSES + tl.arange(0, PASSES)[None, :]
    mask_m = (tokens.offsets < tokens.end)[:, None, None]
    mask_n = (columns.offsets < columns.end)[None, None, None, :]
    x_row_ptr = x.ptr + tokens.offsets.to(tl.int64)[:, None, None] * x.stride_m
    step: tl.constexpr = ROWS * PASSES
    offs_k = split.index * step + rows
    mask_k = offs_k < x.k
    if TILING.pdl:
        # Into L2 only, volatile to be issued at all: no value is used before the wait.
        tl.load(threshold_ptr + offs_k, mask=mask_k, volatile=True)
        gdc_wait()
    value = tl.load(x_row_ptr + offs_k[None, :, :], mask=mask_m & mask_k, other=0.0)
    threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
    acc = tl.zeros([BLOCK_M, ROWS, BLOCK_N], dtype=tl.float32)
    for _ in range(split.index * step, x.k, split.count * step):
        # [BLOCK_M, ROWS, PASSES]
        wide_value = value.to(tl.float32)
        wanted = wanted_channels(wide_value, threshold[None, :, :], DROPPED)
        wanted &= mask_m & mask_k[None, :, :]
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        # [1, ROWS, PASSES, BLOCK_N]: of the product's rank, or Triton moves the tile
        # between layouts through shared memory.
        tile = load_tile(
            matrix,
            offs_k[None, :, :, None],
            columns.offsets[None, None, None, :],
            read[None, :, :, None] & mask_n,
            TILING.wide,
        )
        # An unwanted x may be infinite, and infinity times the tile's zero is NaN.
        factor = tl.where(wanted, wide_value, 0.0)
        # x and thresholds of the next iteration are loaded along with these rows.
        offs_k += split.count * step
        mask_k = offs_k < x.k
        value = tl.load(x_row_ptr + offs_k[None, :, :], mask=mask_m & mask_k, other=0.0)
        threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
        acc += tl.sum(factor[:, :, :, None] * tile.to(tl.float32), axis=2)
    return tl.sum(acc, axis=1)


@triton.jit
def dot_masked(
    x,
    threshold_ptr,
    matrix,
    tokens,
    columns,
    split,
    DROPPED: tl.constexpr,
    TILING: tl.constexpr,
):
    """Column sums of up to BLOCK_M tokens on the matrix units: [BLOCK_M, BLOCK_N].

    Each token has its own mask; a channel is read when any of the tokens wants it.
    """
    BLOCK_M: tl.constexpr = TILING.block_m
    BLOCK_N: tl.constexpr = TILING.block_n
    BLOCK_K: tl.constexpr = TILING.block_k
    STAGES: tl.constexpr = TILING.stages
    mask_m = (tokens.offsets < tokens.end)[:, None]
    mask_n = (columns.offsets < columns.end)[None, :]
    x_row_ptr = x.ptr + tokens.offsets.to(tl.int64)[:, None] * x.stride_m
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if TILING.pdl:
        gdc_wait()
    for start_k in tl.range(
        split.index * BLOCK_K, x.k, split.count * BLOCK_K, num_stages=STAGES
    ):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < x.k
        mask_x = mask_m & mask_k[None, :]
        value = tl.load(x_row_ptr + offs_k[None, :], mask=mask_x, other=0.0)
        threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
        wanted = wanted_channels(value, threshold[None, :], DROPPED) & mask_x
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        tile = load_tile(
            matrix,
            offs_k[:, None],
            columns.offsets[None, :],
            read[:, None] & mask_n,
            TILING.wide,
        )
        value = tl.where(wanted, value, 0.0)
        if TILING.widen:
            value = value.to(tl.float32)
        # "ieee": float32 inputs would be rounded to tf32 otherwise.
        acc = tl.dot(value, tile.to(value.dtype), acc, input_precision="ieee")
    return acc
