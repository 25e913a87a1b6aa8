# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# Triton compiles neither starred tuples nor an "and" of what is known when it compiles
# and what is not.
# ruff: noqa: RUF005, SIM102
"""Device code: the loop of ``packed.py`` over steps of 16 channels."""

import triton
import triton.language as tl

from .codes import FP8, INT4, fp8_factor, scale_second_plane
from .packed_scales import fetch_scales, multiply_step, scaled_block
from .packing import STEP


@triton.jit
def sum_steps(
    x,
    words,
    scales,
    lists,
    steps,
    columns,
    mine,
    split,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Column sums over a program's steps of 16 channels.

    An iteration loads the words of AT_ONCE steps and then multiplies them. Loading the
    next iteration's words before multiplying these gains nothing: the registers are
    copied at the end of the iteration, and the copy waits for the load.

    Args of note:
        words: the ``Words`` of the tile's columns.
        columns: the ``Bounds`` of the tile.
        mine: the ``Bounds`` of the tokens.
    """
    CODE: tl.constexpr = PACKING.code
    TOKENS: tl.constexpr = PACKING.tokens
    WORDS: tl.constexpr = PACKING.words
    AT_ONCE: tl.constexpr = PACKING.at_once
    COLUMNS: tl.constexpr = PACKING.columns
    SLOTS: tl.constexpr = 8 if PACKING.spread else PACKING.tokens
    KEPT_SLOTS: tl.constexpr = 4 if PACKING.spread else PACKING.tokens
    LENGTH: tl.constexpr = PACKING.length
    lane = tl.arange(0, 8)[None, :]
    quad = tl.arange(0, 4)[:, None]
    # [4, 8, 4]: where in a step the channels of a thread lie.
    inner = tl.broadcast_to(
        quad[:, :, None] * 4 + tl.arange(0, 4)[None, None, :], (4, 8, 4)
    )
    columns_w = (lane * WORDS)[:, :, None] + tl.arange(0, WORDS)[None, None, :]
    columns_w = tl.broadcast_to(columns_w, (4, 8, WORDS))
    mask_w = columns_w < (columns.end - columns.begin) // (COLUMNS // 8 // WORDS)
    # [4, 8, slots / 8, 4]: where x of a step lies for each slot.
    slot = tl.arange(0, SLOTS // 8)[None, None, :, None] * 8 + lane[:, :, None, None]
    token = slot // 2 if PACKING.spread else slot
    live = (token < TOKENS) & (mine.begin + token < mine.end)
    if PACKING.spread:
        live &= slot % 2 == 0
    live = tl.broadcast_to(live, (4, 8, SLOTS // 8, 4))
    inner_x = (quad * 4)[:, :, None, None] + tl.arange(0, 4)[None, None, None, :]
    if PACKING.sparse:
        x_offset = token * LENGTH + inner_x
    else:
        x_offset = (mine.begin + token).to(tl.int64) * x.stride_m + inner_x
    acc = tl.zeros([COLUMNS, SLOTS], dtype=tl.float32)
    total = tl.zeros([COLUMNS, KEPT_SLOTS], dtype=tl.float32)
    x_sum = tl.zeros([4, 8, SLOTS // 8], dtype=tl.float32)
    if steps > 0:
        final = steps - 1
        # Tensors, also where the interpreter counts with Python's own integers.
        zero = final * 0
        rows, heads = _plan(lists, zero, final, inner, x.k, split, PACKING)
        last_head = zero + 1
        for begin in range(0, steps, AT_ONCE):
            step = zero + begin
            loaded = _load_words(words, rows, step, final, columns_w, mask_w, PACKING)
            values = _load_x(
                x, lists, step, final, x_offset, inner_x, live, split, PACKING
            )
            for index in tl.static_range(AT_ONCE):
                if CODE == INT4:
                    fetch_scales(scales, heads[index], last_head, columns, PACKING)
                last_head = heads[index]
            for index in tl.static_range(AT_ONCE):
                acc = multiply_step(loaded[index], values[index], acc, PACKING, DTYPE)
                if CODE == INT4:
                    x_sum += tl.sum(values[index].to(tl.float32), axis=3)
                if CODE != FP8:
                    if heads[index] & 1:
                        total += scaled_block(
                            acc,
                            x_sum,
                            step + index,
                            heads[index],
                            scales,
                            lists,
                            columns,
                            PACKING,
                            DTYPE,
                        )
                        acc = tl.zeros([COLUMNS, SLOTS], dtype=tl.float32)
                        x_sum = tl.zeros([4, 8, SLOTS // 8], dtype=tl.float32)
            rows, heads = _plan(
                lists, step + AT_ONCE, final, inner, x.k, split, PACKING
            )
    if CODE == FP8:
        if PACKING.spread:
            total, _odd = tl.split(tl.reshape(acc, (COLUMNS, 4, 2)))
        else:
            total = acc
    if CODE != INT4:
        total *= fp8_factor(DTYPE)
    return total


@triton.jit
def _plan(lists, step, final, inner, k, split, PACKING: tl.constexpr):
    """What the next steps read: their rows and their heads.

    Rows are int32 [4, 8, 4], anything past the last step. A head is twice the step's
    block, plus one if it is the block's last; 0 past the last step. Rows past the end
    of the weight are its last one again; their x is zero.
    """
    AT_ONCE: tl.constexpr = PACKING.at_once
    PER_BLOCK: tl.constexpr = PACKING.planes * PACKING.span // STEP
    rows = ()
    heads = ()
    for index in tl.static_range(AT_ONCE):
        here = step + index
        if PACKING.sparse:
            listed = tl.minimum(here, final)
            row = tl.load(lists.row_ptr + listed * STEP + inner)
            head = tl.load(lists.head_ptr + listed)
        else:
            plane, channel = _whole_step(here, split, PACKING)
            row = channel + inner
            if not PACKING.even_k:
                row = tl.minimum(row, k - 1)
            if PACKING.planes > 1:
                row += plane * k
            head = (here // PER_BLOCK * split.count + split.index) * 2
            head += tl.where(here % PER_BLOCK == PER_BLOCK - 1, 1, 0)
        head = tl.where(here <= final, head, 0)
        rows = rows + (row,)
        heads = heads + (head,)
    return rows, heads


@triton.jit
def _whole_step(step, split, PACKING: tl.constexpr):
    """Plane and first channel of a step, where all of a block's channels are read."""
    SPAN: tl.constexpr = PACKING.span
    PER_PLANE: tl.constexpr = PACKING.span // STEP
    PER_BLOCK: tl.constexpr = PACKING.planes * PACKING.span // STEP
    block = step // PER_BLOCK * split.count + split.index
    inner = step % PER_BLOCK
    return inner // PER_PLANE, block * SPAN + inner % PER_PLANE * STEP


@triton.jit
def _load_words(words, rows, step, final, columns_w, mask_w, PACKING: tl.constexpr):
    """The words of the steps, int32 [4, 8, 4, W]; not read past the last step."""
    AT_ONCE: tl.constexpr = PACKING.at_once
    loaded = ()
    for index in tl.static_range(AT_ONCE):
        offset = (rows[index] * words.pitch)[:, :, :, None]
        pointers = words.ptr + offset + columns_w[:, :, None, :]
        # A tensor: Triton 3.9's interpreter takes no scalar for a mask.
        mask = tl.broadcast_to(step + index, (1, 1, 1, 1)) <= final
        if not PACKING.even_n:
            mask = mask & mask_w[:, :, None, :]
        part = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
        loaded = loaded + (part,)
    return loaded


@triton.jit
def _load_x(
    x, lists, step, final, x_offset, inner_x, live, split, PACKING: tl.constexpr
):
    """x of the steps for every slot, [4, 8, slots / 8, 4]; zero past the last."""
    AT_ONCE: tl.constexpr = PACKING.at_once
    loaded = ()
    for index in tl.static_range(AT_ONCE):
        here = step + index
        mask = live & (tl.broadcast_to(here, (1, 1, 1, 1)) <= final)
        if PACKING.sparse:
            part = tl.load(
                lists.value_ptr + here * STEP + x_offset, mask=mask, other=0.0
            )
        else:
            plane, channel = _whole_step(here, split, PACKING)
            if not PACKING.even_k:
                mask &= channel + inner_x < x.k
            part = tl.load(x.ptr + channel + x_offset, mask=mask, other=0.0)
            if PACKING.planes > 1:
                part = tl.where(plane > 0, scale_second_plane(part), part)
        loaded = loaded + (part,)
    return loaded
