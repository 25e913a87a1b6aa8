# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: where a tile of a stored matrix is, and reading it."""

import triton
import triton.language as tl


@triton.jit
def load_tile(tile_ptr, offs_k, offs_n, stride_k, stride_n, mask, WIDE: tl.constexpr):
    """Elements [offs_k, offs_n] of a stored matrix; zero, and not read, off the mask.

    The one place that knows how weights are stored. A narrower type with a scale per
    output channel is widened here and scaled where the column sums are finished.
    ``WIDE`` selects 64-bit offsets, which cost three more instructions per row.
    """
    if WIDE:
        offsets = offs_k.to(tl.int64) * stride_k + offs_n.to(tl.int64) * stride_n
    else:
        offsets = offs_k * stride_k + offs_n * stride_n
    if mask is None:
        tile = tl.load(tile_ptr + offsets, eviction_policy="evict_first")
    else:
        tile = tl.load(
            tile_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first"
        )
    return tile


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
