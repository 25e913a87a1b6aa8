# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: stored words of four-bit and eight-bit codes as operands of ``tl.dot``.

A word is an int32 of eight int4 codes or of four float8_e4m3fn. On a GPU the codes are
unpacked with inline PTX, two words at a time: an instance takes two elements of its
argument that lie next to each other in a thread's registers and leaves the same two of
each result in one register. That is an elementwise function whatever the layout. Where
the two are two input channels of one column, as the callers arrange it, the register is
an operand of the matrix units as it stands: 16 instructions for 16 weights of four
bits, 12 for 8 of eight bits.

The unpacked values are ``scale * value + offset``, which the callers take back:

| code | dtype | value |
|---|---|---|
| int4 | bfloat16 | 128 + q: the code becomes the low bits of the mantissa of 128 |
| int4 | float16 | 1024 + q, likewise |
| e4m3 | bfloat16 | 2^-120 w: sign, exponent and mantissa moved, the bias unchanged |
| e4m3 | float16 | 2^-8 w, likewise |

The code of NaN (0x7f) becomes 480, not NaN: checkpoints hold finite weights. So it does
in ``widen.py``; ``dequantise_kernel``, for prompts, keeps it.
"""

import triton
import triton.language as tl

# Numbers of the formats, as in ``vllm_rsparse.formats``.
FP8 = tl.constexpr(1)
FP8_BLOCK = tl.constexpr(2)
INT4 = tl.constexpr(3)
INT8_PLANES = tl.constexpr(4)
# Steps of the second plane in a step of the first.
PLANE_STEPS = tl.constexpr(16)


@triton.jit
def int4_offset(DTYPE: tl.constexpr):
    """What ``unpack_int4`` adds to a code."""
    return 128.0 if tl.bfloat16 == DTYPE else 1024.0 if tl.float16 == DTYPE else 0.0


@triton.jit
def unpack_int4(words, DTYPE: tl.constexpr):
    """Eight tensors of the words' shape: code i plus ``int4_offset``."""
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, t;
            prmt.b32 a, $8, $9, 0x5410;
            prmt.b32 b, $8, $9, 0x7632;
            lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xEA;
            shr.u32 t, a, 4;
            lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xEA;
            shr.u32 t, a, 8;
            lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xEA;
            shr.u32 t, a, 12;
            lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xEA;
            lop3.b32 $4, b, 0x000f000f, 0x43004300, 0xEA;
            shr.u32 t, b, 4;
            lop3.b32 $5, t, 0x000f000f, 0x43004300, 0xEA;
            shr.u32 t, b, 8;
            lop3.b32 $6, t, 0x000f000f, 0x43004300, 0xEA;
            shr.u32 t, b, 12;
            lop3.b32 $7, t, 0x000f000f, 0x43004300, 0xEA;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, t;
            prmt.b32 a, $8, $9, 0x5410;
            prmt.b32 b, $8, $9, 0x7632;
            lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, a, 4;
            lop3.b32 $1, t, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, a, 8;
            lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, a, 12;
            lop3.b32 $3, t, 0x000f000f, 0x64006400, 0xEA;
            lop3.b32 $4, b, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, b, 4;
            lop3.b32 $5, t, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, b, 8;
            lop3.b32 $6, t, 0x000f000f, 0x64006400, 0xEA;
            shr.u32 t, b, 12;
            lop3.b32 $7, t, 0x000f000f, 0x64006400, 0xEA;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        return (
            (words & 15).to(DTYPE),
            (words >> 4 & 15).to(DTYPE),
            (words >> 8 & 15).to(DTYPE),
            (words >> 12 & 15).to(DTYPE),
            (words >> 16 & 15).to(DTYPE),
            (words >> 20 & 15).to(DTYPE),
            (words >> 24 & 15).to(DTYPE),
            (words >> 28 & 15).to(DTYPE),
        )


@triton.jit
def scale_second_plane(x):
    """x for rows of the second plane, whose codes count in sixteenths."""
    return (x.to(tl.float32) * (1.0 / PLANE_STEPS)).to(x.dtype)


@triton.jit
def scale_fp8_input(x, DTYPE: tl.constexpr):
    """x times a power of two that keeps products with ``unpack_fp8`` normal numbers."""
    return (x.to(tl.float32) * 2.0**64).to(DTYPE) if tl.bfloat16 == DTYPE else x


@triton.jit
def fp8_factor(DTYPE: tl.constexpr):
    """What sums of ``scale_fp8_input`` times ``unpack_fp8`` are multiplied with."""
    return 2.0**56 if tl.bfloat16 == DTYPE else 2.0**8 if tl.float16 == DTYPE else 1.0


