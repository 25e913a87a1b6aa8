# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: sums over the channels that any token wants.

Matrices are stored with one input channel per contiguous row, so that an unwanted
channel is a row that is not read. The same sums serve the weight (over kept channels)
and the factor V (over dropped ones, ``DROPPED``). There are three ways, and README.md
describes when each is used: ``sum_listed`` lists the wanted channels first,
``sum_masked`` and ``dot_masked`` skip the others in place.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .listed import sum_listed
from .masked import dot_masked, sum_masked
from .tiles import Range, locate_tile


@triton.jit
def sum_channels(
    x,
    threshold_ptr,
    matrix,
    lists,
    tokens,
    columns,
    split,
    DROPPED: tl.constexpr,
    TILING: tl.constexpr,
):
    """Sums of x over the wanted channels times a tile: float32 [BLOCK_M, BLOCK_N].

    Args:
        x: the ``Input``.
        threshold_ptr: of the tile's shard.
        matrix: the ``Matrix`` that the tile is of.
        lists: this program's ``Lists``, pointers where ``TILING.channels`` is set.
        tokens, columns: the ``Range`` of each.
        split: the ``Split``.
        DROPPED: sum the dropped channels instead of the kept ones.
        TILING: the ``Tiling``.
    """
    if TILING.use_dot:
        sums = dot_masked(
            x, threshold_ptr, matrix, tokens, columns, split, DROPPED, TILING
        )
    elif TILING.channels is not None:
        sums = sum_listed(
            x, threshold_ptr, matrix, lists, tokens, columns, split, DROPPED, TILING
        )
    else:
        sums = sum_masked(
            x, threshold_ptr, matrix, tokens, columns, split, DROPPED, TILING
        )
    return sums


@triton.jit
def count_tiles(sizes, BLOCK_N: tl.constexpr):
    """Column tiles of all shards."""
    count = 0
    for index in tl.static_range(len(sizes)):
        count += tl.cdiv(sizes[index], BLOCK_N)
    return count


@triton.jit
def store_partial(partial_ptr, sums, split, tokens, here, before, columns):
    """Leave a tile's sums in the workspace.

    Args:
        partial_ptr: float32 [splits, tokens, columns].
        sums: float32 [BLOCK_M, BLOCK_N].
        split: the ``Split``.
        tokens, here: the ``Range`` of the tile's rows and columns.
        before: columns of the workspace before those that ``here`` counts.
        columns: of the workspace.
    """
    row = (split.index * tokens.end + tokens.offsets[:, None]).to(tl.int64)
    tl.store(
        partial_ptr + row * columns + before + here.offsets[None, :],
        sums,
        mask=(tokens.offsets < tokens.end)[:, None]
        & (here.offsets < here.end)[None, :],
    )


@triton.jit
def store_factor_tile(
    x,
    threshold_ptr,
    v,
    lists,
    tile,
    tokens,
    split,
    ranks,
    partial_ptr,
    columns,
    TILING: tl.constexpr,
):
    """A tile of z = V (x - s(x)), over one split, into the workspace.

    Args:
        x: the ``Input``.
        threshold_ptr: float32 [S, K].
        v: the ``Matrix`` of V.
        lists: as for ``sum_channels``.
        tile: which, of those of all shards.
        tokens: the ``Range`` of the program's rows.
        split: the ``Split``.
        ranks: of each shard.
        partial_ptr: float32 [splits, tokens, columns]; z comes first in a row.
        columns: of the workspace.
        TILING: the ``Tiling``.
    """
    BLOCK_N: tl.constexpr = TILING.block_n
    shard, begin_n, end_n = locate_tile(tile, 0, ranks, BLOCK_N)
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    z = sum_channels(
        x,
        threshold_ptr + shard.to(tl.int64) * x.k,
        v,
        lists,
        tokens,
        Range(offs_n, end_n),
        split,
        DROPPED=True,
        TILING=TILING,
    )
    if TILING.pdl:
        gdc_launch_dependents()
    store_partial(partial_ptr, z, split, tokens, Range(offs_n, end_n), 0, columns)
