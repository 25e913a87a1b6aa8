# SPDX-License-Identifier: Apache-2.0
"""The launcher of ``columns.py``: dense int4 and fp8 weights."""

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .columns import Columns, columns_kernel
from .known_launch import launch
from .launch_config import LaunchConfig
from .packing import Scales, Words
from .rsparse_linear import (
    dense_workspace,
    dot_dtype,
    finish_dense,
    has_dependent_launch,
    input_of,
)
from .sizes import cdiv, next_power_of_2
from .stored_rows import (
    codes_per_word,
    column_scales,
    rows_of,
    widens_by_bits,
    words_of_thread,
)
from .tiles import Constants

# Warps that ``wgmma`` takes its first operand from.
WARPGROUP = 4
# Iterations whose words are asked for while the launch before this one ends: on the
# H200, the four linears of Llama-3-8B in fp8 with x rounded, 64 tokens, took 94.7,
# 93.6, 95.8 and 99.2 us with none, one, two and three.
AHEAD = 1
# Of a program.
_FEWEST_TOKENS, _MOST_TOKENS = 16, 64


def takes_columns(x: Tensor, weight: StoredWeight, config: LaunchConfig) -> bool:
    """Whether ``columns_linear`` takes a packed call, by its configuration."""
    return config.num_warps >= WARPGROUP and widens_by_bits(x, weight)


def columns_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    config: LaunchConfig,
) -> Tensor:
    """x [M, K] times the whole weight; ``takes_columns``.

    Args:
        x: [M, K]; rows may lie apart.
        weight: packable.
        bias: [N] or None.
        config: ``packed``, with 4 or 8 warps; ``block_n`` is 1, 2 or 4 words of each of
            their 8 threads that share a row, ``block_k`` the channels of an iteration.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: the configuration has too few or too many columns for its warps.
    """
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    codes = codes_per_word(weight)
    group = 0 if column_scales(weight) is not None else weight.group or k
    channels = config.block_k if group in (0, k) else min(config.block_k, group)
    split_k = max(1, min(config.split_k, cdiv(k, channels)))
    block_m = min(_MOST_TOKENS, max(_FEWEST_TOKENS, next_power_of_2(tokens)))
    columns = Columns(
        code=weight.format.code,
        tokens=block_m,
        warps=config.num_warps,
        words=words_of_thread(config, weight),
        codes=codes,
        channels=channels,
        stages=config.num_stages,
        group=group,
        pdl=has_dependent_launch(x.device),
        ahead=AHEAD,
    )
    scales = column_scales(weight)
    partial = dense_workspace(split_k, out)
    data, pitch = rows_of(weight, words=True)
    grid = (cdiv(tokens, block_m), cdiv(n, config.block_n), split_k)
    launch(
        columns_kernel,
        x.device,
        grid,
        input_of(x),
        Words(data, pitch),
        n // codes,
        Scales(None if scales is not None else weight.scales, weight.zeros, n),
        Constants(scales, None, bias),
        out,
        partial,
        tokens,
        COLUMNS=columns,
        DTYPE=dot_dtype(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=columns.pdl,
    )
    if partial is not None:
        finish_dense(partial, scales, bias, out)
    return out
