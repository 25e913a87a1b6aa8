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

from .listed import sum_listed
from .masked import dot_masked, sum_masked


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
