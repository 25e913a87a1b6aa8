# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: sums over channels that are listed first."""

import triton
import triton.language as tl

from .channels import list_channels
from .tiles import load_tile


@triton.jit
def sum_listed(
    x,
    threshold_ptr,
    matrix,
    lists,
    tokens,
    columns,
    split,
    DROPPED: tl.constexpr,
    TILING: tl.constexpr,
):
    """Column sums of BLOCK_M tokens on the vector units: float32 [BLOCK_M, BLOCK_N].

    Only wanted rows are loaded and multiplied. Masking in place issues both for dropped
    rows too, 80 instructions per 16 wanted bytes against 27, and instruction issue, not
    memory, was the limit (gate_up with all channels dropped took 25 of 32 us; listed
    3.7).
    """
    BLOCK_M: tl.constexpr = TILING.block_m
    BLOCK_N: tl.constexpr = TILING.block_n
    ROWS: tl.constexpr = TILING.rows
    PASSES: tl.constexpr = TILING.block_k // TILING.rows
    CHANNELS: tl.constexpr = TILING.channels
    step: tl.constexpr = ROWS * PASSES
    count = list_channels(
        x,
        threshold_ptr,
        lists,
        tokens,
        split,
        DROPPED=DROPPED,
        BLOCK_M=BLOCK_M,
        CHANNELS=CHANNELS,
        PADDING=step,
        PDL=TILING.pdl,
    )
    # [ROWS, PASSES], ordered as in sum_masked.
    rows = tl.arange(0, ROWS)[:, None] * PASSES + tl.arange(0, PASSES)[None, :]
    offs_n = columns.offsets[None, None, None, :]
    mask_n = offs_n < columns.end
    value_row = tl.arange(0, BLOCK_M)[:, None, None] * (CHANNELS + step)
    value_row_ptr = lists.value_ptr + value_row
    acc = tl.zeros([BLOCK_M, ROWS, BLOCK_N], dtype=tl.float32)
    offs_k = tl.load(lists.channel_ptr + rows)
    value = tl.load(value_row_ptr + rows[None, :, :]).to(tl.float32)
    whole = count // step * step
    for start in range(0, whole, step):
        tile = load_tile(
            matrix,
            offs_k[None, :, :, None],
            offs_n,
            None if TILING.even_n else mask_n,
            TILING.wide,
        )
        # The next ones are loaded along with these; the lists are padded by one step.
        offs_k = tl.load(lists.channel_ptr + start + step + rows)
        next_value = tl.load(value_row_ptr + start + step + rows[None, :, :])
        acc += tl.sum(value[:, :, :, None] * tile.to(tl.float32), axis=2)
        value = next_value.to(tl.float32)
    if whole < count:
        live = (whole + rows < count)[None, :, :]
        tile = load_tile(
            matrix,
            offs_k[None, :, :, None],
            offs_n,
            live[:, :, :, None] & mask_n,
            TILING.wide,
        )
        value = tl.where(live, value, 0.0)
        acc += tl.sum(value[:, :, :, None] * tile.to(tl.float32), axis=2)
    return tl.sum(acc, axis=1)
