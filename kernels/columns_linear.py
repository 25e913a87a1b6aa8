# SPDX-License-Identifier: Apache-2.0
"""The launcher of ``columns.py``: dense int4 and fp8 weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .columns import Columns, columns_kernel
from .known_launch import launch
from .launch_config import LaunchConfig
from .packing import Scales, Words
from .rsparse_linear import (
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
# H200, the four linears of Llama-3-8B with x rounded, 64 tokens, take 94.7, 93.6, 95.8
# and 99.2 us with none, one, two and three.
AHEAD = 1
# Of a program. More tokens of rounded x take fewer registers than of x as it is.
_FEWEST_TOKENS, _MOST_TOKENS, _MOST_ROUNDED = 16, 64, 128


def takes_columns(x: Tensor, weight: StoredWeight, config: LaunchConfig) -> bool:
    """Whether ``columns_linear`` takes a packed call, by its configuration."""
    return config.num_warps >= WARPGROUP and widens_by_bits(x, weight)


def columns_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    config: LaunchConfig,
    x_scales: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the whole weight; ``takes_columns``.

    Args:
        x: [M, K]; rows may lie apart. Or float8_e4m3fn, contiguous, with ``x_scales``:
            the product is then that of fp8 elements.
        weight: packable; of the format fp8 where x is rounded.
        bias: [N] or None.
        config: ``packed``, with 4 or 8 warps; ``block_n`` is 1, 2 or 4 words of each of
            their 8 threads that share a row, ``block_k`` the channels of an iteration.
        x_scales: float32 [M, 1], of rounded x, or None.

    Returns:
        [M, N] in x's dtype, or bfloat16 where x is rounded.

    Raises:
        ValueError: the configuration has too few or too many columns for its warps.
    """
    tokens, k = x.shape
    n = weight.n
    rounded = x_scales is not None
    dtype = torch.bfloat16 if rounded else x.dtype
    out = torch.empty(tokens, n, dtype=dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    codes = codes_per_word(weight)
    group = 0 if column_scales(weight) is not None else weight.group or k
    channels = config.block_k if group in (0, k) else min(config.block_k, group)
    split_k = max(1, min(config.split_k, cdiv(k, channels)))
    most = _MOST_ROUNDED if rounded else _MOST_TOKENS
    block_m = min(most, max(_FEWEST_TOKENS, next_power_of_2(tokens)))
    columns = Columns(
        code=weight.format.code,
        tokens=block_m,
        warps=config.num_warps,
        words=words_of_thread(config, weight),
        codes=codes,
        channels=channels,
        stages=config.num_stages,
        group=group,
        rounded=rounded,
        pdl=has_dependent_launch(x.device),
        ahead=AHEAD,
    )
    scales = column_scales(weight)
    partial = None
    if split_k > 1:
        shape = (split_k, tokens, n)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    data, pitch = rows_of(weight, words=True)
    grid = (cdiv(tokens, block_m), cdiv(n, config.block_n), split_k)
    launch(
        columns_kernel,
        x.device,
        grid,
        input_of(x),
        x_scales,
        Words(data, pitch),
        n // codes,
        Scales(None if scales is not None else weight.scales, weight.zeros, n),
        Constants(scales, None, bias),
        out,
        partial,
        tokens,
        COLUMNS=columns,
        DTYPE=_operand_dtype(x, rounded),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=columns.pdl,
    )
    if partial is not None:
        finish_dense(partial, scales, bias, out, x_scales)
    return out


def _operand_dtype(x: Tensor, rounded: bool) -> tl.dtype:
    if rounded and not triton.knobs.runtime.interpret:
        return tl.float8e4nv
    return dot_dtype(torch.float32 if rounded else x.dtype)
