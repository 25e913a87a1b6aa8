# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# Triton compiles no starred tuples.
# ruff: noqa: RUF005
"""Device code: the loop of ``packed.py`` over steps of 16 or 32 channels."""

import triton
import triton.language as tl

from .codes import FP8, INT4, fp8_factor, scale_second_plane
from .fixed_point import DIGITS, byte_operand, digit_operand
from .packed_groups import scaled_groups
from .packed_integers import scaled_integers
from .packed_scales import fetch_scales, multiply_step, scaled_block
from .packing import (
    INTEGER_STEP,
    STEP,
    UNIT_ROWS,
    Loaded,
    Places,
    Source,
    Sums,
)


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
    early,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Column sums over a program's steps.

    While a program multiplies the words of HALF steps, those of the HALF after them are
    on the way. An iteration does this twice, with two sets of registers: with one, they
    would be copied at its end, and the copy would wait for the load.

    Args of note:
        words: the ``Words`` of the tile's columns.
        columns: the ``Bounds`` of the tile.
        mine: the ``Bounds`` of the tokens.
        early: of integers, what ``load_scales`` gave before the loop.
    """
    CODE: tl.constexpr = PACKING.code
    TOKENS: tl.constexpr = PACKING.tokens
    WORDS: tl.constexpr = PACKING.words
    HALF: tl.constexpr = PACKING.half
    HALVES: tl.constexpr = PACKING.halves
    COLUMNS: tl.constexpr = PACKING.columns
    GROUPED: tl.constexpr = PACKING.grouped
    INTEGER: tl.constexpr = PACKING.integer
    SLOTS: tl.constexpr = 8 if PACKING.spread or GROUPED else PACKING.tokens
    # With one sum a slot there is no other over finished blocks.
    KEPT_SLOTS: tl.constexpr = 4 if PACKING.spread else PACKING.tokens
    LENGTH: tl.constexpr = PACKING.length
    WARPS: tl.constexpr = PACKING.warps
    FETCHES: tl.constexpr = CODE == INT4 and not GROUPED
    # Columns of a warp.
    WIDTH: tl.constexpr = COLUMNS // WARPS
    # The compiler gives the threads of a warp the first two dimensions.
    quad = tl.arange(0, 4)[:, None, None, None]
    lane = tl.arange(0, 8)[None, :, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None]
    # [4, 8, warps, H, 1] and [.., 4]: a thread's units of a step, and their channels.
    UNITS: tl.constexpr = (INTEGER_STEP if INTEGER else STEP) // (4 * UNIT_ROWS)
    unit = (
        quad[:, :, :, :, None] * UNITS + tl.arange(0, UNITS)[None, None, None, :, None]
    )
    inner = unit * UNIT_ROWS + tl.arange(0, UNIT_ROWS)[None, None, None, None, :]
    unit = tl.broadcast_to(unit, (4, 8, WARPS, UNITS, 1))
    inner = tl.broadcast_to(inner, (4, 8, WARPS, UNITS, UNIT_ROWS))
    columns_w = (warp * 8 + lane) * WORDS + tl.arange(0, WORDS)[None, None, None, :]
    columns_w = tl.broadcast_to(columns_w, (4, 8, WARPS, WORDS))
    # All words of a thread at once where a shard ends between threads: a mask of single
    # words would break the load into parts.
    masked_w = (warp * 8 + lane) * WORDS if PACKING.aligned else columns_w
    mask_w = masked_w < (columns.end - columns.begin) // (WIDTH // 8 // WORDS)
    mask_w = tl.broadcast_to(mask_w, (4, 8, WARPS, WORDS))
    # [4, 8, warps, slots / 8, H, 4]: where x of a step lies for each slot.
    slot = tl.arange(0, SLOTS // 8)[None, None, None, :, None, None] * 8
    slot += lane[:, :, :, :, None, None]
    token = slot
    if PACKING.spread:
        token = slot // 2
    elif INTEGER:
        token = slot // DIGITS % TOKENS
    elif GROUPED:
        token = slot * 0
    live = (token < TOKENS) & (mine.begin + token < mine.end)
    if PACKING.spread:
        live &= slot % 2 == 0
    live = tl.broadcast_to(live, (4, 8, WARPS, SLOTS // 8, UNITS, UNIT_ROWS))
    if INTEGER:
        slot = slot // (DIGITS * TOKENS)
    inner_x = inner[:, :, :, None, :, :]
    if PACKING.sparse:
        x_offset = token * LENGTH + inner_x
    else:
        x_offset = (mine.begin + token).to(tl.int64) * x.stride_m + inner_x
    sums = Sums(
        tl.zeros([WARPS, WIDTH, KEPT_SLOTS], dtype=tl.float32),
        tl.zeros([WARPS, WIDTH, SLOTS], dtype=tl.int32 if INTEGER else tl.float32),
        tl.zeros([4, 8, WARPS, SLOTS // 8], dtype=tl.float32),
    )
    if steps > 0:
        final = steps - 1
        # A tensor, also where the interpreter counts with Python's own integers.
        zero = final * 0
        source = Source(x, words, lists, final, split)
        places = Places(inner, unit, slot, columns_w, mask_w, x_offset, inner_x, live)
        ahead = _plan(source, zero, places, PACKING)
        first = _load(source, places, zero, ahead, PACKING)
        last_head = zero + 1
        if FETCHES:
            last_head = _fetch(scales, first.heads, last_head, columns, PACKING)
        ahead = _plan(source, zero + HALF, places, PACKING)
        for begin in range(0, steps, HALVES * HALF):
            step = zero + begin
            if HALVES == 2:
                second = _load(source, places, step + HALF, ahead, PACKING)
                if FETCHES:
                    last_head = _fetch(
                        scales, second.heads, last_head, columns, PACKING
                    )
                ahead = _plan(source, step + 2 * HALF, places, PACKING)
            sums = _multiply(sums, first, step, scales, lists, columns, PACKING, DTYPE)
            first = _load(source, places, step + HALVES * HALF, ahead, PACKING)
            if FETCHES:
                last_head = _fetch(scales, first.heads, last_head, columns, PACKING)
            ahead = _plan(source, step + (HALVES + 1) * HALF, places, PACKING)
            if HALVES == 2:
                sums = _multiply(
                    sums, second, step + HALF, scales, lists, columns, PACKING, DTYPE
                )
    total = sums.total
    if INTEGER:
        total = scaled_integers(
            sums.acc, scales, lists, columns, split, x.k, early, PACKING
        )
    elif GROUPED:
        total = scaled_groups(sums.acc, scales, columns, split, x.k, PACKING)
    if CODE == FP8:
        if PACKING.spread:
            total, _odd = tl.split(tl.reshape(sums.acc, (WARPS, WIDTH, 4, 2)))
        else:
            total = sums.acc
    if CODE != INT4:
        total *= fp8_factor(DTYPE)
    return total


@triton.jit
def _multiply(
    sums,
    loaded,
    step,
    scales,
    lists,
    columns,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add the products of loaded steps; scale the sums of the blocks that end there."""
    CODE: tl.constexpr = PACKING.code
    HALF: tl.constexpr = PACKING.half
    GROUPED: tl.constexpr = PACKING.grouped
    INTEGER: tl.constexpr = PACKING.integer
    total, acc, x_sum = sums.total, sums.acc, sums.x_sum
    for index in tl.static_range(HALF):
        values = loaded.inputs[index]
        if INTEGER:
            first = byte_operand(loaded.words[index], PACKING.words, DTYPE)
            acc = tl.dot(first, digit_operand(values, DTYPE), acc, out_dtype=tl.int32)
        else:
            acc = multiply_step(loaded.words[index], values, acc, PACKING, DTYPE)
        if CODE == INT4 and not INTEGER:
            x_sum += tl.sum(tl.sum(values.to(tl.float32), axis=5), axis=4)
        if CODE != FP8 and not GROUPED:
            head = loaded.heads[index]
            if head & 1:
                total += scaled_block(
                    acc,
                    x_sum,
                    step + index,
                    head,
                    scales,
                    lists,
                    columns,
                    PACKING,
                    DTYPE,
                )
                acc = tl.zeros_like(acc)
                x_sum = tl.zeros_like(x_sum)
    return Sums(total, acc, x_sum)


