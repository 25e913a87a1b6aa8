# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton does not compile starred tuples)
"""Device code: int8-planes times x in bytes, on a warpgroup's matrix units.

As in ``columns.py``, columns of the weight are the rows of the first operand of
``wgmma``, which comes from registers, and x is the second. The codes of both planes are
one byte, 16 q1 + q2 - 128. The matrix units multiply it with a byte of x
(``rounded_blocks.py``) and add up a block of channels in int32, exactly; the sum is
scaled then. A block never leaves its group.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import PLANE_STEPS
from .programs import column_constants

# Added to the bits of a float32, an integer below 2^22 counts its last bits.
_INTEGERS = tl.constexpr(0x4B400000)
_OFFSET = tl.constexpr(12582912.0)


class ByteColumns(NamedTuple):
    """Constants of a compiled program; numbers, for the reason of ``Tiling``.

    Attributes:
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
        ptr: int16 [2 K, halves_n], four codes each; the second plane after the first.
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
    half = begin_n // 4 + tl.arange(0, ROWS // 2)
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
            place = ptr + channel[:, None] * halves_n + half[None, :]
            operands = ()
            for part in tl.static_range(HALVES):
                beside = part * (ROWS // 2)
                mask = (half + beside < halves_n)[None, :]
                codes = tl.load(place + beside, mask=mask, other=0)
                second = tl.load(place + beside + k * halves_n, mask=mask, other=0)
                operands = operands + _operands(codes, second, BYTES)
            units = tl.load(x.unit_ptr + begin // BLOCK * x.pitch + offs_u)
            unit, total = tl.split(tl.reshape(units, (TOKENS, 2)))
            values = tl.trans(values)
            scaled = ()
            for tile in tl.static_range(TILES):
                product = tl.dot(operands[tile], values, out_dtype=tl.int32)
                scale, zero = scaling[tile]
                sums = _scaled(product, unit, DIGITS)
                acc = tl.fma(sums, scale[:, None], accs[tile])
                shift = (120.0 - PLANE_STEPS * zero) * scale
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
    row = tl.arange(0, 2)[:, None, None] * k + row
    place = ptr + row * halves_n + column[None, None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [place.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


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
    """The first operands [16 warps, block] of two tiles.

    The compiler loads halves by ``ldmatrix``, which leaves those of two channels in a
    register, as the order of x expects it (``ByteRows``).
    """
    c0, c1, c2, c3 = join_bytes(_fours(first, BYTES), _fours(second, BYTES), BYTES.bits)
    return _rows(c0, c1, BYTES), _rows(c2, c3, BYTES)


@triton.jit
def _fours(halves, BYTES: tl.constexpr):
    """[4, 8, warps, steps, 2, 4]: four channels in neighbouring registers."""
    STEPS: tl.constexpr = BYTES.block // 32
    fours = tl.reshape(halves, (STEPS, 2, 2, 4, 2, BYTES.warps, 8))
    even, odd = tl.split(tl.permute(fours, (3, 6, 5, 0, 1, 2, 4)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    fours = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(fours, (4, 8, BYTES.warps, STEPS, 2, 4))


@triton.jit
def _rows(even, odd, BYTES: tl.constexpr):
    codes = tl.permute(tl.join(even, odd), (2, 6, 1, 3, 4, 0, 5))
    return tl.reshape(codes, (16 * BYTES.warps, BYTES.block))


@triton.jit
def join_bytes(first, second, BITS: tl.constexpr):
    """Four int8 tensors of the planes' shape: 16 q1 + q2 - 128 of code i.

    Args:
        first, second: int16, four codes each; neighbours of the last dimension, 4, are
            best neighbours in a thread's registers.
        BITS: by PTX.
    """
    if BITS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p, q, r, s, t;
            prmt.b32 p, $4, $5, 0x6420;
            prmt.b32 q, $4, $5, 0x7531;
            prmt.b32 r, $6, $7, 0x6420;
            prmt.b32 s, $6, $7, 0x7531;
            xor.b32 p, p, 0x88888888;
            xor.b32 q, q, 0x88888888;
            shl.b32 t, p, 4;
            lop3.b32 $0, t, r, 0xf0f0f0f0, 0xE4;
            shr.u32 t, r, 4;
            lop3.b32 $1, p, t, 0xf0f0f0f0, 0xE4;
            shl.b32 t, q, 4;
            lop3.b32 $2, t, s, 0xf0f0f0f0, 0xE4;
            shr.u32 t, s, 4;
            lop3.b32 $3, q, t, 0xf0f0f0f0, 0xE4;
            }""",
            "=r,=r,=r,=r,r,r,r,r",
            [first, second],
            dtype=(tl.int8,) * 4,
            is_pure=True,
            pack=4,
        )
    else:
        p = first.to(tl.int32)
        q = second.to(tl.int32)
        return (
            ((p & 15) * 16 + (q & 15) - 128).to(tl.int8),
            ((p >> 4 & 15) * 16 + (q >> 4 & 15) - 128).to(tl.int8),
            ((p >> 8 & 15) * 16 + (q >> 8 & 15) - 128).to(tl.int8),
            ((p >> 12 & 15) * 16 + (q >> 12 & 15) - 128).to(tl.int8),
        )
