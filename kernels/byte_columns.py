# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton does not compile starred tuples)
"""Device code: int8-planes and int4 times x in bytes, on a warpgroup's matrix units.

As in ``columns.py``, columns of the weight are the rows of the first operand of
``wgmma``, which comes from registers, and x is the second. The codes of both planes are
one byte, 16 q1 + q2 - 128, and the code of int4 is one as it stands. The matrix units
multiply it with a byte of x (``rounded_blocks.py``) and add up a block of channels in
int32, exactly; the sum is scaled then. A block never leaves its group.

Rows are copied as boxes, which lie in shared memory as ``ldmatrix`` reads them without
conflicts; copied by the threads, they took four times as long to read.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .byte_operands import channel_fours, join_bytes, operand_rows, spread_bytes
from .codes import PLANE_STEPS
from .programs import column_constants
from .tiles import prefetch

# Added to the bits of a float32, an integer below 2^22 counts its last bits.
_INTEGERS = tl.constexpr(0x4B400000)
_OFFSET = tl.constexpr(12582912.0)


class ByteColumns(NamedTuple):
    """Constants of a compiled program; numbers, for the reason of ``Tiling``.

    Attributes:
        planes: of the weight, 1 of int4.
        tokens: of a program.
        warps: of a program, 4 or 8.
        halves: halves of words, four codes each, that a thread multiplies of a row.
        channels: of an iteration; divides the weight's group.
        block: channels that share a unit of x; divides ``channels``.
        digits: bytes of an element of x.
        group: channels that share scales.
        stages: iterations whose loads are in flight.
        pdl: programmatic dependent launch.
        bits: codes become bytes by PTX; otherwise for the interpreter.
    """

    planes: int
    tokens: int
    warps: int
    halves: int
    channels: int
    block: int
    digits: int
    group: int
    stages: int
    pdl: bool
    bits: bool


class ByteInput(NamedTuple):
    """Pointers of ``ByteRows``.

    Attributes:
        ptr: int8 [tokens, digits, K].
        unit_ptr: float32 [K / block, pitch / 2, 2].
        pitch: of units, in elements.
        tokens: rows of x.
        k: channels.
    """

    ptr: Any
    unit_ptr: Any
    pitch: Any
    tokens: Any
    k: Any


@triton.jit
def byte_columns_kernel(
    x,
    halves,
    ptr,
    halves_n,
    scales,
    constants,
    out_ptr,
    partial_ptr,
    BYTES: tl.constexpr,
):
    """Sums of a column tile over one part of the channels.

    Neighbouring programs take the same words for other tokens.

    Args:
        x: the ``ByteInput``.
        halves: descriptor of int16 [planes * K, halves_n], four codes each, the second
            plane after the first; in boxes [block, 8 warps].
        ptr: of the same.
        halves_n: of a row.
        scales: the ``Scales``, zero points as int16.
        constants: the ``Constants``, used where the output is written.
        out_ptr: [tokens, n], written where partial_ptr is None.
        partial_ptr: float32 [splits, tokens, n], or None.
        BYTES: the ``ByteColumns``.
    """
    TOKENS: tl.constexpr = BYTES.tokens
    WARPS: tl.constexpr = BYTES.warps
    CHANNELS: tl.constexpr = BYTES.channels
    BLOCK: tl.constexpr = BYTES.block
    BLOCKS: tl.constexpr = CHANNELS // BLOCK
    DIGITS: tl.constexpr = BYTES.digits
    ROWS: tl.constexpr = 16 * WARPS
    HALVES: tl.constexpr = BYTES.halves
    TILES: tl.constexpr = 2 * HALVES
    WIDTH: tl.constexpr = ROWS * TILES
    tokens, k = x.tokens, x.k
    begin_m = tl.program_id(0) * TOKENS
    begin_n = tl.program_id(1) * WIDTH
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    offs_m = begin_m + tl.arange(0, TOKENS)
    mask_m = offs_m < tokens
    offs_u = 2 * begin_m + tl.arange(0, 2 * TOKENS)
    offs_d = begin_m * DIGITS + tl.arange(0, TOKENS * DIGITS)
    mask_d = (offs_d < tokens * DIGITS)[:, None]
    x_ptr = x.ptr + offs_d.to(tl.int64)[:, None] * k
    accs = ()
    for _tile in tl.static_range(TILES):
        accs = accs + (tl.zeros([ROWS, TOKENS], dtype=tl.float32),)
    scaling = _load_scales(scales, split * CHANNELS, begin_n, k, BYTES)
    if BYTES.pdl:
        _fetch_ahead(ptr, split * CHANNELS, begin_n, halves_n, k, BYTES)
        gdc_wait()
    for first in tl.range(
        split * CHANNELS, k, splits * CHANNELS, num_stages=BYTES.stages
    ):
        more = _load_scales(scales, first + splits * CHANNELS, begin_n, k, BYTES)
        for index in tl.static_range(BLOCKS):
            begin = first + index * BLOCK
            channel = begin + tl.arange(0, BLOCK)
            values = tl.load(x_ptr + channel[None, :], mask=mask_d, other=0)
            operands = ()
            for part in tl.static_range(HALVES):
                column = begin_n // 4 + part * (ROWS // 2)
                codes = halves.load([begin, column])
                second = codes
                if BYTES.planes == 2:
                    second = halves.load([begin + k, column])
                operands = operands + _operands(codes, second, BYTES)
            units = tl.load(x.unit_ptr + begin // BLOCK * x.pitch + offs_u)
            unit, total = tl.split(tl.reshape(units, (TOKENS, 2)))
            values = tl.trans(values)
            scaled = ()
            for tile in tl.static_range(TILES):
                product = tl.dot(operands[tile], values, out_dtype=tl.int32)
                scale, zero = scaling[tile]
                sums = _scaled(product, unit, DIGITS)
                if BYTES.planes == 2:
                    shift = (120.0 - PLANE_STEPS * zero) * scale
                else:
                    # Of a thread's two columns, the first has q, the other 16 (q - 8).
                    odd = tl.arange(0, ROWS) // 8 % 2
                    shift = (8.0 * odd - zero) * (PLANE_STEPS * scale)
                    scale = tl.where(odd == 1, 1.0, PLANE_STEPS) * scale
                acc = tl.fma(sums, scale[:, None], accs[tile])
                acc = tl.fma(shift[:, None], total[None, :], acc)
                if BYTES.bits:
                    acc = _finished(acc)
                scaled = scaled + (acc,)
            accs = scaled
        scaling = more
    if BYTES.pdl:
        gdc_launch_dependents()
    for tile in tl.static_range(TILES):
        column = begin_n + _columns(tile, BYTES)
        mask_n = column < scales.n
        sums = accs[tile]
        mask = mask_n[:, None] & mask_m[None, :]
        if partial_ptr is None:
            sums += column_constants(constants, column, mask_n)[:, None]
            out = out_ptr + offs_m.to(tl.int64)[None, :] * scales.n + column[:, None]
            tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            row = (split * tokens + offs_m).to(tl.int64)
            place = partial_ptr + row[None, :] * scales.n + column[:, None]
            tl.store(place, sums, mask=mask)


@triton.jit
def _finished(acc):
    """The same numbers, before what follows: so that tiles share registers."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def _scaled(product, unit, DIGITS: tl.constexpr):
    """int32 [rows, tokens * digits] as sums: float32 [rows, tokens]."""
    number = (product + _INTEGERS).to(tl.float32, bitcast=True)
    if DIGITS == 2:
        number = tl.reshape(number, (number.shape[0], number.shape[1] // 2, 2))
        number, high = tl.split(number)
        # Rounded to one where it is small, and like any float32 where it is not.
        number = tl.fma(high - _OFFSET, 256.0, number)
    return tl.fma(number, unit[None, :], (unit * -_OFFSET)[None, :])


@triton.jit
def _fetch_ahead(ptr, first, begin_n, halves_n, k, BYTES: tl.constexpr):
    """Bring the first words into L2, which no launch before this one has written."""
    # Lines of the cache are 128 bytes, two tiles' rows of four warps.
    LINES: tl.constexpr = (BYTES.warps * BYTES.halves + 7) // 8
    column = tl.minimum(begin_n // 4 + 64 * tl.arange(0, LINES), halves_n - 1)
    row = first + tl.arange(0, BYTES.channels)[None, :, None]
    row = tl.arange(0, BYTES.planes)[:, None, None] * k + row
    prefetch(ptr + row * halves_n + column[None, None, :])


@triton.jit
def _columns(TILE: tl.constexpr, BYTES: tl.constexpr):
    """The columns of a tile's rows; the two of a thread are neighbours in memory."""
    row = tl.arange(0, 16 * BYTES.warps)
    half = (TILE // 2 * BYTES.warps + row // 16) * 8 + row % 8
    return half * 4 + TILE % 2 * 2 + row // 8 % 2


@triton.jit
def _load_scales(scales, first, begin_n, k, BYTES: tl.constexpr):
    """Scale and zero point of a group, float32 [16 warps] each, of each tile.

    A tile has fewer rows than there are threads, so that the compiler lets each load
    what it needs and passes nothing on.
    """
    group = first // BYTES.group
    loaded = ()
    for tile in tl.static_range(2 * BYTES.halves):
        column = begin_n + _columns(tile, BYTES)
        mask = (column < scales.n) & (first + 0 * column < k)
        place = scales.ptr + group * scales.n + column
        scale = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        zero = 8.0
        if scales.zero_ptr is not None:
            zeros = scales.zero_ptr + group * (scales.n // 4) + column // 4
            code = tl.load(zeros, mask=mask, other=0).to(tl.int32) >> 4 * (column % 4)
            zero = (code & 15).to(tl.float32)
        loaded = loaded + ((scale, zero),)
    return loaded


@triton.jit
def _operands(first, second, BYTES: tl.constexpr):
    """The first operands [16 warps, block] of two tiles."""
    fours = channel_fours(first, BYTES.warps)
    if BYTES.planes == 2:
        second = channel_fours(second, BYTES.warps)
        c0, c1, c2, c3 = join_bytes(fours, second, BYTES.bits)
    else:
        c0, c1, c2, c3 = spread_bytes(fours, BYTES.bits)
    return operand_rows(c0, c1), operand_rows(c2, c3)
