# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# Triton compiles no starred tuples.
# ruff: noqa: RUF005
"""Device code: a program's wanted channels, listed group by group in steps of 16."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .channels import wanted_channels
from .codes import scale_second_plane
from .packing import STEP, UNIT_ROWS


@triton.jit
def list_groups(
    x,
    threshold_ptr,
    plane_thresholds,
    lists,
    mine,
    split,
    PACKING: tl.constexpr,
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
            block the sums of the second plane's values. Grouped: [BLOCKS].

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
    UNIT: tl.constexpr = UNIT_ROWS if GROUPED else STEP
    block = tl.arange(0, BLOCKS)[:, None] * split.count + split.index
    channel = block * SPAN + tl.arange(0, SPAN)[None, :]
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
    read = tl.zeros([BLOCKS, SPAN], dtype=tl.int32)
    for index in tl.static_range(TOKENS):
        values, mask = _load_x(x, mine, index, channel, inside)
        for plane in tl.static_range(PLANES):
            wanted = wanted_channels(values, thresholds[plane], False) & mask
            read = read | wanted.to(tl.int32) << 16 * plane
    ends = tl.cumsum(read, axis=1)
    counts = tl.sum(read, axis=1, keep_dims=True)
    count = _of_plane(counts, 0, PLANES)
    if PLANES > 1:
        count += _of_plane(counts, 1, PLANES)
    units = (count + (UNIT - 1)) // UNIT
    each = tl.sum(units, axis=1)
    before = tl.arange(0, BLOCKS)[None, :] < tl.arange(0, BLOCKS)[:, None]
    first = tl.sum(tl.where(before, each[None, :], 0), axis=1)[:, None]
    padding = count + tl.arange(0, UNIT)[None, :]
    padded = padding < units * UNIT
    padding += first * UNIT
    filler = tl.broadcast_to(block * SPAN, (BLOCKS, UNIT))
    tl.store(lists.row_ptr + padding, filler, mask=padded)
    for index in tl.static_range(TOKENS):
        zeros = tl.zeros([BLOCKS, UNIT], dtype=values.dtype)
        tl.store(lists.value_ptr + index * LENGTH + padding, zeros, mask=padded)
    for plane in tl.static_range(PLANES):
        some = _of_plane(read, plane, PLANES) > 0
        place = first * UNIT + _of_plane(ends, plane, PLANES) - 1
        if plane > 0:
            place += _of_plane(counts, 0, PLANES)
        tl.store(lists.row_ptr + place, channel + plane * x.k, mask=some)
        for index in tl.static_range(TOKENS):
            if TOKENS > 1:
                values, mask = _load_x(x, mine, index, channel, inside)
            wanted = wanted_channels(values, thresholds[plane], False) & mask
            # An unwanted x may be infinite, and infinity times a weight of zero is NaN.
            listed = tl.where(wanted, values, 0.0)
            if plane > 0:
                listed = scale_second_plane(listed)
                if lists.second_ptr is not None:
                    # Of the values as stored: the codes' offset is taken out with it.
                    total = tl.sum(listed.to(tl.float32), axis=1, keep_dims=True)
                    if GROUPED:
                        slot = tl.arange(0, BLOCKS)[:, None]
                        tl.store(lists.second_ptr + slot, total)
                    else:
                        last = (first + units - 1) * TOKENS + index
                        tl.store(lists.second_ptr + last, total, mask=units > 0)
            tl.store(lists.value_ptr + index * LENGTH + place, listed, mask=some)
    unit = tl.arange(0, PLANES * SPAN // UNIT)[None, :]
    if GROUPED:
        head = tl.arange(0, BLOCKS)[:, None] + unit * 0
    else:
        head = block * 2 + (unit == units - 1).to(tl.int32)
    tl.store(lists.head_ptr + first + unit, head, mask=unit < units)
    steps = tl.sum(each, axis=0)
    if GROUPED:
        steps = _fill_last_step(lists, steps, split.index * SPAN, values.dtype)
    # Other threads of the program read what this one wrote.
    tl.debug_barrier()
    return steps


@triton.jit
def _fill_last_step(lists, units, filler, DTYPE: tl.constexpr):
    """Complete the last step of a list of units with zeros; the number of steps."""
    EACH: tl.constexpr = STEP // UNIT_ROWS
    steps = (units + (EACH - 1)) // EACH
    row = units * UNIT_ROWS + tl.arange(0, STEP)
    tl.store(lists.row_ptr + row, filler + row * 0, mask=row < steps * STEP)
    zeros = tl.zeros([STEP], dtype=DTYPE)
    tl.store(lists.value_ptr + row, zeros, mask=row < steps * STEP)
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