@triton.jit
def unpack_fp8(words, DTYPE: tl.constexpr):
    """Four tensors of the words' shape; the module's table says how they are scaled.

    ``prmt`` puts a byte on top of each half of a register, and the first byte's sign
    below the second, so that an arithmetic shift of the whole moves both halves right.
    """
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p;
            prmt.b32 p, $4, $5, 0x4800;
            shr.s32 p, p, 4;
            and.b32 $0, p, 0x87f087f0;
            prmt.b32 p, $4, $5, 0x5911;
            shr.s32 p, p, 4;
            and.b32 $1, p, 0x87f087f0;
            prmt.b32 p, $4, $5, 0x6a22;
            shr.s32 p, p, 4;
            and.b32 $2, p, 0x87f087f0;
            prmt.b32 p, $4, $5, 0x7b33;
            shr.s32 p, p, 4;
            and.b32 $3, p, 0x87f087f0;
            }""",
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.bfloat16,) * 4,
            is_pure=True,
            pack=2,
        )
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p;
            prmt.b32 p, $4, $5, 0x4800;
            shr.s32 p, p, 1;
            and.b32 $0, p, 0xbf80bf80;
            prmt.b32 p, $4, $5, 0x5911;
            shr.s32 p, p, 1;
            and.b32 $1, p, 0xbf80bf80;
            prmt.b32 p, $4, $5, 0x6a22;
            shr.s32 p, p, 1;
            and.b32 $2, p, 0xbf80bf80;
            prmt.b32 p, $4, $5, 0x7b33;
            shr.s32 p, p, 1;
            and.b32 $3, p, 0xbf80bf80;
            }""",
            "=r,=r,=r,=r,r,r",
            [words],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=2,
        )
    else:
        return decode_bytes(words, DTYPE)


@triton.jit
def decode_bytes(words, DTYPE: tl.constexpr):
    """The four float8_e4m3fn of words, in DTYPE: without PTX, for the interpreter."""
    return (
        decode_e4m3(words).to(DTYPE),
        decode_e4m3(words >> 8).to(DTYPE),
        decode_e4m3(words >> 16).to(DTYPE),
        decode_e4m3(words >> 24).to(DTYPE),
    )


@triton.jit
def decode_e4m3(byte):
    """The lowest byte as the float8_e4m3fn that it holds: float32."""
    bits = (byte & 128) << 24 | (byte & 127) << 20
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def join_eight(codes):
    """The eight codes of words in three new dimensions, the lowest bit's first."""
    return tl.join(
        tl.join(tl.join(codes[0], codes[1]), tl.join(codes[2], codes[3])),
        tl.join(tl.join(codes[4], codes[5]), tl.join(codes[6], codes[7])),
    )


@triton.jit
def dot_operand(words, CODE: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr):
    """The words of 16 channels, [warps, columns, 16]: the first operand of ``tl.dot``.

    Args:
        words: int32 [4, 8, warps, 4, W]: channel 4i + j of the sixteen at
            [i, :, :, j], the words of a row in their order over [warps, 8, W].
        CODE: the format.
        W: words of a row that one thread holds.
        DTYPE: of the operand.

    A warp's columns come in the order [W, codes of a word, 8], as the registers of the
    matrix units want them; ``natural_order`` turns results back. The steps below rename
    registers and move nothing: a thread multiplies the 4 channels x W words that it
    holds (``tests/op/test_triton_compile.py`` counts the shuffles).
    """
    WARPS: tl.constexpr = words.shape[2]
    # [4, 8, warps, W, 2, 2]: pairs of channels in neighbouring registers.
    pairs = tl.reshape(words, (4, 8, WARPS, 2, 2, W))
    pairs = tl.permute(pairs, (0, 1, 2, 5, 3, 4))
    even, odd = tl.split(pairs)
    pairs = tl.join(even, odd)
    if CODE == INT4:
        c = unpack_int4(pairs, DTYPE)
        codes = join_eight(c)
        codes = tl.permute(codes, (2, 3, 8, 7, 6, 1, 0, 4, 5))
        operand = tl.reshape(codes, (WARPS, W * 64, 16))
    else:
        c = unpack_fp8(pairs, DTYPE)
        codes = tl.join(tl.join(c[0], c[1]), tl.join(c[2], c[3]))
        codes = tl.permute(codes, (2, 3, 7, 6, 1, 0, 4, 5))
        operand = tl.reshape(codes, (WARPS, W * 32, 16))
    return operand


@triton.jit
def natural_order(sums, COLUMNS: tl.constexpr, TOKENS: tl.constexpr):
    """[warps, columns, tokens] in ``dot_operand``'s order, sorted.

    The result is [warps, 8, COLUMNS / 8, tokens]; COLUMNS are those of a warp.
    """
    WARPS: tl.constexpr = sums.shape[0]
    sums = tl.reshape(sums, (WARPS, COLUMNS // 8, 8, TOKENS))
    return tl.permute(sums, (0, 2, 1, 3))
