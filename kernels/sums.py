# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code of the kernels: sums over the channels that any token wants.

Matrices are stored with one input channel per contiguous row, so that an unwanted
channel is a row that is not read. The same sums serve the weight (over kept channels)
and the factor V (over dropped ones, ``DROPPED``). There are three ways, and README.md
describes when each is used: ``sum_listed`` lists the wanted channels first,
``sum_masked`` and ``dot_masked`` skip the others in place.
"""

import triton
import triton.language as tl

from .listed import sum_listed
from .masked import dot_masked, sum_masked


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
