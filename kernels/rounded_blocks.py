# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""x as bytes to be multiplied, with a unit for each block of channels.

In one byte, x is off by at most half a 127th of its block's largest element. In two, by
half a 32639th: a bfloat16 x is exact down to a 128th of the power of two below the
largest of its block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .known_launch import launch
from .launch_config import Rounding
from .rsparse_linear import has_dependent_launch, input_of
from .sizes import cdiv, next_power_of_2

# Channels that a program rounds.
_PART_K = 2048
# A block has a multiple of this many units, so that a tile of tokens is never masked.
_TOKENS = 128
# The magnitude of the largest element, of one signed byte and of two.
_ONE_BYTE = tl.constexpr(127.0)
_TWO_BYTES = tl.constexpr(32639.0)
# Smaller ones count as 2^-100, whose unit has a reciprocal.
_SMALLEST = tl.constexpr(27 << 23)
# ``byte_columns.py`` multiplies 1.5 * 2^23 by a unit exactly: 22 bits of it.
_UNIT_BITS = tl.constexpr(~3)


class ByteRows(NamedTuple):
    """x [M, K] in bytes.

    Attributes:
        digits: int8 [M, digits, K], the lower byte first; x is their sum, the higher
            one times 256, in units. Of each 16 channels, 8 i + 2 q + j is at 4 q + 2 i
            + j, for i and j of 0 and 1: as a thread of the matrix units takes them.
        units: float32 [K / block, M rounded up to 128, 2]: a sixteenth of the unit, and
            that times the sum of the block's numbers. NaN where an element of the block
            is infinite or NaN.
        rounding: how x was rounded.
    """

    digits: Tensor
    units: Tensor
    rounding: Rounding


def round_blocks(x: Tensor, rounding: Rounding) -> ByteRows:
    """x [M, K], any strides, as bytes; the block divides K."""
    tokens, k = x.shape
    block, count = rounding
    digits = torch.empty(tokens, count, k, dtype=torch.int8, device=x.device)
    padded = cdiv(tokens, _TOKENS) * _TOKENS
    units = torch.empty(k // block, padded, 2, dtype=torch.float32, device=x.device)
    if tokens:
        part = max(block, min(_PART_K, next_power_of_2(k)))
        launch(
            _round_blocks_kernel,
            x.device,
            (tokens, cdiv(k, part), 1),
            input_of(x),
            digits,
            units,
            padded,
            BLOCK=block,
            DIGITS=count,
            PART_K=part,
            PDL=has_dependent_launch(x.device),
            num_warps=4,
            pdl=has_dependent_launch(x.device),
        )
    return ByteRows(digits, units, rounding)


@triton.jit
def _round_blocks_kernel(
    x,
    digit_ptr,
    unit_ptr,
    padded,
    BLOCK: tl.constexpr,
    DIGITS: tl.constexpr,
    PART_K: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * PART_K
    if PDL:
        gdc_wait()
        # The product may start; it waits for what is written here.
        gdc_launch_dependents()
    place = tl.arange(0, PART_K)
    channel = turned_channel(place)
    mask = begin + place < x.k
    x_ptr = x.ptr + row * x.stride_m + begin
    values = tl.load(x_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    values = tl.reshape(values, (PART_K // BLOCK, BLOCK))
    # The bits of |x| are in the order of the numbers, NaN above infinity.
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = largest < 0x7F800000
    unit = tl.maximum(largest, _SMALLEST).to(tl.float32, bitcast=True)
    unit /= _ONE_BYTE if DIGITS == 1 else _TWO_BYTES
    unit = (unit.to(tl.int32, bitcast=True) & _UNIT_BITS).to(tl.float32, bitcast=True)
    # The sum has the integer as its lowest bits.
    number = values * (1.0 / unit)[:, None] + 12582912.0
    number = number.to(tl.int32, bitcast=True) - 0x4B400000
    number = tl.where(finite[:, None], number, 0)
    flat = tl.reshape(number, (PART_K,))
    out = digit_ptr + row * DIGITS * x.k + begin + place
    low = flat.to(tl.int8)
    tl.store(out, low, mask=mask)
    if DIGITS == 2:
        high = (flat - low.to(tl.int32)) >> 8
        tl.store(out + x.k, high.to(tl.int8), mask=mask)
    block = begin // BLOCK + tl.arange(0, PART_K // BLOCK)
    there = block < x.k // BLOCK
    unit = tl.where(finite, unit * (1.0 / 16), float("nan"))
    sums = tl.sum(number, axis=1).to(tl.float32)
    out = unit_ptr + 2 * (block.to(tl.int64) * padded + row)
    tl.store(out, unit, mask=there)
    tl.store(out + 1, unit * sums, mask=there)


@triton.jit
def turned_channel(place):
    """The channel at a place of ``ByteRows``."""
    return place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
