# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: sums over the channels that somebody wants.

Matrices are stored one input channel a contiguous row, so that a channel nobody needs
is a row that nobody reads. The same sums serve the weight (over kept channels) and the
factor V (over dropped ones, ``DROPPED``). Three ways, README.md says which is for what:
``sum_listed`` lists the wanted channels first, ``sum_masked`` and ``dot_masked`` skip
the others in place.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .channels import list_channels, wanted_channels
from .tiles import load_tile


@triton.jit
def sum_channels(
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
    USE_DOT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN_N: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums of one column tile over this split's channels: float32 [BLOCK_M, BLOCK_N].

    Columns beyond ``end_n`` and tokens beyond ``end_m`` are zero.
    """
    if USE_DOT:
        sums = dot_masked(
            x_ptr,
            threshold_ptr,
            tile_ptr,
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
            DROPPED=DROPPED,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            STAGES=STAGES,
            DOT_DTYPE=DOT_DTYPE,
            WIDE=WIDE,
            PDL=PDL,
        )
    elif LISTED:
        sums = sum_listed(
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
            DROPPED=DROPPED,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            PASSES=BLOCK_K // ROWS,
            ROWS=ROWS,
            CHANNELS=CHANNELS,
            EVEN_N=EVEN_N,
            WIDE=WIDE,
            PDL=PDL,
        )
    else:
        sums = sum_masked(
            x_ptr,
            threshold_ptr,
            tile_ptr,
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
            DROPPED=DROPPED,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            PASSES=BLOCK_K // ROWS,
            ROWS=ROWS,
            WIDE=WIDE,
            PDL=PDL,
        )
    return sums


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

    Every load and every multiplication is of a wanted row. Masking in place issues
    both for dropped rows too, 80 instructions for each 16 bytes wanted against 27, and
    issuing them, not memory, was the limit (gate_up with all channels dropped took 25
    of 32 us; listed 3.7).
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
        # The next ones arrive along with these; the lists are padded by one step.
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


@triton.jit
def sum_masked(
    x_ptr,
    threshold_ptr,
    tile_ptr,
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
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Column sums of BLOCK_M tokens on the vector units: float32 [BLOCK_M, BLOCK_N].

    Saves the wait for a list, which pays where there is little to read. An iteration
    reads ROWS x PASSES channels. ROWS is what all threads read with one 16-byte load
    each, so the sum over PASSES stays inside a thread; threads meet once, after the
    loop. Splits take turns, so that at any time all programs read one stretch of
    memory.
    """
    # [ROWS, PASSES]: a thread's channels follow one another, to read x in one piece.
    # PASSES comes after ROWS because Triton spreads warps over the leading dimensions.
    rows = tl.arange(0, ROWS)[:, None] * PASSES + tl.arange(0, PASSES)[None, :]
    mask_m = (offs_m < end_m)[:, None, None]
    mask_n = (offs_n < end_n)[None, None, None, :]
    x_row_ptr = x_ptr + offs_m.to(tl.int64)[:, None, None] * stride_xm
    step: tl.constexpr = ROWS * PASSES
    offs_k = split * step + rows
    mask_k = offs_k < k
    if PDL:
        # Into L2 only, volatile to be issued at all: no value is used before the wait.
        tl.load(threshold_ptr + offs_k, mask=mask_k, volatile=True)
        gdc_wait()
    x = tl.load(x_row_ptr + offs_k[None, :, :], mask=mask_m & mask_k, other=0.0)
    threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
    acc = tl.zeros([BLOCK_M, ROWS, BLOCK_N], dtype=tl.float32)
    for _ in range(split * step, k, splits * step):
        # [BLOCK_M, ROWS, PASSES]
        x_wide = x.to(tl.float32)
        wanted = wanted_channels(x_wide, threshold[None, :, :], DROPPED)
        wanted &= mask_m & mask_k[None, :, :]
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        # [1, ROWS, PASSES, BLOCK_N]: of the product's rank, or Triton moves the tile
        # between layouts through shared memory.
        tile = load_tile(
            tile_ptr,
            offs_k[None, :, :, None],
            offs_n[None, None, None, :],
            stride_k,
            stride_n,
            read[None, :, :, None] & mask_n,
            WIDE,
        )
        # An unwanted x may be infinite, and infinity times the tile's zero is NaN.
        factor = tl.where(wanted, x_wide, 0.0)
        # What the next iteration needs to choose its rows arrives along with these.
        offs_k += splits * step
        mask_k = offs_k < k
        x = tl.load(x_row_ptr + offs_k[None, :, :], mask=mask_m & mask_k, other=0.0)
        threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
        acc += tl.sum(factor[:, :, :, None] * tile.to(tl.float32), axis=2)
    return tl.sum(acc, axis=1)


@triton.jit
def dot_masked(
    x_ptr,
    threshold_ptr,
    tile_ptr,
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
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Column sums of up to BLOCK_M tokens on the matrix units: [BLOCK_M, BLOCK_N].

    Each token has its own mask; a channel is read when any of the tokens wants it.
    """
    mask_m = (offs_m < end_m)[:, None]
    mask_n = (offs_n < end_n)[None, :]
    x_row_ptr = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PDL:
        gdc_wait()
    for start_k in tl.range(split * BLOCK_K, k, splits * BLOCK_K, num_stages=STAGES):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k
        mask_x = mask_m & mask_k[None, :]
        x = tl.load(x_row_ptr + offs_k[None, :], mask=mask_x, other=0.0)
        threshold = tl.load(threshold_ptr + offs_k, mask=mask_k, other=0.0)
        wanted = wanted_channels(x, threshold[None, :], DROPPED) & mask_x
        read = tl.max(wanted.to(tl.int32), axis=0) > 0
        tile = load_tile(
            tile_ptr,
            offs_k[:, None],
            offs_n[None, :],
            stride_k,
            stride_n,
            read[:, None] & mask_n,
            WIDE,
        )
        x = tl.where(wanted, x, 0.0)
        # "ieee": float32 inputs would be rounded to tf32 otherwise.
        acc = tl.dot(x.to(DOT_DTYPE), tile.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc
