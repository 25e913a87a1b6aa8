# SPDX-License-Identifier: Apache-2.0
"""Launchers for int4 and fp8 weights: sparse, and dense with few tokens.

The device code is in ``packed.py``, launched by ``packed_linear.py``, in
``packed_wide.py``, launched by ``wide_linear.py``, in ``columns.py``, launched by
``columns_linear.py``, and in ``dense_tiles.py``; README.md says which route is for
what.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .columns_linear import columns_linear, takes_columns
from .dense_tiles import dense_kernel
from .known_launch import launch
from .launch_config import LaunchConfig
from .packed_linear import packed_linear
from .rsparse_linear import (
    dot_dtype,
    finish_dense,
    has_dependent_launch,
    input_of,
)
from .sizes import cdiv, next_power_of_2
from .stored_rows import column_scales, is_four_bit, rows_of, widens_by_bits
from .weight_tiles import Codes
from .wide_linear import takes_wide, wide_linear

# Tokens of a program of ``dense_kernel``: rows that Hopper's matrix units take at once.
TILE_TOKENS = 64
# Most tokens of a program of ``packed_linear``: of the sparse route, and of the dense.
SPARSE_TOKENS = 8
DENSE_TOKENS = 16


def sparse_linear(
    x: Tensor,
    weight: StoredWeight,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: Sequence[int],
    ranks: Sequence[int],
    config: LaunchConfig,
) -> Tensor:
    """``rsparse_linear`` for packed weights; ``config.packed`` is set."""
    return packed_linear(
        x,
        weight,
        thresholds,
        u,
        v,
        correction,
        bias,
        tuple(shard_sizes),
        tuple(ranks),
        config,
        min(SPARSE_TOKENS, next_power_of_2(max(1, x.shape[0]))),
    )


def dense_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, config: LaunchConfig
) -> Tensor:
    """x [M, K] times the whole weight, each word of it read from memory once.

    Args:
        x: [M, K]; rows may lie apart.
        weight: int4 or fp8, packable where ``config.packed``.
        bias: [N] or None.
        config: ``packed`` or ``use_dot``.
    """
    if config.packed and takes_columns(x, weight, config):
        return columns_linear(x, weight, bias, config)
    if config.packed and takes_wide(x, weight):
        return wide_linear(x, weight, bias, config)
    if config.packed:
        return packed_linear(
            x,
            weight,
            None,
            None,
            None,
            None,
            bias,
            (weight.n,),
            (0,),
            config,
            min(DENSE_TOKENS, next_power_of_2(max(1, x.shape[0]))),
        )
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    group = weight.group or k
    block_k = config.block_k if group == k else min(config.block_k, group)
    partial = torch.empty(
        config.split_k, tokens, n, dtype=torch.float32, device=x.device
    )
    grid = (
        cdiv(tokens, TILE_TOKENS),
        cdiv(n, config.block_n),
        config.split_k,
    )
    data, pitch = rows_of(weight)
    zeros = weight.zeros
    quads = is_four_bit(weight) and widens_by_bits(x, weight)
    if quads:
        data, pitch = data.view(torch.int16), 2 * pitch
        zeros = None if zeros is None else zeros.view(torch.int16)
    elif not is_four_bit(weight):
        data = data.view(torch.uint8)
    pdl = has_dependent_launch(x.device)
    launch(
        dense_kernel,
        x.device,
        grid,
        input_of(x),
        Codes(data, weight.scales, zeros, n, k, pitch),
        partial,
        tokens,
        CODE=weight.format.code,
        GROUP=group,
        BLOCK_M=TILE_TOKENS,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        STAGES=config.num_stages,
        QUADS=quads,
        DTYPE=dot_dtype(x.dtype),
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=pdl,
    )
    finish_dense(partial, column_scales(weight), bias, out)
    return out
