# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# Triton compiles neither starred tuples nor an "and" of what is known when it compiles
# and what is not.
# ruff: noqa: RUF005, SIM102
"""Device code: the loop of ``packed.py`` over steps of 16 channels."""

import triton
import triton.language as tl

from .codes import FP8, INT4, PLANE_STEPS, fp8_factor
from .group_list import STEP
from .packed_scales import fetch_scales, multiply_step, scaled_block


@triton.jit
def sum_steps(
    x_ptr,
    word_ptr,
    scale_ptr,
    zero_ptr,
    row_ptr,
    value_ptr,
    head_ptr,
    second_ptr,
    steps,
    begin_n,
    end_n,
    n,
    k,
    pitch,
    stride_xm,
    first_token,
    tokens,
    split,
    splits,
    CODE: tl.constexpr,
    PLANES: tl.constexpr,
    SPARSE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPREAD: tl.constexpr,
    W: tl.constexpr,
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    LENGTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Column sums over a program's steps of 16 channels.

    Up to four tokens take the even ones of the eight slots that the matrix units have
    (SPREAD): a thread's sums of the odd ones are then never scaled or kept.

    An iteration loads the words of ROUND steps and then multiplies them. Loading the
    next iteration's words before multiplying these gains nothing: the registers are
    copied at the end of the iteration, and the copy waits for the load.
    """
    codes_per_word: tl.constexpr = 8 if CODE == INT4 else 4
    columns: tl.constexpr = 8 * W * codes_per_word
    slots: tl.constexpr = 8 if SPREAD else TOKENS
    kept_slots: tl.constexpr = 4 if SPREAD else TOKENS
    lane = tl.arange(0, 8)[None, :]
    quad = tl.arange(0, 4)[:, None]
    # [4, 8, 4]: where in a step the channels of a thread lie.
    inner = tl.broadcast_to(
        quad[:, :, None] * 4 + tl.arange(0, 4)[None, None, :], (4, 8, 4)
    )
    columns_w = (lane * W)[:, :, None] + tl.arange(0, W)[None, None, :]
    columns_w = tl.broadcast_to(columns_w, (4, 8, W))
    mask_w = columns_w < (end_n - begin_n) // codes_per_word
    # [4, 8, slots / 8, 4]: where x of a step lies for each slot.
    slot = tl.arange(0, slots // 8)[None, None, :, None] * 8 + lane[:, :, None, None]
    token = slot // 2 if SPREAD else slot
    live = (token < TOKENS) & (first_token + token < tokens)
    if SPREAD:
        live &= slot % 2 == 0
    live = tl.broadcast_to(live, (4, 8, slots // 8, 4))
    inner_x = (quad * 4)[:, :, None, None] + tl.arange(0, 4)[None, None, None, :]
    if SPARSE:
        x_offset = token * LENGTH + inner_x
    else:
        x_offset = (first_token + token).to(tl.int64) * stride_xm + inner_x
    acc = tl.zeros([columns, slots], dtype=tl.float32)
    total = tl.zeros([columns, kept_slots], dtype=tl.float32)
    x_sum = tl.zeros([4, 8, slots // 8], dtype=tl.float32)
    if steps > 0:
        final = steps - 1
        # Tensors, also where the interpreter counts with Python's own integers.
        zero = final * 0
        rows, heads = _plan(
            row_ptr,
            head_ptr,
            zero,
            final,
            inner,
            k,
            split,
            splits,
            PLANES,
            SPARSE,
            SPAN,
            EVEN_K,
            ROUND,
        )
        last_head = zero + 1
        for begin in range(0, steps, ROUND):
            step = zero + begin
            words = _load_words(
                word_ptr,
                rows,
                step,
                final,
                columns_w,
                mask_w,
                pitch,
                EVEN_N,
                ROUND,
            )
            x = _load_x(
                x_ptr,
                value_ptr,
                step,
                final,
                x_offset,
                inner_x,
                live,
                k,
                split,
                splits,
                PLANES,
                SPARSE,
                SPAN,
                EVEN_K,
                ROUND,
            )
            for index in tl.static_range(ROUND):
                if CODE == INT4:
                    fetch_scales(
                        scale_ptr,
                        heads[index],
                        last_head,
                        begin_n,
                        end_n,
                        n,
                        W,
                        GROUP,
                        SPAN,
                    )
                last_head = heads[index]
            for index in tl.static_range(ROUND):
                acc = multiply_step(words[index], x[index], acc, CODE, W, DTYPE)
                if CODE == INT4:
                    x_sum += tl.sum(x[index].to(tl.float32), axis=3)
                if CODE != FP8:
                    if heads[index] & 1:
                        total += scaled_block(
                            acc,
                            x_sum,
                            step + index,
                            heads[index],
                            scale_ptr,
                            zero_ptr,
                            second_ptr,
                            begin_n,
                            end_n,
                            n,
                            CODE,
                            PLANES,
                            SPARSE,
                            TOKENS,
                            SPREAD,
                            W,
                            GROUP,
                            SPAN,
                            EVEN_N,
                            DTYPE,
                        )
                        acc = tl.zeros([columns, slots], dtype=tl.float32)
                        x_sum = tl.zeros([4, 8, slots // 8], dtype=tl.float32)
            rows, heads = _plan(
                row_ptr,
                head_ptr,
                step + ROUND,
                final,
                inner,
                k,
                split,
                splits,
                PLANES,
                SPARSE,
                SPAN,
                EVEN_K,
                ROUND,
            )
    if CODE == FP8:
        if SPREAD:
            total, _odd = tl.split(tl.reshape(acc, (columns, 4, 2)))
        else:
            total = acc
    if CODE != INT4:
        total *= fp8_factor(DTYPE)
    return total


@triton.jit
def _plan(
    row_ptr,
    head_ptr,
    step,
    final,
    inner,
    k,
    split,
    splits,
    PLANES: tl.constexpr,
    SPARSE: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROUND: tl.constexpr,
):
    """What the next ROUND steps read: their rows and their heads.

    Rows are int32 [4, 8, 4], anything past the last step. A head is twice the step's
    block, plus one if it is the block's last; 0 past the last step. Rows past the end
    of the weight are its last one again; their x is zero.
    """
    rows = ()
    heads = ()
    per_block: tl.constexpr = PLANES * SPAN // STEP
    for index in tl.static_range(ROUND):
        here = step + index
        if SPARSE:
            listed = tl.minimum(here, final)
            row = tl.load(row_ptr + listed * STEP + inner)
            head = tl.load(head_ptr + listed)
        else:
            plane, channel = _whole_step(here, split, splits, PLANES, SPAN)
            row = channel + inner
            if not EVEN_K:
                row = tl.minimum(row, k - 1)
            if PLANES > 1:
                row += plane * k
            head = (here // per_block * splits + split) * 2
            head += tl.where(here % per_block == per_block - 1, 1, 0)
        head = tl.where(here <= final, head, 0)
        rows = rows + (row,)
        heads = heads + (head,)
    return rows, heads


@triton.jit
def _whole_step(step, split, splits, PLANES: tl.constexpr, SPAN: tl.constexpr):
    """Plane and first channel of a step, where all of a block's channels are read."""
    per_plane: tl.constexpr = SPAN // STEP
    per_block: tl.constexpr = PLANES * per_plane
    block = step // per_block * splits + split
    inner = step % per_block
    return inner // per_plane, block * SPAN + inner % per_plane * STEP


@triton.jit
def _load_words(
    word_ptr,
    rows,
    step,
    final,
    columns_w,
    mask_w,
    pitch,
    EVEN_N: tl.constexpr,
    ROUND: tl.constexpr,
):
    """The words of ROUND steps, int32 [4, 8, 4, W]; not read past the last step."""
    loaded = ()
    for index in tl.static_range(ROUND):
        offset = (rows[index] * pitch)[:, :, :, None]
        pointers = word_ptr + offset + columns_w[:, :, None, :]
        # A tensor: Triton 3.9's interpreter takes no scalar for a mask.
        mask = tl.broadcast_to(step + index, (1, 1, 1, 1)) <= final
        if not EVEN_N:
            mask = mask & mask_w[:, :, None, :]
        words = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
        loaded = loaded + (words,)
    return loaded


@triton.jit
def _load_x(
    x_ptr,
    value_ptr,
    step,
    final,
    x_offset,
    inner_x,
    live,
    k,
    split,
    splits,
    PLANES: tl.constexpr,
    SPARSE: tl.constexpr,
    SPAN: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROUND: tl.constexpr,
):
    """x of ROUND steps for every slot, [4, 8, slots / 8, 4]; zero past the last."""
    loaded = ()
    for index in tl.static_range(ROUND):
        here = step + index
        mask = live & (tl.broadcast_to(here, (1, 1, 1, 1)) <= final)
        if SPARSE:
            x = tl.load(value_ptr + here * STEP + x_offset, mask=mask, other=0.0)
        else:
            plane, channel = _whole_step(here, split, splits, PLANES, SPAN)
            if not EVEN_K:
                mask &= channel + inner_x < k
            x = tl.load(x_ptr + channel + x_offset, mask=mask, other=0.0)
            if PLANES > 1:
                factor = tl.where(plane > 0, 1.0 / PLANE_STEPS, 1.0)
                x = (x.to(tl.float32) * factor).to(x.dtype)
        loaded = loaded + (x,)
    return loaded
