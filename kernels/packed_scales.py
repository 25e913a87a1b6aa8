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
from .group_list import STEP

# Output and input channels that share a scale of the format fp8-block.
SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def multiply_step(
    words, x, acc, CODE: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr
):
    """Add the products of 16 channels: their words by their x."""
    slots: tl.constexpr = acc.shape[1]
    second = tl.reshape(tl.permute(x, (0, 3, 2, 1)), (STEP, slots))
    if CODE != INT4:
        second = scale_fp8_input(second, DTYPE)
    first = dot_operand(words, CODE, W, DTYPE)
    # "ieee": float32 inputs would be rounded to tf32 otherwise.
    return tl.dot(first, second.to(DTYPE), acc, input_precision="ieee")


@triton.jit
def scaled_block(
    acc,
    x_sum,
    step,
    head,
    scale_ptr,
    zero_ptr,
    second_ptr,
    begin_n,
    end_n,
    n,
    CODE: tl.constexpr,
    PLANES: tl.constexpr,
    SPARSE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPREAD: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN_N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A finished block's sums times the scales of its group, zero points taken out.

    The zero point and the offset of the codes leave the sum over a group:
    sum of x (q - z) = sum of x (q + offset) - (z + offset) sum of x.

    A second plane has the first one's scales and the zero point 8. Where the first
    plane has zero points of its own, the two sums of x are told apart.

    Args:
        acc: float32 [columns, slots], sums over the block.
        x_sum: float32 [4, 8, slots / 8], sums of the x that went into them.
        step: the block's last.
        head: of this step.
        scale_ptr: of the weight; columns begin at ``begin_n``.
        zero_ptr: of the weight, or None.
        second_ptr: as ``list_groups`` writes it.
        begin_n: first column of the tile.
        end_n: end of the shard.
        n: columns of the weight.
        CODE: the format.
        PLANES: planes of the weight.
        SPARSE: the channels of the block were listed.
        TOKENS: of the program.
        SPREAD: keep the even slots only.
        W: words of a thread.
        GROUP: channels of a group.
        SPAN: channels of a block.
        EVEN_N: no tile is cut off by ``end_n``.
        DTYPE: of the operands.
    """
    columns: tl.constexpr = acc.shape[0]
    slots: tl.constexpr = acc.shape[1]
    group = head // 2 * SPAN // GROUP
    if SPREAD:
        sums, _odd = tl.split(tl.reshape(acc, (columns, 4, 2)))
    else:
        sums = acc
    if CODE == FP8_BLOCK:
        blocks_n = (n + SCALE_BLOCK - 1) // SCALE_BLOCK
        sums *= tl.load(scale_ptr + group * blocks_n + begin_n // SCALE_BLOCK)
    else:
        scale, zero = _scales(scale_ptr, zero_ptr, group, begin_n, end_n, n, W, EVEN_N)
        # [8, slots / 8] -> [slots]
        x_token = tl.permute(tl.sum(x_sum, axis=0), (1, 0))
        if SPREAD:
            x_token, _odd = tl.split(tl.reshape(x_token, (4, 2)))
        else:
            x_token = tl.reshape(x_token, (slots,))
            scale = _for_slots(scale, columns, slots)
            zero = _for_slots(zero, columns, slots)
        if PLANES > 1 and zero_ptr is not None:
            if SPARSE:
                token = tl.arange(0, 4 if SPREAD else slots)
                second = second_ptr + step * TOKENS + token
                second = tl.load(second, mask=token < TOKENS, other=0.0)
            else:
                # Of all channels: a sixteenth of the first plane's.
                second = x_token * (1.0 / (PLANE_STEPS + 1))
            sums -= (int4_offset(DTYPE) * x_token + 8.0 * second)[None, :]
            sums -= zero * (x_token - second)[None, :]
        else:
            sums -= (int4_offset(DTYPE) + zero) * x_token[None, :]
        sums *= scale
    return sums


@triton.jit
def fetch_scales(
    scale_ptr,
    head,
    head_before,
    begin_n,
    end_n,
    n,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Ask for the scales of a block that begins here, while its words are on the way.

    Into L2 only, volatile to be issued at all: the compiler would move a plain load to
    the end of the block, and the program would wait there for memory.
    """
    group = head // 2 * SPAN // GROUP
    quad = tl.arange(0, 4)[:, None, None]
    lane = tl.arange(0, 8)[None, :, None]
    part = lane * (8 * W) + quad % W * 8 + tl.arange(0, 8)[None, None, :]
    begins = tl.broadcast_to(head_before & 1, (1, 1, 1)) != 0
    tl.load(
        scale_ptr + group.to(tl.int64) * n + begin_n + part,
        mask=(part < end_n - begin_n) & begins,
        volatile=True,
    )


@triton.jit
def _for_slots(per_column, COLUMNS: tl.constexpr, SLOTS: tl.constexpr):
    """[columns, 4], four times the same, as [columns, SLOTS] in the layout of sums."""
    wide = per_column[:, None, :, None]
    wide = tl.broadcast_to(wide, (COLUMNS, SLOTS // 8, 4, 2))
    return tl.reshape(wide, (COLUMNS, SLOTS))


@triton.jit
def _scales(
    scale_ptr,
    zero_ptr,
    group,
    begin_n,
    end_n,
    n,
    W: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """A group's scales and zero points in the order of ``dot_operand``.

    float32 [64 W, 4]: every one of the four threads that share a column has its own.
    """
    quad = tl.arange(0, 4)[:, None, None]
    lane = tl.arange(0, 8)[None, :, None]
    code = tl.arange(0, 8)[None, None, :]
    inner = quad * 0 + lane * (8 * W) + code
    row = scale_ptr + group.to(tl.int64) * n + begin_n
    parts = _load_scales(row, inner, end_n - begin_n, EVEN_N)
    if W >= 2:
        more = _load_scales(row, inner + 8, end_n - begin_n, EVEN_N)
        parts = tl.join(parts, more)
    if W == 4:
        more = _load_scales(row, inner + 16, end_n - begin_n, EVEN_N)
        last = _load_scales(row, inner + 24, end_n - begin_n, EVEN_N)
        parts = tl.join(parts, tl.join(more, last))
    # [4, 8, code, low, high] -> [high, low, code, 8, 4]
    if W == 1:
        scales = tl.reshape(tl.permute(parts, (2, 1, 0)), (64, 4))
    elif W == 2:
        scales = tl.reshape(tl.permute(parts, (3, 2, 1, 0)), (128, 4))
    else:
        scales = tl.reshape(tl.permute(parts, (4, 3, 2, 1, 0)), (256, 4))
    if zero_ptr is None:
        zeros = tl.full((64 * W, 4), 8.0, dtype=tl.float32)
    else:
        words = lane * W + tl.arange(0, W)[None, None, :]
        words = tl.broadcast_to(words, (4, 8, W))
        mask = words < (end_n - begin_n) // 8
        packed = tl.load(
            zero_ptr + group.to(tl.int64) * (n // 8) + begin_n // 8 + words,
            mask=mask,
            other=0,
        )
        shifts = 4 * tl.arange(0, 8)[None, None, None, :]
        codes = (packed[:, :, :, None] >> shifts) & 15
        codes = tl.permute(codes, (2, 3, 1, 0)).to(tl.float32)
        zeros = tl.reshape(codes, (64 * W, 4))
    return scales.to(tl.float32), zeros


@triton.jit
def _load_scales(row, inner, width, EVEN_N: tl.constexpr):
    if EVEN_N:
        scales = tl.load(row + inner)
    else:
        scales = tl.load(row + inner, mask=inner < width, other=0.0)
    return scales
