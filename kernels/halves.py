# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: int4 codes as pairs of bfloat16 in 32-bit registers.

Where the numbers are written to memory and not multiplied, a thread wants neighbouring
columns in a register. A tensor of int32 stands for twice as many bfloat16 here, the
lower half first. BITS selects inline PTX; without it, for Triton's interpreter, the
same numbers are computed in float32.
"""

import triton
import triton.language as tl

from .widen import SCALE_CODES, UNPACK_QUADS


@triton.jit
def pairs_of_codes(words, BITS: tl.constexpr):
    """128 + codes (0, 4), (1, 5), (2, 6) and (3, 7) of words."""
    if BITS:
        return tl.inline_asm_elementwise(
            UNPACK_QUADS,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
    else:
        return (
            words & 0x000F000F | 0x43004300,
            words >> 4 & 0x000F000F | 0x43004300,
            words >> 8 & 0x000F000F | 0x43004300,
            words >> 12 & 0x000F000F | 0x43004300,
        )


@triton.jit
def scale_pairs(codes, zero, scale, BITS: tl.constexpr):
    """``widen.scale_codes`` of pairs."""
    if BITS:
        return tl.inline_asm_elementwise(
            SCALE_CODES,
            "=r,r,r,r",
            [codes, zero, scale],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        low = (_low(codes) - _low(zero)) * _low(scale)
        return _pair(low, (_high(codes) - _high(zero)) * _high(scale))


@triton.jit
def scale_plane_pairs(first, zero, second, scale, BITS: tl.constexpr):
    """``widen.join_planes`` of pairs, scaled; rounded once."""
    if BITS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, minus, one, steps, eight, z;
            mov.b32 minus, 0xbf80bf80;
            mov.b32 one, 0x3f803f80;
            mov.b32 steps, 0x3d803d80;
            mov.b32 eight, 0xc308c308;
            mov.b32 z, 0x80008000;
            fma.rn.bf16x2 t, $2, minus, $1;
            fma.rn.bf16x2 u, $3, one, eight;
            fma.rn.bf16x2 t, u, steps, t;
            fma.rn.bf16x2 $0, t, $4, z;
            }""",
            "=r,r,r,r,r",
            [first, zero, second, scale],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        # 136: the offset of a code and the zero point of a second plane.
        low = _low(first) - _low(zero) + (_low(second) - 136.0) / 16
        high = _high(first) - _high(zero) + (_high(second) - 136.0) / 16
        return _pair(low * _low(scale), high * _high(scale))


@triton.jit
def low_halves(a, b, BITS: tl.constexpr):
    """The lower halves of a and b."""
    if BITS:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;",
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return a & 0xFFFF | b << 16


@triton.jit
def high_halves(a, b, BITS: tl.constexpr):
    """The higher halves of a and b."""
    if BITS:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;",
            "=r,r,r",
            [a, b],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return a >> 16 & 0xFFFF | b >> 16 << 16


@triton.jit
def _low(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair >> 16 << 16).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    """float32 rounded to bfloat16, ties to even; finite numbers."""
    low = low.to(tl.int32, bitcast=True)
    high = high.to(tl.int32, bitcast=True)
    low += 0x7FFF + (low >> 16 & 1)
    high += 0x7FFF + (high >> 16 & 1)
    return low >> 16 & 0xFFFF | high >> 16 << 16
