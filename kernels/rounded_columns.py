# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (Triton does not compile starred tuples)
"""Device code: fp8 weights times x rounded to fp8, on a warpgroup's matrix units.

Columns of the weight are the rows of the first operand of ``wgmma``, which comes from
registers, as in ``columns.py``. Rows of the weight are copied as boxes of halves of
words, two codes each, that lie in shared memory as ``ldmatrix`` reads them fastest: a
thread gets those of two channels in a register, and two instructions make four channels
of two columns an operand.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .byte_operands import channel_fours, operand_rows
from .codes import decode_e4m3
from .programs import column_constants
from .tiles import prefetch


class RoundedColumns(NamedTuple):
    """Constants of a compiled program; numbers, for the reason of ``Tiling``.

    Attributes:
        tokens: of a program.
        warps: of a program, 4 or 8.
        tiles: of 16 columns a warp.
        channels: of an iteration.
        stages: iterations whose loads are in flight.
        pdl: programmatic dependent launch.
        bits: codes are operands as they are; otherwise float32, for the interpreter.
    """

    tokens: int
    warps: int
    tiles: int
    channels: int
    stages: int
    pdl: bool
    bits: bool


@triton.jit
def rounded_columns_kernel(
    x,
    x_scale_ptr,
    halves,
    ptr,
    n,
    constants,
    out_ptr,
    partial_ptr,
    tokens,
    ROUNDED: tl.constexpr,
):
    """Sums of a column tile over one part of the channels.

    Neighbouring programs take the same words for other tokens.

    Args:
        x: the ``Input``, fp8, channels in the order of ``ByteRows``.
        x_scale_ptr: float32 [tokens], used where the output is written.
        halves: descriptor of int16 [K, n / 2], two codes each; in boxes [channels, 8
            warps].
        ptr: of the same.
        n: columns.
        constants: the ``Constants``, used where the output is written.
        out_ptr: [tokens, n], written where partial_ptr is None.
        partial_ptr: float32 [splits, tokens, n], or None.
        tokens: rows of x.
        ROUNDED: the ``RoundedColumns``.
    """
    TOKENS: tl.constexpr = ROUNDED.tokens
    CHANNELS: tl.constexpr = ROUNDED.channels
    TILES: tl.constexpr = ROUNDED.tiles
    ROWS: tl.constexpr = 16 * ROUNDED.warps
    begin_m = tl.program_id(0) * TOKENS
    begin_n = tl.program_id(1) * (ROWS * TILES)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    offs_m = begin_m + tl.arange(0, TOKENS)
    mask_m = offs_m < tokens
    x_ptr = x.ptr + offs_m.to(tl.int64)[:, None] * x.stride_m
    accs = ()
    for _tile in tl.static_range(TILES):
        accs = accs + (tl.zeros([ROWS, TOKENS], dtype=tl.float32),)
    if ROUNDED.pdl:
        _fetch_ahead(ptr, split * CHANNELS, begin_n // 2, n // 2, x.k, ROUNDED)
        gdc_wait()
    for first in tl.range(
        split * CHANNELS, x.k, splits * CHANNELS, num_stages=ROUNDED.stages
    ):
        channel = first + tl.arange(0, CHANNELS)
        mask = mask_m[:, None] & (channel < x.k)[None, :]
        values = tl.load(x_ptr + channel[None, :], mask=mask, other=0.0)
        values = tl.trans(values)
        if not ROUNDED.bits:
            values = values.to(tl.float32)
        sums = ()
        for tile in tl.static_range(TILES):
            codes = halves.load([first, begin_n // 2 + tile * (ROWS // 2)])
            even, odd = _split_bytes(channel_fours(codes, ROUNDED.warps), ROUNDED.bits)
            operand = operand_rows(even, odd)
            acc = tl.dot(operand, values, accs[tile], input_precision="ieee")
            sums = sums + (acc,)
        accs = sums
    if ROUNDED.pdl:
        gdc_launch_dependents()
    row = tl.arange(0, ROWS)
    inner = (row // 16 * 8 + row % 8) * 2 + row // 8 % 2
    for tile in tl.static_range(TILES):
        column = begin_n + tile * ROWS + inner
        mask_n = column < n
        sums = accs[tile]
        mask = mask_n[:, None] & mask_m[None, :]
        if partial_ptr is None:
            scale = tl.load(x_scale_ptr + offs_m, mask=mask_m, other=0.0)
            sums *= scale[None, :]
            scale = tl.load(constants.scale_ptr + column, mask=mask_n, other=0.0)
            sums *= scale[:, None]
            sums += column_constants(constants, column, mask_n)[:, None]
            out = out_ptr + offs_m.to(tl.int64)[None, :] * n + column[:, None]
            tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            place = (split * tokens + offs_m).to(tl.int64)[None, :] * n
            tl.store(partial_ptr + place + column[:, None], sums, mask=mask)


@triton.jit
def _fetch_ahead(ptr, first, begin, halves_n, k, ROUNDED: tl.constexpr):
    """Bring the first words into L2, which no launch before this one has written."""
    # Lines of the cache are 128 bytes, two boxes' rows of four warps.
    LINES: tl.constexpr = (ROUNDED.warps * ROUNDED.tiles + 7) // 8
    column = tl.minimum(begin + 64 * tl.arange(0, LINES), halves_n - 1)
    row = tl.minimum(first + tl.arange(0, ROUNDED.channels), k - 1)
    prefetch(ptr + row[:, None] * halves_n + column[None, :])


@triton.jit
def _split_bytes(halves, BITS: tl.constexpr):
    """The lower and the upper byte as float8_e4m3fn, or their numbers."""
    if BITS:
        return tl.inline_asm_elementwise(
            """{
            prmt.b32 $0, $2, $3, 0x6420;
            prmt.b32 $1, $2, $3, 0x7531;
            }""",
            "=r,=r,r,r",
            [halves],
            dtype=(tl.float8e4nv, tl.float8e4nv),
            is_pure=True,
            pack=4,
        )
    else:
        number = halves.to(tl.int32)
        return decode_e4m3(number), decode_e4m3(number >> 8)
