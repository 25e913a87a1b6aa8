# SPDX-License-Identifier: Apache-2.0
"""The launcher of ``packed_wide.py``: dense int4 and fp8 weights, from 17 tokens on."""

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .codes import FP8, INT4
from .known_launch import launch
from .launch_config import LaunchConfig
from .packed_wide import Wide, wide_kernel
from .packing import STEP, Scales, Words
from .rsparse_linear import (
    dense_workspace,
    dot_dtype,
    finish_dense,
    has_dependent_launch,
    input_of,
)
from .sizes import cdiv, next_power_of_2
from .stored_rows import codes_per_word, column_scales, rows_of, widens_by_bits
from .tiles import Constants

# Sums of a program, columns times tokens: 128 registers a thread.
_SUMS = 64 * 64
_MOST_TOKENS = 64
# Up to 16 tokens ``packed.py`` is as fast or faster (docs/notes/kernels-quantized.md).
_FEWEST_TOKENS = 17


def takes_wide(x: Tensor, weight: StoredWeight) -> bool:
    """Whether ``wide_linear`` takes the call; ``packed_linear`` takes all."""
    code = weight.format.code
    whole = weight.group % (2 * STEP.value) == 0
    takes = code == FP8.value or (code == INT4.value and whole)
    return x.shape[0] >= _FEWEST_TOKENS and takes and widens_by_bits(x, weight)


def wide_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, config: LaunchConfig
) -> Tensor:
    """x [M, K] times the whole weight, widened in registers.

    Args:
        x: [M, K]; rows may lie apart.
        weight: int4 or fp8, packable; ``takes_wide``.
        bias: [N] or None.
        config: ``packed`` is set. ``block_k`` is not used: an iteration takes as many
            channels as ``num_stages`` has steps in flight, 32 or 64.

    Raises:
        ValueError: the configuration has several warps.
    """
    if config.num_warps != 1:
        raise ValueError(
            f"num_warps is {config.num_warps}, but a packed program of"
            f" {_FEWEST_TOKENS} tokens or more has one warp"
        )
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if n == 0:
        return out
    per_column = weight.format.code == FP8.value
    group = 0 if per_column else weight.group
    steps = 4 if config.num_stages >= 4 and group % 64 == 0 else 2
    channels = steps * STEP.value
    split_k = max(1, min(config.split_k, cdiv(k, channels)))
    block_m = min(
        _MOST_TOKENS,
        max(8, _SUMS // config.block_n),
        next_power_of_2(tokens),
    )
    wide = Wide(
        code=weight.format.code,
        tokens=block_m,
        columns=config.block_n,
        words=config.block_n // 8 // codes_per_word(weight),
        steps=steps,
        group=group,
        even_n=n % config.block_n == 0,
        even_k=k % (channels * split_k) == 0,
        pdl=has_dependent_launch(x.device),
    )
    scales = column_scales(weight)
    partial = dense_workspace(split_k, out)
    data, pitch = rows_of(weight, words=True)
    grid = (cdiv(n, config.block_n), cdiv(tokens, block_m), split_k)
    launch(
        wide_kernel,
        x.device,
        grid,
        input_of(x),
        Words(data, pitch),
        Scales(None if per_column else weight.scales, weight.zeros, n),
        Constants(scales, None, bias),
        out,
        partial,
        tokens,
        WIDE=wide,
        DTYPE=dot_dtype(x.dtype),
        num_warps=1,
        num_stages=1,
        pdl=wide.pdl,
    )
    if partial is not None:
        finish_dense(partial, scales, bias, out)
    return out