@triton.jit
def _fetch(scales, heads, last_head, columns, PACKING: tl.constexpr):
    """Ask for the scales of the blocks that begin in these steps; the last head."""
    HALF: tl.constexpr = PACKING.half
    for index in tl.static_range(HALF):
        fetch_scales(scales, heads[index], last_head, columns, PACKING)
        last_head = heads[index]
    return last_head


@triton.jit
def _plan(source, step, places, PACKING: tl.constexpr):
    """What the next steps read: their rows and their heads.

    Rows are int32 [4, 8, warps, H, 4], anything past the last step. A head is twice the
    step's block, plus one if it is the block's last; 0 past the last step. Grouped,
    heads are the slots of a thread's rows. Rows past the end of the weight are its last
    one again; their x is zero.
    """
    GROUPED: tl.constexpr = PACKING.grouped
    HALF: tl.constexpr = PACKING.half
    ROWS: tl.constexpr = INTEGER_STEP if PACKING.integer else STEP
    PER_BLOCK: tl.constexpr = PACKING.planes * PACKING.span // STEP
    lists, split, final = source.lists, source.split, source.final
    rows = ()
    heads = ()
    for index in tl.static_range(HALF):
        here = step + index
        if PACKING.sparse:
            listed = tl.minimum(here, final)
            row = tl.load(lists.row_ptr + listed * ROWS + places.channel)
            if GROUPED:
                unit = listed * (ROWS // UNIT_ROWS) + places.unit
                head = tl.load(lists.head_ptr + unit)
            else:
                head = tl.load(lists.head_ptr + listed)
        else:
            plane, channel = _whole_step(here, split, PACKING)
            row = channel + places.channel
            if not PACKING.even_k:
                row = tl.minimum(row, source.x.k - 1)
            if PACKING.planes > 1:
                row += plane * source.x.k
            head = (here // PER_BLOCK * split.count + split.index) * 2
            head += tl.where(here % PER_BLOCK == PER_BLOCK - 1, 1, 0)
        if not GROUPED:
            head = tl.where(here <= final, head, 0)
        rows = rows + (row,)
        heads = heads + (head,)
    return rows, heads


@triton.jit
def _load(source, places, step, plan, PACKING: tl.constexpr):
    """Words and x of planned steps; zeros, which are not read, past the last step.

    Words are int32 [4, 8, warps, H, 4, W], x has [4, 8, warps, slots / 8, H, 4].
    """
    HALF: tl.constexpr = PACKING.half
    ROWS: tl.constexpr = INTEGER_STEP if PACKING.integer else STEP
    x, lists = source.x, source.lists
    rows, heads = plan
    words = ()
    values = ()
    for index in tl.static_range(HALF):
        here = step + index
        offset = (rows[index] * source.words.pitch)[:, :, :, :, :, None]
        pointers = source.words.ptr + offset + places.column[:, :, :, None, None, :]
        # A tensor: Triton 3.9's interpreter takes no scalar for a mask.
        inside = tl.broadcast_to(here, (1, 1, 1, 1, 1, 1)) <= source.final
        mask = inside
        if not PACKING.even_n:
            mask = mask & places.column_mask[:, :, :, None, None, :]
        part = tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
        words = words + (part,)
        mask = places.live & inside
        if PACKING.grouped:
            mask = mask & (heads[index][:, :, :, None, :, :] == places.slot)
        if PACKING.sparse:
            value_ptr = lists.value_ptr + here * ROWS + places.x_offset
            part = tl.load(value_ptr, mask=mask, other=0)
        else:
            plane, channel = _whole_step(here, source.split, PACKING)
            if not PACKING.even_k:
                mask &= channel + places.x_inner < x.k
            part = tl.load(x.ptr + channel + places.x_offset, mask=mask, other=0.0)
            if PACKING.planes > 1:
                part = tl.where(plane > 0, scale_second_plane(part), part)
        values = values + (part,)
    return Loaded(words, values, heads)


@triton.jit
def _whole_step(step, split, PACKING: tl.constexpr):
    """Plane and first channel of a step, where all of a block's channels are read."""
    SPAN: tl.constexpr = PACKING.span
    PER_PLANE: tl.constexpr = PACKING.span // STEP
    PER_BLOCK: tl.constexpr = PACKING.planes * PACKING.span // STEP
    block = step // PER_BLOCK * split.count + split.index
    inner = step % PER_BLOCK
    return inner // PER_PLANE, block * SPAN + inner % PER_PLANE * STEP
