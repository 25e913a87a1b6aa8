# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: which channels to read, and sums over them.

Matrices are stored one input channel a contiguous row, so that a channel nobody needs
is a row that nobody reads. The same sums serve the weight (over kept channels) and the
factor V (over dropped ones, ``DROPPED``).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def load_tile(tile_ptr, offs_k, offs_n, stride_k, stride_n, mask):
    """Elements [offs_k, offs_n] of a stored matrix; zero, and not read, off the mask.

    The one place that knows how weights are stored. A narrower type with a scale per
    output channel is widened here and scaled where the column sums are finished.
    """
    offsets = offs_k.to(tl.int64) * stride_k + offs_n.to(tl.int64) * stride_n
    return tl.load(
        tile_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def wanted_channels(x, threshold, DROPPED: tl.constexpr):
    """Kept is strictly above the threshold, or NaN; DROPPED asks for the rest."""
    dropped = tl.abs(x.to(tl.float32)) <= threshold
    return dropped if DROPPED else ~dropped


@triton.jit
def sum_channels(
    x_ptr,
    threshold_ptr,
    tile_ptr,
    stride_xm,
    stride_k,
    stride_n,
    offs_m,
    end_m,
    offs_n,
    end_n,
    k,
    split,
    splits,
    DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Column sums of BLOCK_M tokens on the vector units: float32 [BLOCK_M, BLOCK_N].

    An iteration reads ROWS x PASSES channels. ROWS is what all threads read with one
    16-byte load each, so the sum over PASSES stays inside a thread; threads meet once,
    after the loop. Splits take turns, so that at any time all programs read one stretch
    of memory.
    """
    # [ROWS, PASSES]: a thread's channels follow one another, to read x in one piece.
    # PASSES comes after ROWS because Triton spreads warps over the leading dimensions.
    rows = tl.arange(0, ROWS)[:, None] * PASSES + tl.arange(0, PASSES)[None, :]
    mask_m = (offs_m < end_m)[:, None, None]
    mask_n = (offs_n < end_n)[None, None, None, :]
    x_row_ptr = x_ptr + offs_m.to(tl.int64)[:, None, None] * stride_xm
    step: tl.constexpr = ROWS * PASSES
    offs_k = split * step + rows
    mask_k = offs_k < k
    if PDL:
        # Into L2 only, volatile to be issued at all: no value is used before the wait.
        tl.load(threshold_ptr + offs_k, mask=mask_k, volatile=True)
        gdc_wait()
    x = tl.load(x_row_ptr + offs_k[None, :, :], mask=mask_m & mask_k, other=0.0)
    threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
    acc = tl.zeros([BLOCK_M, ROWS, BLOCK_N], dtype=tl.float32)
    for _ in range(split * step, k, splits * step):
        # [BLOCK_M, ROWS, PASSES]
        x_wide = x.to(tl.float32)
        wanted = wanted_channels(x_wide, threshold[None, :, :], DROPPED)
        wanted &= mask_m & mask_k[None, :, :]
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        # [1, ROWS, PASSES, BLOCK_N]: of the product's rank, or Triton moves the tile
        # between layouts through shared memory.
        tile = load_tile(
            tile_ptr,
            offs_k[None, :, :, None],
            offs_n[None, None, None, :],
            stride_k,
            stride_n,
            read[None, :, :, None] & mask_n,
        )
        # An unwanted x may be infinite, and infinity times the tile's zero is NaN.
        factor = tl.where(wanted, x_wide, 0.0)
        # What the next iteration needs to choose its rows arrives along with these.
        offs_k += splits * step
        mask_k = offs_k < k
        x = tl.load(x_row_ptr + offs_k[None, :, :], mask=mask_m & mask_k, other=0.0)
        threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
        acc += tl.sum(factor[:, :, :, None] * tile.to(tl.float32), axis=2)
    return tl.sum(acc, axis=1)


@triton.jit
def dot_channels(
    x_ptr,
    threshold_ptr,
    tile_ptr,
    stride_xm,
    stride_k,
    stride_n,
    offs_m,
    end_m,
    offs_n,
    end_n,
    k,
    split,
    splits,
    DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Column sums of up to BLOCK_M tokens on the matrix units: [BLOCK_M, BLOCK_N].

    Each token has its own mask; a channel is read when any of the tokens wants it.
    """
    mask_m = (offs_m < end_m)[:, None]
    mask_n = (offs_n < end_n)[None, :]
    x_row_ptr = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PDL:
        gdc_wait()
    for start_k in tl.range(split * BLOCK_K, k, splits * BLOCK_K, num_stages=STAGES):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k
        mask_x = mask_m & mask_k[None, :]
        x = tl.load(x_row_ptr + offs_k[None, :], mask=mask_x, other=0.0)
        threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
        wanted = wanted_channels(x, threshold[None, :], DROPPED) & mask_x
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        tile = load_tile(
            tile_ptr,
            offs_k[:, None],
            offs_n[None, :],
            stride_k,
            stride_n,
            read[:, None] & mask_n,
        )
        x = tl.where(wanted, x, 0.0)
        # "ieee": float32 inputs would be rounded to tf32 otherwise.
        acc = tl.dot(x.to(DOT_DTYPE), tile.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc


@triton.jit
def locate_tile(
    tile, first_shard_column, sizes, SHARDS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Shard, first column and end column of a tile; tiles never straddle shards."""
    shard = 0
    begin = 0
    end = 0
    shard_begin = first_shard_column
    for index in tl.static_range(SHARDS):
        tiles = tl.cdiv(sizes[index], BLOCK_N)
        here = (tile >= 0) & (tile < tiles)
        shard = tl.where(here, index, shard)
        begin = tl.where(here, shard_begin + tile * BLOCK_N, begin)
        end = tl.where(here, shard_begin + sizes[index], end)
        tile -= tiles
        shard_begin += sizes[index]
    return shard, begin, end
