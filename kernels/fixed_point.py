# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: x in fixed point, and int4 codes as bytes to be multiplied with it.

The matrix units multiply bytes and add them up in int32, exactly. With x in half
precision, unpacking a pair of codes takes two instructions; as bytes, a pair takes one,
and an operand holds twice the channels in a register.

Each block of channels has a unit of its own, a power of two: its largest x has 14 bits,
which are two signed digits of eight. A bfloat16 x is exact down to a 64th of the power
of two below the largest, and a smaller one is off by at most 2^-14 of the largest.
"""

import triton
import triton.language as tl

from .codes import PLANE_STEPS, join_eight

# Two slots hold one block.
DIGITS = tl.constexpr(2)
# Bits of the magnitude of the largest x of a block.
_BITS = tl.constexpr(14)


@triton.jit
def block_unit(x, wanted):
    """The unit of each row of x that its wanted elements allow, and 1 / unit.

    float32 [rows, 1] each. The unit is NaN where one of them is infinite or NaN, which
    makes every sum of the block NaN.
    """
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.where(wanted, bits, 0), axis=1, keep_dims=True)
    # Of smaller ones, 1 / unit would be infinite.
    exponent = tl.maximum(largest >> 23, _BITS)
    unit = tl.where(exponent == 255, 0x7FC00000, (exponent - (_BITS - 1)) << 23)
    inverse = (253 + _BITS - exponent) << 23
    return unit.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def round_to_unit(x, inverse, PLANE: tl.constexpr):
    """x in units, rounded to the nearest even: int32. Of the second plane, x / 16."""
    factor: tl.constexpr = 1.0 / PLANE_STEPS if PLANE > 0 else 1.0
    # The sum has the integer as its lowest bits, at any rounding error of one half.
    shifted = x.to(tl.float32) * (inverse * factor) + 12582912.0
    return shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def join_digits(number):
    """Two signed digits in an int16: ``number`` is 256 times the high plus the low."""
    return (number + ((number & 128) << 1)).to(tl.int16)


@triton.jit
def digit_operand(digits, DTYPE: tl.constexpr):
    """The second operand of ``tl.dot``: int8 [warps, 32, 8].

    Args:
        digits: int16 [4, 8, warps, 1, 2, 4], the rows of a thread in two units; lane l
            of the eight takes the low digit (l even) or the high one.
        DTYPE: float32 in Triton's interpreter, which knows no PTX.
    """
    WARPS: tl.constexpr = digits.shape[2]
    odd = tl.arange(0, 8)[None, :, None, None, None, None] % 2
    if tl.float32 == DTYPE:
        chosen = (digits >> 8 * odd).to(tl.int8)
    else:
        order = tl.broadcast_to(0x6420 + 0x1111 * odd, digits.shape)
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r,r,r,r",
            [digits, order],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    chosen = tl.reshape(chosen, (4, 8, WARPS, 2, 4))
    return tl.reshape(tl.permute(chosen, (2, 0, 3, 4, 1)), (WARPS, 32, 8))


@triton.jit
def byte_operand(words, W: tl.constexpr, DTYPE: tl.constexpr):
    """Words of 32 rows as the first operand of ``tl.dot``: int8 [warps, columns, 32].

    Even codes of a word are q, odd ones 16 (q - 8): ``centre_codes`` takes it back.

    Args:
        words: int32 [4, 8, warps, 2, 4, W]: row 8i + 4h + j of a step at
            [i, :, :, h, j].
        W: words of a row that one thread holds.
        DTYPE: float32 in Triton's interpreter.

    Columns are in the order of ``codes.dot_operand``; nothing leaves its thread here
    either.
    """
    WARPS: tl.constexpr = words.shape[2]
    # [4, 8, warps, W, h, 2, 2]: four rows in neighbouring registers.
    quads = tl.reshape(words, (4, 8, WARPS, 2, 2, 2, W))
    quads = tl.permute(quads, (0, 1, 2, 6, 3, 4, 5))
    even, odd = tl.split(quads)
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    quads = tl.join(tl.join(even_low, even_high), tl.join(odd_low, odd_high))
    codes = join_eight(unpack_bytes(quads, DTYPE))
    codes = tl.permute(codes, (2, 3, 9, 8, 7, 1, 0, 4, 5, 6))
    return tl.reshape(codes, (WARPS, W * 64, 32))


@triton.jit
def unpack_bytes(words, DTYPE: tl.constexpr):
    """Eight int8 tensors of the words' shape: code i, odd ones as 16 (q - 8)."""
    if tl.float32 == DTYPE:
        return (
            (words & 15).to(tl.int8),
            ((words & 0xF0) - 128).to(tl.int8),
            (words >> 8 & 15).to(tl.int8),
            ((words >> 8 & 0xF0) - 128).to(tl.int8),
            (words >> 16 & 15).to(tl.int8),
            ((words >> 16 & 0xF0) - 128).to(tl.int8),
            (words >> 24 & 15).to(tl.int8),
            ((words >> 24 & 0xF0) - 128).to(tl.int8),
        )
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 p, q, r, s, t, u;
        prmt.b32 p, $8, $9, 0x5140;
        prmt.b32 q, $10, $11, 0x5140;
        prmt.b32 t, $8, $9, 0x7362;
        prmt.b32 u, $10, $11, 0x7362;
        prmt.b32 r, p, q, 0x5410;
        prmt.b32 s, p, q, 0x7632;
        and.b32 $0, r, 0x0f0f0f0f;
        lop3.b32 $1, r, 0xf0f0f0f0, 0x80808080, 0x6A;
        and.b32 $2, s, 0x0f0f0f0f;
        lop3.b32 $3, s, 0xf0f0f0f0, 0x80808080, 0x6A;
        prmt.b32 r, t, u, 0x5410;
        prmt.b32 s, t, u, 0x7632;
        and.b32 $4, r, 0x0f0f0f0f;
        lop3.b32 $5, r, 0xf0f0f0f0, 0x80808080, 0x6A;
        and.b32 $6, s, 0x0f0f0f0f;
        lop3.b32 $7, s, 0xf0f0f0f0, 0x80808080, 0x6A;
        }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r",
        [words],
        dtype=(tl.int8,) * 8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def centre_codes(acc, x_sum):
    """Sums of digits times bytes as sums of x (q - 8): float32 [warps, columns, 4].

    Args:
        acc: int32 [warps, columns, 8]: the low digits of block b in slot 2b, the high
            ones in 2b + 1.
        x_sum: float32 [4], the sums of each block's x.
    """
    # A word's codes alternate in every eighth column.
    parts = tl.reshape(acc, (acc.shape[0], acc.shape[1] // 16, 2, 8, 4, 2))
    low, high = tl.split(parts)
    sums = low.to(tl.float32) + 256.0 * high.to(tl.float32)
    even, odd = tl.split(tl.permute(sums, (0, 1, 3, 4, 2)))
    even -= 8.0 * x_sum[None, None, None, :]
    sums = tl.permute(tl.join(even, odd * (1.0 / 16)), (0, 1, 4, 2, 3))
    return tl.reshape(sums, (acc.shape[0], acc.shape[1], 4))
