# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: sums over channels that are listed first."""

import triton
import triton.language as tl

from .channels import list_channels
from .tiles import load_tile


@triton.jit
def sum_listed(
    x_ptr,
    threshold_ptr,
    tile_ptr,
    list_ptr,
    value_ptr,
    stride_xm,
    stride_k,
    stride_n,
    offs_m,
    end_m,
    offs_n,
    end_n,
    k,
    split,
    splits,
    DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PASSES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Column sums of BLOCK_M tokens on the vector units: float32 [BLOCK_M, BLOCK_N].

    Only wanted rows are loaded and multiplied. Masking in place issues both for dropped
    rows too, 80 instructions per 16 wanted bytes against 27, and instruction issue, not
    memory, was the limit (gate_up with all channels dropped took 25 of 32 us; listed
    3.7).
    """
    step: tl.constexpr = ROWS * PASSES
    count = list_channels(
        x_ptr,
        threshold_ptr,
        list_ptr,
        value_ptr,
        stride_xm,
        offs_m,
        end_m,
        k,
        split,
        splits,
        DROPPED=DROPPED,
        BLOCK_M=BLOCK_M,
        CHANNELS=CHANNELS,
        PADDING=step,
        PDL=PDL,
    )
    # [ROWS, PASSES], ordered as in sum_masked.
    rows = tl.arange(0, ROWS)[:, None] * PASSES + tl.arange(0, PASSES)[None, :]
    offs_n = offs_n[None, None, None, :]
    mask_n = offs_n < end_n
    value_row_ptr = value_ptr + tl.arange(0, BLOCK_M)[:, None, None] * (CHANNELS + step)
    acc = tl.zeros([BLOCK_M, ROWS, BLOCK_N], dtype=tl.float32)
    offs_k = tl.load(list_ptr + rows)
    x = tl.load(value_row_ptr + rows[None, :, :]).to(tl.float32)
    whole = count // step * step
    for start in range(0, whole, step):
        tile = load_tile(
            tile_ptr,
            offs_k[None, :, :, None],
            offs_n,
            stride_k,
            stride_n,
            None if EVEN_N else mask_n,
            WIDE,
        )
        # The next ones are loaded along with these; the lists are padded by one step.
        offs_k = tl.load(list_ptr + start + step + rows)
        next_x = tl.load(value_row_ptr + start + step + rows[None, :, :])
        acc += tl.sum(x[:, :, :, None] * tile.to(tl.float32), axis=2)
        x = next_x.to(tl.float32)
    if whole < count:
        live = (whole + rows < count)[None, :, :]
        tile = load_tile(
            tile_ptr,
            offs_k[None, :, :, None],
            offs_n,
            stride_k,
            stride_n,
            live[:, :, :, None] & mask_n,
            WIDE,
        )
        x = tl.where(live, x, 0.0)
        acc += tl.sum(x[:, :, :, None] * tile.to(tl.float32), axis=2)
    return tl.sum(acc, axis=1)
