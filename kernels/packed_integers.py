# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""Device code: the scales of all int4 blocks of a program, for few tokens in integers.

Blocks stay apart in one accumulator (``packed_groups.py``), two slots a token each.
"""

import triton
import triton.language as tl

from .fixed_point import DIGITS, centre_codes
from .packed_groups import group_of
from .packing import SLOTS

# Most tokens of a call, and pairs of a block and a token in a program.
TOKENS = 2
PAIRS = tl.constexpr(SLOTS.value // DIGITS.value)
# Words of a thread whose scales it keeps through the loop: 4 registers a word.
HELD_WORDS = tl.constexpr(2)


@triton.jit
def scaled_integers(
    acc, scales, lists, columns, split, k, early, PACKING: tl.constexpr
):
    """The sums of all blocks, scaled and added: float32 [warps, columns, TOKENS].

    A block's sum is s u (sum of x (q - 8) - (z - 8) sum of x), with x in units u. A
    second plane has the zero point 8.

    Args of note:
        acc: int32 [warps, columns, 8], as ``centre_codes`` takes it.
        columns: the ``Bounds`` of the tile.
        early: what ``load_scales`` gave before the loop.
    """
    W: tl.constexpr = PACKING.words
    WARPS: tl.constexpr = PACKING.warps
    M: tl.constexpr = PACKING.tokens
    LISTED: tl.constexpr = PACKING.blocks * M
    pair = tl.arange(0, PAIRS)
    there = pair < LISTED
    unit = tl.load(lists.block_ptr + pair, mask=there, other=0.0)
    first = tl.load(lists.block_ptr + LISTED + pair, mask=there, other=0.0)
    x_sum = first
    if PACKING.planes > 1:
        second = lists.block_ptr + 2 * LISTED + pair
        x_sum += tl.load(second, mask=there, other=0.0)
    sums = centre_codes(acc, x_sum)
    if W > HELD_WORDS:
        early = load_scales(scales, columns, split, k, False, PACKING)
    if scales.zero_ptr is not None:
        codes = (early[1] >> 4 * tl.arange(0, 8)[None, None, None, None, :]) & 15
        # [4, 8, warps, W, 8] -> [warps, W, code, 8, 4]
        codes = tl.permute(codes - 8, (2, 3, 4, 1, 0)).to(tl.float32)
        zeros = tl.reshape(codes, (WARPS, 64 * W, PAIRS))
        sums -= zeros * first[None, None, :]
    parts = tl.permute(early[0], (2, 3, 4, 1, 0))
    parts = tl.reshape(parts, (WARPS, 64 * W, PAIRS)).to(tl.float32)
    sums *= parts * unit[None, None, :]
    if M == 1:
        return tl.sum(sums, axis=2, keep_dims=True)
    else:
        return tl.sum(tl.reshape(sums, (WARPS, 64 * W, PAIRS // M, M)), axis=2)


@triton.jit
def load_scales(scales, columns, split, k, EARLY: tl.constexpr, PACKING: tl.constexpr):
    """Scales [4, 8, warps, W, 8] and packed zero points [4, 8, warps, W, 1].

    One pair a thread, the first dimension; without zero points, scales only. EARLY is
    for before the loop: volatile, as the compiler would move other loads to where their
    values are used. A thread that has few of them keeps them (``HELD_WORDS``), for
    others they are on their way into L2.
    """
    W: tl.constexpr = PACKING.words
    width = columns.end - columns.begin
    block = tl.arange(0, PAIRS)[:, None, None, None, None] // PACKING.tokens
    lane = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, PACKING.warps)[None, None, :, None, None]
    word = (warp * 8 + lane) * W + tl.arange(0, W)[None, None, None, :, None]
    inner = word * 8 + tl.arange(0, 8)[None, None, None, None, :]
    group = group_of(block, split, k, PACKING).to(tl.int64)
    row = scales.ptr + group * scales.n + columns.begin
    if PACKING.even_n:
        parts = tl.load(row + inner, volatile=EARLY)
    else:
        parts = tl.load(row + inner, mask=inner < width, other=0.0, volatile=EARLY)
    loaded = (parts,)
    if scales.zero_ptr is not None:
        row = scales.zero_ptr + group * (scales.n // 8) + columns.begin // 8
        packed = tl.load(row + word, mask=word < width // 8, other=0, volatile=EARLY)
        loaded = (parts, packed)
    return loaded
