# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: halves of words as bytes, the first operand of ``wgmma``."""

import triton
import triton.language as tl


@triton.jit
def channel_fours(halves, WARPS: tl.constexpr):
    """int16 [channels, 8 warps] as [4, 8, warps, channels / 32, 2, 4].

    The last are four channels in neighbouring registers of a thread. The compiler loads
    halves by ``ldmatrix``, which leaves those of two channels in a register, as the
    order of x expects it (``ByteRows``).
    """
    STEPS: tl.constexpr = halves.shape[0] // 32
    fours = tl.reshape(halves, (STEPS, 2, 2, 4, 2, WARPS, 8))
    even, odd = tl.split(tl.permute(fours, (3, 6, 5, 0, 1, 2, 4)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    fours = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(fours, (4, 8, WARPS, STEPS, 2, 4))


@triton.jit
def operand_rows(even, odd):
    """The first operand [16 warps, channels]: two columns of each thread's halves.

    Args:
        even, odd: bytes in the order of ``channel_fours``.
    """
    ROWS: tl.constexpr = 16 * even.shape[2]
    CHANNELS: tl.constexpr = 32 * even.shape[3]
    codes = tl.permute(tl.join(even, odd), (2, 6, 1, 3, 4, 0, 5))
    return tl.reshape(codes, (ROWS, CHANNELS))


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


@triton.jit
def spread_bytes(halves, BITS: tl.constexpr):
    """Four int8 tensors: code q of even i, 16 (q - 8) of odd i; as ``join_bytes``."""
    if BITS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 p, q;
            prmt.b32 p, $4, $5, 0x6420;
            prmt.b32 q, $4, $5, 0x7531;
            and.b32 $0, p, 0x0f0f0f0f;
            lop3.b32 $1, p, 0xf0f0f0f0, 0x80808080, 0x6A;
            and.b32 $2, q, 0x0f0f0f0f;
            lop3.b32 $3, q, 0xf0f0f0f0, 0x80808080, 0x6A;
            }""",
            "=r,=r,=r,=r,r,r",
            [halves],
            dtype=(tl.int8,) * 4,
            is_pure=True,
            pack=4,
        )
    else:
        p = halves.to(tl.int32)
        return (
            (p & 15).to(tl.int8),
            ((p & 0xF0) - 128).to(tl.int8),
            (p >> 8 & 15).to(tl.int8),
            ((p >> 8 & 0xF0) - 128).to(tl.int8),
        )
