# SPDX-License-Identifier: Apache-2.0
"""The launcher of ``byte_columns.py``: dense int8-planes and int4 times x in bytes."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_rsparse.formats.base import StoredWeight

from .byte_columns import ByteColumns, ByteInput, byte_columns_kernel
from .known_launch import launch
from .launch_config import LaunchConfig, Rounding
from .packing import Scales
from .rounded_blocks import round_blocks
from .rsparse_linear import dense_workspace, finish_dense, has_dependent_launch
from .sizes import cdiv, next_power_of_2
from .tiles import Constants

# Columns of a program that wgmma takes with one 16-bit half of a word a thread, by
# warp.
_WARP_COLUMNS = 32
# The second operand's columns of a program, tokens times digits: more take more
# registers than there are.
_FEWEST_COLUMNS, _MOST_COLUMNS = 16, 64


def byte_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    config: LaunchConfig,
    rounding: Rounding,
) -> Tensor:
    """x [M, K], rounded to bytes, times the whole weight.

    Args:
        x: [M, K], any strides.
        weight: of the format int8-planes or int4; ``has_boxes``.
        bias: [N] or None.
        config: ``packed``, with 4 or 8 warps; ``block_n`` is 32 or 64 columns of each,
            ``block_k`` the channels of an iteration, at most a group.
        rounding: of x; its block is at most a group.

    Returns:
        [M, N] in x's dtype.

    Raises:
        ValueError: the configuration has too few or too many columns for its warps.
    """
    tokens, k = x.shape
    n, group = weight.n, weight.group or k
    assert weight.scales is not None
    halves = config.block_n // (_WARP_COLUMNS * config.num_warps)
    if halves not in (1, 2) or config.num_warps < 4:
        raise ValueError(
            f"block_n is {config.block_n} and num_warps {config.num_warps}, but this"
            " kernel has 4 or 8 warps of 32 or 64 columns each"
        )
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    channels = min(config.block_k, group)
    rounding = Rounding(min(rounding.block, channels), rounding.digits)
    rows = round_blocks(x, rounding)
    split_k = max(1, min(config.split_k, k // channels))
    partial = dense_workspace(split_k, out)
    most = max(_FEWEST_COLUMNS, next_power_of_2(tokens * rounding.digits))
    block_m = min(_MOST_COLUMNS, most) // rounding.digits
    data = weight.data.view(torch.int16).view(-1, n // 4)
    box = [rounding.block, 8 * config.num_warps]
    zeros = None if weight.zeros is None else weight.zeros.view(torch.int16)
    columns = ByteColumns(
        planes=data.shape[0] // k,
        tokens=block_m,
        warps=config.num_warps,
        halves=halves,
        channels=channels,
        block=rounding.block,
        digits=rounding.digits,
        group=group,
        stages=config.num_stages,
        pdl=has_dependent_launch(x.device),
        bits=not triton.knobs.runtime.interpret,
    )
    launch(
        byte_columns_kernel,
        x.device,
        (cdiv(tokens, block_m), cdiv(n, config.block_n), split_k),
        ByteInput(rows.digits, rows.units, rows.units.stride(0), tokens, k),
        TensorDescriptor(data, list(data.shape), [n // 4, 1], box),
        data,
        n // 4,
        Scales(weight.scales, zeros, n),
        Constants(None, None, bias),
        out,
        partial,
        BYTES=columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=columns.pdl,
    )
    if partial is not None:
        finish_dense(partial, None, bias, out)
    return out
