# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment,misc"
# Triton compiles no starred tuples.
# ruff: noqa: RUF005
"""Device code: a program's wanted channels, listed group by group in steps of 16."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .channels import wanted_channels
from .codes import scale_second_plane
from .fixed_point import block_unit, join_digits, round_to_unit
from .packing import INTEGER_STEP, STEP, UNIT_ROWS


@triton.jit
def list_groups(
    x,
    threshold_ptr,
    plane_thresholds,
    lists,
    mine,
    split,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """List the rows that any token wants of this split's blocks of SPAN channels.

    Row ``p * k + j`` is channel j of plane p, with thresholds of the plane's own. Block
    b of the split is block ``b * splits + split`` of the weight, in the first plane and
    then in the second. Each block's list is padded to whole steps with a channel of the
    block and zeros for its x, so that a step never reads two blocks and needs no mask.
    Returns the number of steps.

    Args of note:
        threshold_ptr: of the shard and the first plane.
        plane_thresholds: from there to those of the second plane.
        mine: the ``Bounds`` of the tokens.

    With ``PACKING.grouped``, blocks are padded to units of four rows, which one thread
    reads, so that a step may have rows of several blocks.

    Writes, in the program's own lists of at most L = BLOCKS * PLANES * SPAN rows:
        lists.row_ptr: int32 [L], the rows.
        lists.value_ptr: x's dtype [TOKENS, L], each token's x of these rows, in steps
            of the first plane; zero where the token does not want it.
        lists.head_ptr: int32 [L / 16], for each step twice its block, plus one if it is
            the block's last. Grouped: [L / 4], for each unit the index of its block
            among the program's.
        lists.second_ptr: None, or float32 [L / 16, TOKENS], for the last step of each
            block the sums of the second plane's values.
        lists.block_ptr: None, or float32 [3, BLOCKS, TOKENS]; see below.

    With ``PACKING.integer``, values are int16 of two digits (``fixed_point.py``), and
    ``block_ptr`` has each block's units, a token each, and the sums of both planes'
    values in units.

    A value of the second plane is x / 16, which float16 rounds to a multiple of 2^-24
    where x is below 2^-10. Such an x is a multiple of 2^-24 itself, and its product
    with the second plane is off by no more than half of that times the group's largest
    weight.
    """
    BLOCKS: tl.constexpr = PACKING.blocks
    PLANES: tl.constexpr = PACKING.planes
    SPAN: tl.constexpr = PACKING.span
    TOKENS: tl.constexpr = PACKING.tokens
    LENGTH: tl.constexpr = PACKING.length
    GROUPED: tl.constexpr = PACKING.grouped
    INTEGER: tl.constexpr = PACKING.integer
    UNIT: tl.constexpr = UNIT_ROWS if GROUPED else STEP
    # A warp counts a whole block, so that it waits for no other while it does. Where
    # there are more warps than blocks, those left over repeat it and write nothing.
    ROWS: tl.constexpr = max(BLOCKS, PACKING.warps)
    slot = tl.arange(0, ROWS)[:, None] % BLOCKS
    mine_to_write = tl.arange(0, ROWS)[:, None] < BLOCKS
    place = tl.arange(0, SPAN)[None, :]
    block = slot * split.count + split.index
    channel = block * SPAN + place
    inside = channel < x.k
    # Before the wait: no kernel writes thresholds.
    thresholds = ()
    for plane in tl.static_range(PLANES):
        plane_ptr = threshold_ptr + plane * plane_thresholds
        threshold = tl.load(plane_ptr + channel, mask=inside, other=0.0)
        thresholds = thresholds + (threshold,)
    if PACKING.pdl:
        gdc_wait()
    # Sixteen bits a plane: one scan counts both.
    read = tl.zeros([ROWS, SPAN], dtype=tl.int32)
    for index in tl.static_range(TOKENS):
        values, mask = _load_x(x, mine, index, channel, inside)
        for plane in tl.static_range(PLANES):
            wanted = wanted_channels(values, thresholds[plane], False) & mask
            read = read | wanted.to(tl.int32) << 16 * plane
    alone = mine_to_write & (place == 0)
    inverses = ()
    if INTEGER:
        for index in tl.static_range(TOKENS):
            used = read != 0
            if TOKENS > 1:
                values, mask = _load_x(x, mine, index, channel, inside)
                used = wanted_channels(values, thresholds[0], False) & mask
                if PLANES > 1:
                    used |= wanted_channels(values, thresholds[1], False) & mask
            unit_of_x, inverse = block_unit(values, used)
            put(lists.block_ptr + slot * TOKENS + index, unit_of_x, alone, DTYPE)
            inverses = inverses + (inverse,)
    ends = tl.cumsum(read, axis=1)
    counts = tl.sum(read, axis=1, keep_dims=True)
    count = _of_plane(counts, 0, PLANES)
    if PLANES > 1:
        count += _of_plane(counts, 1, PLANES)
    units = (count + (UNIT - 1)) // UNIT
    each = tl.sum(units, axis=1)[None, :]
    if ROWS > BLOCKS:
        each = tl.where(tl.arange(0, ROWS)[None, :] < BLOCKS, each, 0)
    before = tl.arange(0, ROWS)[None, :] < slot
    first = tl.sum(tl.where(before, each, 0), axis=1, keep_dims=True)
    steps = tl.sum(tl.sum(each, axis=1), axis=0)
    padding = count + place
    padded = mine_to_write & (padding < units * UNIT)
    padding += first * UNIT
    put(lists.row_ptr + padding, block * SPAN, padded, DTYPE)
    for index in tl.static_range(TOKENS):
        zero = tl.zeros([ROWS, SPAN], dtype=lists.value_ptr.dtype.element_ty)
        put(lists.value_ptr + index * LENGTH + padding, zero, padded, DTYPE)
    for plane in tl.static_range(PLANES):
        some = mine_to_write & (_of_plane(read, plane, PLANES) > 0)
        position = first * UNIT + _of_plane(ends, plane, PLANES) - 1
        if plane > 0:
            position += _of_plane(counts, 0, PLANES)
        put(lists.row_ptr + position, channel + plane * x.k, some, DTYPE)
        for index in tl.static_range(TOKENS):
            if TOKENS > 1:
                values, mask = _load_x(x, mine, index, channel, inside)
            wanted = wanted_channels(values, thresholds[plane], False) & mask
            # An unwanted x may be infinite, and infinity times a weight of zero is NaN.
            listed = tl.where(wanted, values, 0.0)
            if INTEGER:
                listed = round_to_unit(listed, inverses[index], plane)
                total = tl.sum(listed, axis=1, keep_dims=True).to(tl.float32)
                total_ptr = lists.block_ptr + (plane + 1) * BLOCKS * TOKENS
                put(total_ptr + slot * TOKENS + index, total, alone, DTYPE)
                listed = join_digits(listed)
            elif plane > 0:
                listed = scale_second_plane(listed)
                if lists.second_ptr is not None:
                    # Of the values as stored: the codes' offset is taken out with it.
                    total = tl.sum(listed.to(tl.float32), axis=1, keep_dims=True)
                    last = (first + units - 1) * TOKENS + index
                    last_mask = mine_to_write & (units > 0) & (place == 0)
                    put(lists.second_ptr + last, total, last_mask, DTYPE)
            put(lists.value_ptr + index * LENGTH + position, listed, some, DTYPE)
    last = (place == units - 1).to(tl.int32)
    head = slot if GROUPED else block * 2 + last
    put(lists.head_ptr + first + place, head, mine_to_write & (place < units), DTYPE)
    if GROUPED:
        steps = _fill_last_step(lists, steps, split.index * SPAN, PACKING)
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return steps


@triton.jit
def put(pointers, values, mask, DTYPE: tl.constexpr):
    """``tl.store`` to scattered places, by the threads that have the values.

    The compiler would give a store a layout of its own, whose exchange between warps
    took 39 barriers for four blocks of planes; 4 are left.
    """
    shape: tl.constexpr = mask.shape
    values = tl.broadcast_to(values, shape)
    pointers = tl.broadcast_to(pointers, shape)
    if tl.float32 == DTYPE:
        tl.store(pointers, values, mask=mask)
    elif values.dtype.primitive_bitwidth == 16:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        _store(pointers, bits, mask, "b16")
    else:
        _store(pointers, values.to(tl.int32, bitcast=True), mask, "b32")


@triton.jit
def _store(pointers, bits, mask, SIZE: tl.constexpr):
    """The lowest SIZE of int32 bits."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        setp.ne.s32 p, $3, 0;
        mov.b32 $0, 0;
        @p st.global."""
        + SIZE
        + """ [$1], $2;
        }""",
        "=r,l,r,r",
        [pointers.to(tl.int64), bits, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _fill_last_step(lists, units, filler, PACKING: tl.constexpr):
    """Complete the last step of a list of units with zeros; the number of steps."""
    ROWS: tl.constexpr = INTEGER_STEP if PACKING.integer else STEP
    EACH: tl.constexpr = ROWS // UNIT_ROWS
    TOKENS: tl.constexpr = PACKING.tokens
    LENGTH: tl.constexpr = PACKING.length
    steps = (units + (EACH - 1)) // EACH
    row = units * UNIT_ROWS + tl.arange(0, ROWS)
    tl.store(lists.row_ptr + row, filler + row * 0, mask=row < steps * ROWS)
    zeros = tl.zeros([ROWS], dtype=lists.value_ptr.dtype.element_ty)
    for index in tl.static_range(TOKENS):
        value_ptr = lists.value_ptr + index * LENGTH
        tl.store(value_ptr + row, zeros, mask=row < steps * ROWS)
    unit = units + tl.arange(0, EACH)
    tl.store(lists.head_ptr + unit, unit * 0, mask=unit < steps * EACH)
    return steps


@triton.jit
def _load_x(x, mine, index, channel, inside):
    """A token's x of these channels, and a mask of what there is."""
    token = mine.begin + index
    # Of the channels' shape: Triton 3.9's interpreter takes no scalar in a mask.
    mask = inside & (channel * 0 + token < mine.end)
    row = x.ptr + token.to(tl.int64) * x.stride_m
    return tl.load(row + channel, mask=mask, other=0.0), mask


@triton.jit
def _of_plane(packed, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """A plane's counts of those packed into sixteen bits each."""
    return packed if PLANES == 1 else packed >> 16 * PLANE & 0xFFFF
