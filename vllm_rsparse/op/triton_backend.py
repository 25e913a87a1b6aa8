# SPDX-License-Identifier: Apache-2.0
"""The backend ``triton``: looks up a launch configuration and calls ``kernels/``."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.kernels import quantized_linear
from vllm_rsparse.kernels.byte_linear import byte_linear
from vllm_rsparse.kernels.fp8_product import ALIGNMENT, fp8_product, round_rows
from vllm_rsparse.kernels.launch_config import LaunchConfig, Rounding
from vllm_rsparse.kernels.rounded_linear import rounded_linear
from vllm_rsparse.kernels.rsparse_linear import rsparse_linear as launch
from vllm_rsparse.kernels.scratch_linear import dequantise
from vllm_rsparse.kernels.stored_rows import (
    codes_per_word,
    has_boxes,
    is_four_bit,
    is_packable,
    widens_by_bits,
)
from vllm_rsparse.op.dense_defaults import (
    DENSE_TOKENS,
    EXACT_BYTE_TOKENS,
    ROUNDED_TOKENS,
    byte_config,
    byte_rounding,
    dense_config,
    packed_dense_tokens,
    rounded_config,
    scaled_tiles_config,
    takes_bytes,
    tiles_config,
)
from vllm_rsparse.op.operands import OperandError, SparseOperands, check_input
from vllm_rsparse.op.sparse_defaults import default_config
from vllm_rsparse.op.tables import Problem
from vllm_rsparse.op.tuning import dense_launch_config, device_of, launch_config


def rsparse_linear(
    x: Tensor,
    operands: SparseOperands,
    bias: Tensor | None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Sparse-plus-low-rank linear in Triton; see ``reference.rsparse_linear``.

    Args:
        x: [M, K] as the weight's format allows; rows may have any stride.
        operands: fast in the layout of ``SparseOperands.from_shards``.
        bias: [N] in x's dtype, or None.
        config: how to divide the work; None looks it up (``tuning``).

    Raises:
        OperandError: a tensor does not fit the others.
    """
    operands.check(x, bias)
    weight = operands.weight
    if config is None:
        device = device_of(x.device)
        config = launch_config(device, Problem.of(weight), x.shape[0])
        if config.packed and not _packable(weight, operands.shard_sizes):
            config = default_config(weight.n, weight.k, x.shape[0], device.processors)
    kernel = quantized_linear.sparse_linear if config.packed else launch
    return kernel(
        x,
        weight,
        operands.thresholds,
        operands.u,
        operands.v,
        operands.correction,
        bias,
        operands.shard_sizes,
        operands.ranks,
        config,
    )


