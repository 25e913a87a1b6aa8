# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""Device code: all channels of int4 and fp8 weights, for more than a few tokens.

A tile is widened to x's type and multiplied with a block of tokens.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .codes import FP8_BLOCK
from .sums import store_partial
from .tiles import Range, Split
from .weight_tiles import block_scales, tile_of_quads, wide_tile


@triton.jit
def dense_kernel(
    x,
    weight,
    partial_ptr,
    tokens,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    QUADS: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M tokens by BLOCK_N columns over one part of the channels.

    Neighbouring programs take the same tile of the weight for other tokens, so that
    memory is read once and the L2 cache serves the rest.

    Args of note:
        x: the ``Input``.
        weight: the ``Codes``; of int4 and planes that are read by QUADS as int16.
    """
    n, k = weight.n, weight.k
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin_n = tl.program_id(1) * BLOCK_N
    split = Split(tl.program_id(2), tl.num_programs(2))
    offs_n = begin_n + tl.arange(0, BLOCK_N)
    mask_m = (offs_m < tokens)[:, None]
    x_row_ptr = x.ptr + offs_m.to(tl.int64)[:, None] * x.stride_m
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PDL:
        gdc_wait()
    for begin_k in tl.range(
        split.index * BLOCK_K, k, split.count * BLOCK_K, num_stages=STAGES
    ):
        offs_k = begin_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k
        values = tl.load(
            x_row_ptr + offs_k[None, :], mask=mask_m & mask_k[None, :], other=0.0
        )
        if QUADS:
            tile = tile_of_quads(
                weight, begin_k, begin_n, CODE, GROUP, BLOCK_N, BLOCK_K, DTYPE
            )
        else:
            tile = wide_tile(
                weight, begin_k, begin_n, CODE, GROUP, BLOCK_N, BLOCK_K, DTYPE
            ).to(DTYPE)
        if CODE == FP8_BLOCK:
            # The scale leaves the sum over its block of channels.
            scale = block_scales(weight, begin_k // GROUP, offs_n)
            acc += tl.dot(values.to(DTYPE), tile, input_precision="ieee") * scale
        else:
            acc = tl.dot(values.to(DTYPE), tile, acc, input_precision="ieee")
    if PDL:
        gdc_launch_dependents()
    if QUADS:
        acc = tl.reshape(acc, (BLOCK_M, 4, BLOCK_N // 4))
        acc = tl.reshape(tl.permute(acc, (0, 2, 1)), (BLOCK_M, BLOCK_N))
    rows, columns = Range(offs_m, tokens), Range(offs_n, n)
    store_partial(partial_ptr, acc, split, rows, columns, 0, n)
