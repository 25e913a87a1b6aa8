# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: one step of ``packed.py``, and the scales of a finished block."""

import triton
import triton.language as tl

from .codes import (
    FP8_BLOCK,
    INT4,
    PLANE_STEPS,
    dot_operand,
    int4_offset,
    scale_fp8_input,
)
from .packing import STEP

# Output and input channels that share a scale of the format fp8-block.
SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def multiply_step(words, x, acc, PACKING: tl.constexpr, DTYPE: tl.constexpr):
    """Add the products of 16 channels: their words by their x."""
    CODE: tl.constexpr = PACKING.code
    WORDS: tl.constexpr = PACKING.words
    second = tl.permute(x, (2, 0, 4, 5, 3, 1))
    second = tl.reshape(second, (acc.shape[0], STEP, acc.shape[2]))
    if CODE != INT4:
        second = scale_fp8_input(second, DTYPE)
    first = dot_operand(words, CODE, WORDS, DTYPE)
    # "ieee": float32 inputs would be rounded to tf32 otherwise.
    return tl.dot(first, second.to(DTYPE), acc, input_precision="ieee")


@triton.jit
def scaled_block(
    acc,
    x_sum,
    step,
    head,
    scales,
    lists,
    columns,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A finished block's sums times the scales of its group, zero points taken out.

    The zero point and the offset of the codes leave the sum over a group:
    sum of x (q - z) = sum of x (q + offset) - (z + offset) sum of x.

    A second plane has the first one's scales and the zero point 8. Where the first
    plane has zero points of its own, the two sums of x are told apart.

    Args of note:
        acc: float32 [warps, columns, slots], sums over the block.
        x_sum: float32 [4, 8, warps, slots / 8], sums of the x that went into them.
        step: the block's last.
        head: of this step.
        columns: the ``Bounds`` of the tile.
    """
    SPREAD: tl.constexpr = PACKING.spread
    TOKENS: tl.constexpr = PACKING.tokens
    warps: tl.constexpr = acc.shape[0]
    tile: tl.constexpr = acc.shape[1]
    slots: tl.constexpr = acc.shape[2]
    group = _group(head, PACKING)
    if SPREAD:
        sums, _odd = tl.split(tl.reshape(acc, (warps, tile, 4, 2)))
    else:
        sums = acc
    if PACKING.code == FP8_BLOCK:
        blocks_n = (scales.n + SCALE_BLOCK - 1) // SCALE_BLOCK
        column = columns.begin + tl.arange(0, warps)[:, None, None] * tile
        # A warp past the end of the shard takes any; its sums are not stored.
        place = tl.minimum(column // SCALE_BLOCK, blocks_n - 1)
        sums *= tl.load(scales.ptr + group * blocks_n + place)
    else:
        offset = int4_offset(DTYPE)
        scale, zero = _scales(scales, group, columns, PACKING)
        # [8, warps, slots / 8] -> [warps, slots]
        x_token = tl.permute(tl.sum(x_sum, axis=0), (1, 2, 0))
        if SPREAD:
            x_token, _odd = tl.split(tl.reshape(x_token, (warps, 4, 2)))
        else:
            x_token = tl.reshape(x_token, (warps, slots))
            scale = _for_slots(scale, slots)
            zero = _for_slots(zero, slots)
        if PACKING.planes > 1 and scales.zero_ptr is not None:
            if PACKING.sparse:
                token = tl.arange(0, 4 if SPREAD else slots)
                second = lists.second_ptr + step * TOKENS + token
                second = tl.load(second, mask=token < TOKENS, other=0.0)[None, :]
            else:
                # Of all channels: a sixteenth of the first plane's.
                second = x_token * (1.0 / (PLANE_STEPS + 1))
            sums -= (offset * x_token + 8.0 * second)[:, None, :]
            sums -= zero * (x_token - second)[:, None, :]
        else:
            sums -= (offset + zero) * x_token[:, None, :]
        sums *= scale
    return sums


@triton.jit
def fetch_scales(scales, head, head_before, columns, PACKING: tl.constexpr):
    """Ask for the scales of a block that begins here, while its words are on the way.

    Into L2 only, volatile to be issued at all: the compiler would move a plain load to
    the end of the block, and the program would wait there for memory.
    """
    WORDS: tl.constexpr = PACKING.words
    quad = tl.arange(0, 4)[:, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None]
    warp = tl.arange(0, PACKING.warps)[None, None, :, None]
    part = (warp * 8 + lane) * (8 * WORDS) + quad % WORDS * 8
    part = part + tl.arange(0, 8)[None, None, None, :]
    begins = tl.broadcast_to(head_before & 1, (1, 1, 1, 1)) != 0
    row = scales.ptr + _group(head, PACKING).to(tl.int64) * scales.n + columns.begin
    mask = (part < columns.end - columns.begin) & begins
    tl.load(row + part, mask=mask, volatile=True)


@triton.jit
def _group(head, PACKING: tl.constexpr):
    """The row of scales of a step's block."""
    SPAN: tl.constexpr = PACKING.span
    GROUP: tl.constexpr = PACKING.group
    return head // 2 * SPAN // GROUP


@triton.jit
def _for_slots(per_column, SLOTS: tl.constexpr):
    """[warps, columns, 4], four times the same, as [warps, columns, SLOTS]."""
    warps: tl.constexpr = per_column.shape[0]
    columns: tl.constexpr = per_column.shape[1]
    wide = per_column[:, :, None, :, None]
    wide = tl.broadcast_to(wide, (warps, columns, SLOTS // 8, 4, 2))
    return tl.reshape(wide, (warps, columns, SLOTS))


@triton.jit
def _scales(scales, group, columns, PACKING: tl.constexpr):
    """A group's scales and zero points in the order of ``dot_operand``.

    float32 [warps, 64 W, 4]: every one of the four threads that share a column has its
    own.
    """
    W: tl.constexpr = PACKING.words
    WARPS: tl.constexpr = PACKING.warps
    EVEN_N: tl.constexpr = PACKING.even_n
    width = columns.end - columns.begin
    quad = tl.arange(0, 4)[:, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None]
    code = tl.arange(0, 8)[None, None, None, :]
    inner = quad * 0 + (warp * 8 + lane) * (8 * W) + code
    row = scales.ptr + group.to(tl.int64) * scales.n + columns.begin
    parts = _load_scales(row, inner, width, EVEN_N)
    if W >= 2:
        more = _load_scales(row, inner + 8, width, EVEN_N)
        parts = tl.join(parts, more)
    if W == 4:
        more = _load_scales(row, inner + 16, width, EVEN_N)
        last = _load_scales(row, inner + 24, width, EVEN_N)
        parts = tl.join(parts, tl.join(more, last))
    # [4, 8, warps, code, low, high] -> [warps, high, low, code, 8, 4]
    if W == 1:
        parts = tl.permute(parts, (2, 3, 1, 0))
    elif W == 2:
        parts = tl.permute(parts, (2, 4, 3, 1, 0))
    else:
        parts = tl.permute(parts, (2, 5, 4, 3, 1, 0))
    parts = tl.reshape(parts, (WARPS, 64 * W, 4))
    if scales.zero_ptr is None:
        zeros = tl.full((WARPS, 64 * W, 4), 8.0, dtype=tl.float32)
    else:
        words = (warp * 8 + lane) * W + tl.arange(0, W)[None, None, None, :]
        words = tl.broadcast_to(words, (4, 8, WARPS, W))
        row = (
            scales.zero_ptr + group.to(tl.int64) * (scales.n // 8) + columns.begin // 8
        )
        packed = tl.load(row + words, mask=words < width // 8, other=0)
        shifts = 4 * tl.arange(0, 8)[None, None, None, None, :]
        codes = (packed[:, :, :, :, None] >> shifts) & 15
        codes = tl.permute(codes, (2, 3, 4, 1, 0)).to(tl.float32)
        zeros = tl.reshape(codes, (WARPS, 64 * W, 4))
    return parts.to(tl.float32), zeros


@triton.jit
def _load_scales(row, inner, width, EVEN_N: tl.constexpr):
    if EVEN_N:
        scales = tl.load(row + inner)
    else:
        scales = tl.load(row + inner, mask=inner < width, other=0.0)
    return scales