def dense_linear(
    x: Tensor,
    weight: StoredWeight,
    bias: Tensor | None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """x [M, K] times an int4 or fp8 weight; see ``reference.dense_linear``.

    Up to ``dense_defaults.DENSE_TOKENS`` tokens the stored weight is read once and
    widened on the way; with more, it is widened into scratch [K, N] in x's type, which
    lives for the call, and the library multiplies. On a Hopper, int4 and int8-planes
    times a few tokens in half precision are bytes times bytes (``takes_bytes``): of x,
    two bytes up to 32 tokens, and beyond one (``reference.dense_bytes_linear``).

    Args:
        x: [M, K] as the weight's format allows; rows may lie apart.
        weight: of the format int4, int8-planes, fp8 or fp8-block.
        bias: [N] in x's dtype, or None.
        config: how to cut up the work; None looks it up (``tuning``).

    Raises:
        OperandError: x or the bias does not fit the weight.
    """
    check_input(x, weight, bias)
    if config is None and multiplies_bytes(x, weight):
        processors = device_of(x.device).processors
        shape = weight.n, weight.k, weight.kind
        config = byte_config(*shape, x.shape[0], processors)
        return byte_linear(x, weight, bias, config, byte_rounding(x.shape[0]))
    if config is None and x.shape[0] > DENSE_TOKENS:
        rows = dequantise(weight, x.dtype)
        return torch.mm(x, rows) if bias is None else torch.addmm(bias, x, rows)
    if config is None:
        config = _dense_config(x, weight)
    return quantized_linear.dense_linear(x, weight, bias, config)


def _dense_config(x: Tensor, weight: StoredWeight) -> LaunchConfig:
    """A configuration for at most ``DENSE_TOKENS`` tokens that reads the weight."""
    tokens = x.shape[0]
    device = device_of(x.device)
    shape = weight.n, weight.k, weight.kind
    config: LaunchConfig | None
    if is_four_bit(weight) and not widens_by_bits(x, weight):
        # Tables and most kernels are for scales of x's type; not the packed one.
        most = packed_dense_tokens(weight.kind)
        if tokens > (2 * most if weight.format is INT4 else most):
            return scaled_tiles_config(*shape, device.processors)
        config = dense_config(*shape, min(most, tokens), device.processors)
    else:
        config = dense_launch_config(device, Problem.of(weight), tokens)
    if config is None:
        config = dense_config(*shape, tokens, device.processors)
    if config.packed and not _packable(weight, (weight.n,)):
        config = tiles_config(*shape, device.processors)
    return config


def dense_quantised_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None
) -> Tensor:
    """``dense_linear`` of an fp8 weight whose base model rounds x to fp8 too.

    x is rounded as the base model's own layer does
    (``reference.dense_quantised_linear``) and multiplied with the stored weight or, of
    many tokens, by the library's product of fp8. This needs bfloat16 and a device with
    matrix units for fp8; other calls leave x as it is, and so do those of a few tokens
    where the device does not copy boxes by itself.
    """
    check_input(x, weight, bias)
    if not multiplies_fp8(x, weight):
        return dense_linear(x, weight, bias)
    tokens = x.shape[0]
    boxes = has_boxes(weight) and copies_boxes(x.device)
    if tokens <= DENSE_TOKENS and not boxes:
        return dense_linear(x, weight, bias)
    if tokens <= ROUNDED_TOKENS and boxes:
        processors = device_of(x.device).processors
        config = rounded_config(weight.n, weight.k, tokens, processors)
        rounded, scales = round_rows(x, turned=True)
        return rounded_linear(rounded, scales, weight, bias, config)
    out = fp8_product(x, weight)
    return out if bias is None else out.add_(bias)


def multiplies_bytes(x: Tensor, weight: StoredWeight) -> bool:
    """Whether ``byte_linear`` is the dense route of these operands."""
    return (
        is_four_bit(weight)
        and takes_bytes(weight.n, weight.k, weight.kind, x.shape[0])
        and x.dtype in (torch.bfloat16, torch.float16)
        and (weight.group in (32, 64, 128) or weight.k % 128 == 0)
        and has_boxes(weight)
        and has_integer_warpgroups(x.device)
    )


def dense_rounding(x: Tensor, weight: StoredWeight) -> Rounding | None:
    """How the dense route of int4 and int8-planes rounds x to one byte, or None."""
    if x.shape[0] <= EXACT_BYTE_TOKENS or not multiplies_bytes(x, weight):
        return None
    rounding = byte_rounding(x.shape[0])
    return rounding._replace(block=min(rounding.block, weight.group or weight.k))


@cache
def has_integer_warpgroups(device: torch.device) -> bool:
    """Whether warpgroups of the device multiply bytes from registers: Hopper only."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def multiplies_fp8(x: Tensor, weight: StoredWeight) -> bool:
    """Whether there is a product of fp8 for these operands."""
    return (
        x.dtype == torch.bfloat16
        and weight.n % ALIGNMENT == 0
        and weight.k % ALIGNMENT == 0
        and has_fp8_units(x.device)
    )


@cache
def copies_boxes(device: torch.device) -> bool:
    """Whether the device copies boxes by itself (Hopper and later)."""
    # Triton's interpreter runs on the CPU.
    on_gpu = device.type == "cuda"
    return not on_gpu or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the device is an NVIDIA GPU with matrix units for fp8 (Ada and later)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def _packable(weight: StoredWeight, shard_sizes: Sequence[int]) -> bool:
    """Whether the packed kernel reads the weight; only fp8 has another way.

    Raises:
        OperandError: a format that is only read packed cannot be; names the shards.
    """
    if is_packable(weight, shard_sizes):
        return True
    if weight.format is FP8:
        return False
    columns = codes_per_word(weight)
    raise OperandError(
        f"shard_sizes {list(shard_sizes)}: the format {weight.format.name} on the"
        f" backend triton needs multiples of {columns} output features, and rows that"
        " begin at multiples of 4 bytes"
    )
