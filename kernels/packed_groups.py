# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: the scales of all blocks of a program, for one token.

The matrix units multiply eight columns of x at a time, and one token would leave seven
of them idle. Each takes x of another block of channels instead (``Packing.grouped``):
a block's sums stay apart from the others' until the end, where they are scaled and
added. In the loop nothing waits for scales then, and it needs fewer registers.
"""

import triton
import triton.language as tl

from .packed_scales import SCALE_BLOCK
from .packing import SLOTS


@triton.jit
def scaled_groups(acc, scales, columns, split, k, PACKING: tl.constexpr):
    """The sums of fp8-block's blocks, scaled and added: float32 [warps, columns, 1].

    Args of note:
        acc: float32 [warps, columns, 8], a slot for each of the program's blocks.
        columns: the ``Bounds`` of the tile.
    """
    WARPS: tl.constexpr = PACKING.warps
    tile: tl.constexpr = acc.shape[1]
    blocks_n = (scales.n + SCALE_BLOCK - 1) // SCALE_BLOCK
    column = columns.begin + tl.arange(0, WARPS)[:, None, None] * tile
    # A warp past the end of the shard takes any; its sums are not stored.
    place = tl.minimum(column // SCALE_BLOCK, blocks_n - 1)
    group = group_of(tl.arange(0, SLOTS)[None, None, :], split, k, PACKING)
    sums = acc * tl.load(scales.ptr + group * blocks_n + place)
    return tl.sum(sums, axis=2, keep_dims=True)


@triton.jit
def group_of(block, split, k, PACKING: tl.constexpr):
    """The row of scales of a program's block; past the last one, another's."""
    SPAN: tl.constexpr = PACKING.span
    GROUP: tl.constexpr = PACKING.group
    last = (k - 1) // GROUP
    return tl.minimum((block * split.count + split.index) * SPAN // GROUP, last)
