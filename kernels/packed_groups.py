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

from .codes import FP8_BLOCK, int4_offset
from .packed_scales import SCALE_BLOCK
from .packing import SLOTS


@triton.jit
def scaled_groups(
    acc,
    x_sum,
    scales,
    lists,
    columns,
    split,
    k,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The sums of all blocks, scaled and added: float32 [warps, columns, 1].

    ``packed_scales.scaled_block`` has the formula.

    Args of note:
        acc: float32 [warps, columns, 8], a slot for each of the program's blocks.
        x_sum: float32 [4, 8, warps, 1], sums of the x that went into them.
        columns: the ``Bounds`` of the tile.
    """
    WARPS: tl.constexpr = PACKING.warps
    tile: tl.constexpr = acc.shape[1]
    if PACKING.code == FP8_BLOCK:
        blocks_n = (scales.n + SCALE_BLOCK - 1) // SCALE_BLOCK
        column = columns.begin + tl.arange(0, WARPS)[:, None, None] * tile
        # A warp past the end of the shard takes any; its sums are not stored.
        place = tl.minimum(column // SCALE_BLOCK, blocks_n - 1)
        group = _groups(tl.arange(0, SLOTS)[None, None, :], split, k, PACKING)
        sums = acc * tl.load(scales.ptr + group * blocks_n + place)
    else:
        scale, zero = _scales(scales, columns, split, k, PACKING)
        # [8, warps, 1] -> [warps, 8]
        x_slot = tl.permute(tl.sum(x_sum, axis=0), (1, 2, 0))
        x_slot = tl.reshape(x_slot, (WARPS, SLOTS))
        offset = int4_offset(DTYPE)
        sums = acc
        if PACKING.planes > 1 and scales.zero_ptr is not None:
            slot = tl.arange(0, SLOTS)
            second = lists.second_ptr + slot
            second = tl.load(second, mask=slot < PACKING.blocks, other=0.0)[None, :]
            sums -= (offset * x_slot + 8.0 * second)[:, None, :]
            sums -= zero * (x_slot - second)[:, None, :]
        else:
            sums -= (offset + zero) * x_slot[:, None, :]
        sums *= scale
    return tl.sum(sums, axis=2, keep_dims=True)


@triton.jit
def fetch_groups(scales, columns, split, k, PACKING: tl.constexpr):
    """Ask for the scales of all blocks: into L2, before the loop.

    Volatile to be issued at all, as nothing uses the values.
    """
    WORDS: tl.constexpr = PACKING.words
    quad = tl.arange(0, 4)[:, None, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, PACKING.warps)[None, None, :, None, None]
    slot = quad * 2 + tl.arange(0, 2)[None, None, None, :, None]
    part = (warp * 8 + lane) * (8 * WORDS) + tl.arange(0, 8)[None, None, None, None, :]
    row = _groups(slot, split, k, PACKING).to(tl.int64)
    mask = (part < columns.end - columns.begin) & (slot < PACKING.blocks)
    tl.load(
        scales.ptr + row * scales.n + columns.begin + part, mask=mask, volatile=True
    )


@triton.jit
def _groups(slot, split, k, PACKING: tl.constexpr):
    """The row of scales of a slot; of one without a block, another slot's."""
    SPAN: tl.constexpr = PACKING.span
    GROUP: tl.constexpr = PACKING.group
    last = (k - 1) // GROUP
    return tl.minimum((slot * split.count + split.index) * SPAN // GROUP, last)


@triton.jit
def _scales(scales, columns, split, k, PACKING: tl.constexpr):
    """Scales and zero points, float32 [warps, columns, 8], columns as of ``acc``."""
    W: tl.constexpr = PACKING.words
    WARPS: tl.constexpr = PACKING.warps
    width = columns.end - columns.begin
    # [4, 8, warps, 2, W, 8]: two slots a thread.
    quad = tl.arange(0, 4)[:, None, None, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None, None, None]
    slot = quad * 2 + tl.arange(0, 2)[None, None, None, :, None, None]
    word = (warp * 8 + lane) * W + tl.arange(0, W)[None, None, None, None, :, None]
    inner = word * 8 + tl.arange(0, 8)[None, None, None, None, None, :]
    group = _groups(slot, split, k, PACKING).to(tl.int64)
    row = scales.ptr + group * scales.n + columns.begin
    if PACKING.even_n:
        parts = tl.load(row + inner)
    else:
        parts = tl.load(row + inner, mask=inner < width, other=0.0)
    # -> [warps, W, code, 8, 4, 2]
    parts = tl.permute(parts, (2, 4, 5, 1, 0, 3))
    parts = tl.reshape(parts, (WARPS, 64 * W, SLOTS)).to(tl.float32)
    if scales.zero_ptr is None:
        zeros = tl.full((WARPS, 64 * W, SLOTS), 8.0, dtype=tl.float32)
    else:
        row = scales.zero_ptr + group * (scales.n // 8) + columns.begin // 8
        packed = tl.load(row + word, mask=word < width // 8, other=0)
        shifts = 4 * tl.arange(0, 8)[None, None, None, None, None, :]
        codes = (packed >> shifts) & 15
        codes = tl.permute(codes, (2, 4, 5, 1, 0, 3)).to(tl.float32)
        zeros = tl.reshape(codes, (WARPS, 64 * W, SLOTS))
    return parts, zeros
