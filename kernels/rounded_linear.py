# SPDX-License-Identifier: Apache-2.0
"""The launcher of ``rounded_columns.py``: dense fp8 weights times rounded x."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_rsparse.formats.base import StoredWeight

from .known_launch import launch
from .launch_config import LaunchConfig
from .rounded_columns import RoundedColumns, rounded_columns_kernel
from .rsparse_linear import (
    dense_workspace,
    finish_dense,
    has_dependent_launch,
    input_of,
)
from .sizes import cdiv, next_power_of_2
from .tiles import Constants

# Of a program.
_FEWEST_TOKENS, _MOST_TOKENS = 16, 128


def rounded_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    config: LaunchConfig,
) -> Tensor:
    """x [M, K], rounded to fp8, times the whole weight: [M, N] in bfloat16.

    Args:
        x: float8_e4m3fn [M, K], contiguous; of each 16 channels in the order of
            ``rounded_blocks.ByteRows``.
        x_scales: float32 [M, 1].
        weight: of the format fp8; 16 divides N.
        bias: [N] or None.
        config: ``packed``, with 4 or 8 warps; ``block_n`` is a multiple of 16 columns
            of each, ``block_k`` the channels of an iteration.

    Raises:
        ValueError: the configuration has too few columns for its warps.
    """
    tokens, k = x.shape
    n = weight.n
    tiles = config.block_n // (16 * config.num_warps)
    if tiles < 1 or config.num_warps < 4:
        raise ValueError(
            f"block_n is {config.block_n} and num_warps {config.num_warps}, but this"
            " kernel has 4 or 8 warps of 16 columns or more"
        )
    out = torch.empty(tokens, n, dtype=torch.bfloat16, device=x.device)
    if tokens == 0 or n == 0:
        return out
    split_k = max(1, min(config.split_k, cdiv(k, config.block_k)))
    partial = dense_workspace(split_k, out)
    block_m = min(_MOST_TOKENS, max(_FEWEST_TOKENS, next_power_of_2(tokens)))
    data = weight.data.t().view(torch.int16)
    box = [config.block_k, 8 * config.num_warps]
    columns = RoundedColumns(
        tokens=block_m,
        warps=config.num_warps,
        tiles=tiles,
        channels=config.block_k,
        stages=config.num_stages,
        pdl=has_dependent_launch(x.device),
        bits=not triton.knobs.runtime.interpret,
    )
    launch(
        rounded_columns_kernel,
        x.device,
        (cdiv(tokens, block_m), cdiv(n, config.block_n), split_k),
        input_of(x),
        x_scales,
        TensorDescriptor(data, [k, n // 2], [n // 2, 1], box),
        data,
        n,
        Constants(weight.scales, None, bias),
        out,
        partial,
        tokens,
        ROUNDED=columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=columns.pdl,
    )
    if partial is not None:
        finish_dense(partial, weight.scales, bias, out, x_scales)
    return out
