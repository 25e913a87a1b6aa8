# SPDX-License-Identifier: Apache-2.0
"""What the functions of the packed kernel pass: tuples of pointers, and constants."""

from typing import Any, NamedTuple

import triton.language as tl

# Channels of one step: what one instruction of the matrix units multiplies, in half
# precision and in integers.
STEP = tl.constexpr(16)
INTEGER_STEP = tl.constexpr(32)
# Neighbouring rows of a step that one thread holds.
UNIT_ROWS = tl.constexpr(4)
# Columns of the second operand of the matrix units.
SLOTS = tl.constexpr(8)


class Words(NamedTuple):
    """int32 rows of a weight's codes, ``pitch`` words apart; an input channel a row.

    Of two planes, row K + j is channel j of the second.
    """

    ptr: Any
    pitch: Any


class Scales(NamedTuple):
    """Scales [groups, n], and zero points packed like words; each a pointer or None."""

    ptr: Any
    zero_ptr: Any
    n: Any


class GroupLists(NamedTuple):
    """Workspace of a listing program; see ``group_list.list_groups``."""

    row_ptr: Any
    value_ptr: Any
    head_ptr: Any
    second_ptr: Any
    block_ptr: Any


class Bounds(NamedTuple):
    """Columns or tokens: the program's first, and the end of the shard or the batch."""

    begin: Any
    end: Any


class Source(NamedTuple):
    """What a program reads, and its last step."""

    x: Any
    words: Any
    lists: Any
    final: Any
    split: Any


class Places(NamedTuple):
    """Where a thread reads in a step, with masks.

    Attributes:
        channel: int32 [4, 8, warps, H, 4], rows from the first of a step; a thread has
            H units of four, 1 or, integer, 2.
        unit: int32 [4, 8, warps, H, 1], which of a step's units they are.
        slot: int32 [1, 8, 1, slots / 8, 1, 1], the slots of a thread; integer, the
            blocks of the slots.
        column: int32 [4, 8, warps, W], words from the tile's first column.
        column_mask: of these.
        x_offset: int32 [4, 8, warps, slots / 8, H, 4], from the x of a step.
        x_inner: the channel of these in the step.
        live: whether the slot has a token.
    """

    channel: Any
    unit: Any
    slot: Any
    column: Any
    column_mask: Any
    x_offset: Any
    x_inner: Any
    live: Any


class Loaded(NamedTuple):
    """Words, x and heads of some steps: a tuple of each."""

    words: Any
    inputs: Any
    heads: Any


class Sums(NamedTuple):
    """Sums over finished blocks, scaled; over the current one; and of its x."""

    total: Any
    acc: Any
    x_sum: Any


class Packing(NamedTuple):
    """Constants of a compiled packed program; numbers, for the reason of ``Tiling``.

    Attributes:
        code: the format; that of a plane, where there are several.
        planes: planes of the weight, one after the other like their thresholds: 1, or
            2 of int4.
        sparse: read the channels that thresholds keep; otherwise all of them.
        tokens: of the program.
        spread: up to four tokens take the even ones of the eight slots that the matrix
            units have. A thread's sums of the odd ones are never scaled or kept.
        warps: of a program, which divide its columns.
        grouped: of one token, each of the eight slots takes another block of channels,
            so that blocks are scaled together at the end; at most eight blocks.
        integer: grouped, of one or two tokens, and x is fixed-point of two digits
            (``fixed_point.py``), each of which takes a slot; at most four blocks of one
            token, two of two.
        columns: of a tile, of all warps.
        words: words of a row that a thread loads at once, 1, 2 or 4; eight threads
            of a warp share a row.
        half: steps whose words are loaded together, 1 or 2.
        halves: 2 where the words of the next half are on the way while one is
            multiplied, otherwise 1.
        group: channels that share a row of scales, 0 for scales per column, which
            ``finish_kernel`` applies.
        span: channels of one block; a program takes blocks in turns with the splits.
        blocks: most blocks of a program, a power of two.
        length: most rows of a program's list.
        aligned: every tile begins at a multiple of ``words`` words.
        even_n: no tile ends before its last column.
        even_k: no block ends before its last channel.
        pdl: programmatic dependent launch.
    """

    code: int
    planes: int
    sparse: bool
    tokens: int
    spread: bool
    grouped: bool
    integer: bool
    warps: int
    columns: int
    words: int
    half: int
    halves: int
    group: int
    span: int
    blocks: int
    length: int
    aligned: bool
    even_n: bool
    even_k: bool
    pdl: bool
