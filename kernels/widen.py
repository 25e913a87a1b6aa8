# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: codes as the numbers that they stand for, in the dtype of the operands.

``codes.py`` leaves powers of two, offsets and scales to x and to the sums, which is
the least work for a few tokens. From 17 on, sums outnumber weights, and it is less work
to finish the weights. A register holds two numbers, as in ``codes.py``, and the code of
NaN (0x7f) becomes 480 here too.
"""

import triton
import triton.language as tl

from .codes import PLANE_STEPS, decode_e4m3, int4_offset, join_eight

# PTX for pairs of bfloat16: codes (0, 4), (1, 5), (2, 6) and (3, 7) of a word, or four
# codes of two halves, plus 128.
UNPACK_QUADS = tl.constexpr(
    """{
    .reg .b32 t;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xEA;
    shr.u32 t, $4, 4;
    lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xEA;
    shr.u32 t, $4, 8;
    lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xEA;
    shr.u32 t, $4, 12;
    lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xEA;
    }"""
)
# Codes minus zero points, times scales.
SCALE_CODES = tl.constexpr(
    """{
    .reg .b32 t, minus, z;
    mov.b32 minus, 0xbf80bf80;
    mov.b32 z, 0x80008000;
    fma.rn.bf16x2 t, $2, minus, $1;
    fma.rn.bf16x2 $0, t, $3, z;
    }"""
)


@triton.jit
def rescale_fp8(codes, DTYPE: tl.constexpr):
    """What ``unpack_fp8`` returns, as the numbers that it stands for; exact.

    With many tokens this takes fewer instructions than to scale x.
    """
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 f, z;
            mov.b32 f, 0x7b807b80;
            mov.b32 z, 0x80008000;
            fma.rn.bf16x2 $0, $1, f, z;
            }""",
            "=r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 f;
            mov.b32 f, 0x5c005c00;
            mul.rn.f16x2 $0, $1, f;
            }""",
            "=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return codes


@triton.jit
def widen_fp8(codes, DTYPE: tl.constexpr):
    """Bytes as the float8_e4m3fn that they hold, in DTYPE; exact.

    The conversion of the instruction set issues at a sixteenth of the rate of these.
    Neighbours of the last dimension are best neighbours in a thread's registers.
    """
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p, q, f, z;
            mov.b32 f, 0x7b807b80;
            mov.b32 z, 0x80008000;
            prmt.b32 p, $2, $2, 0x1800;
            prmt.b32 q, $2, $2, 0x3a22;
            shr.s32 p, p, 4;
            shr.s32 q, q, 4;
            and.b32 p, p, 0x87f087f0;
            and.b32 q, q, 0x87f087f0;
            fma.rn.bf16x2 $0, p, f, z;
            fma.rn.bf16x2 $1, q, f, z;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p, q, f, z;
            mov.b32 f, 0x5c005c00;
            mov.b32 z, 0x80008000;
            prmt.b32 p, $2, $2, 0x1800;
            prmt.b32 q, $2, $2, 0x3a22;
            shr.s32 p, p, 1;
            shr.s32 q, q, 1;
            and.b32 p, p, 0xbf80bf80;
            and.b32 q, q, 0xbf80bf80;
            fma.rn.f16x2 $0, p, f, z;
            fma.rn.f16x2 $1, q, f, z;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return decode_e4m3(codes.to(tl.int32)).to(DTYPE)


@triton.jit
def unpack_quads(halves, DTYPE: tl.constexpr):
    """Four tensors of the shape of int16 ``halves``: code i plus ``int4_offset``."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            UNPACK_QUADS,
            "=r,=r,=r,=r,r",
            [halves],
            dtype=(tl.bfloat16,) * 4,
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, $4, 4;
            lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, $4, 8;
            lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, $4, 12;
            lop3.b32 $3, t, 0x000f000f, 0x64006400, 0xEA;
            }""",
            "=r,=r,=r,=r,r",
            [halves],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=2,
        )
    else:
        return (
            (halves & 15).to(DTYPE),
            (halves >> 4 & 15).to(DTYPE),
            (halves >> 8 & 15).to(DTYPE),
            (halves >> 12 & 15).to(DTYPE),
        )


@triton.jit
def join_planes(first, zero, second, DTYPE: tl.constexpr):
    """``first - zero + (second - 8) / 16`` of two planes' codes, in DTYPE; exact.

    The codes and the zero point come with ``int4_offset``. The result counts in
    sixteenths and lies between -16 and 16, for which eight bits of mantissa are enough.
    """
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, minus, one, steps, eight;
            mov.b32 minus, 0xbf80bf80;
            mov.b32 one, 0x3f803f80;
            mov.b32 steps, 0x3d803d80;
            mov.b32 eight, 0xc308c308;
            fma.rn.bf16x2 t, $2, minus, $1;
            fma.rn.bf16x2 u, $3, one, eight;
            fma.rn.bf16x2 $0, u, steps, t;
            }""",
            "=r,r,r,r",
            [first, zero, second],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, steps, eight;
            mov.b32 steps, 0x2c002c00;
            mov.b32 eight, 0x64086408;
            sub.rn.f16x2 t, $1, $2;
            sub.rn.f16x2 u, $3, eight;
            fma.rn.f16x2 $0, u, steps, t;
            }""",
            "=r,r,r,r",
            [first, zero, second],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return first - zero + (second - 8) * (1.0 / PLANE_STEPS)


@triton.jit
def scale_codes(codes, zero, scale, DTYPE: tl.constexpr):
    """``(codes - zero) * scale``: an exact difference, then one rounding to DTYPE."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            SCALE_CODES,
            "=r,r,r,r",
            [codes, zero, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            sub.rn.f16x2 t, $1, $2;
            mul.rn.f16x2 $0, t, $3;
            }""",
            "=r,r,r,r",
            [codes, zero, scale],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (codes - zero) * scale


@triton.jit
def split_eight(codes):
    """[..., 2, 2, 2], as a word's codes lie in memory: eight tensors [...]."""
    c0, c1 = tl.split(codes)
    c00, c10 = tl.split(c0)
    c01, c11 = tl.split(c1)
    s0, s4 = tl.split(c00)
    s2, s6 = tl.split(c10)
    s1, s5 = tl.split(c01)
    s3, s7 = tl.split(c11)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def int4_zeros(words, DTYPE: tl.constexpr):
    """The eight zero points of words, each of DTYPE and with ``int4_offset``."""
    offset = int4_offset(DTYPE)
    return (
        ((words & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 4 & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 8 & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 12 & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 16 & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 20 & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 24 & 15).to(tl.float32) + offset).to(DTYPE),
        ((words >> 28 & 15).to(tl.float32) + offset).to(DTYPE),
    )


@triton.jit
def scale_eight(codes, zeros, scales, DTYPE: tl.constexpr):
    """``scale_codes`` of eight tensors, joined (``codes.join_eight``)."""
    return join_eight(
        (
            scale_codes(codes[0], zeros[0], scales[0], DTYPE),
            scale_codes(codes[1], zeros[1], scales[1], DTYPE),
            scale_codes(codes[2], zeros[2], scales[2], DTYPE),
            scale_codes(codes[3], zeros[3], scales[3], DTYPE),
            scale_codes(codes[4], zeros[4], scales[4], DTYPE),
            scale_codes(codes[5], zeros[5], scales[5], DTYPE),
            scale_codes(codes[6], zeros[6], scales[6], DTYPE),
            scale_codes(codes[7], zeros[7], scales[7], DTYPE),
        )
    )
