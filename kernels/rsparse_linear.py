# SPDX-License-Identifier: Apache-2.0
"""Sparse-plus-low-rank linear layer in Triton; the maths and layouts are in README.md.

One launch reads the kept rows of the weight and the dropped rows of V. Where the
channels are not split and no shard has factors it writes the output itself. Otherwise
it leaves float32 sums in a workspace, and a second launch adds them up and adds U z.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_rsparse.op.tuning import LaunchConfig, launch_config

from .channels import GROUP
from .programs import finish_kernel, sums_kernel

# Tokens a program takes: the smallest tile of the matrix units.
DOT_TOKENS = 16
# The second launch: columns a program finishes, and most rows of U it holds at a time.
FINISH_BLOCK_N = 64
FINISH_MAX_BLOCK_R = 128
# Most channels a program lists, for its registers: more splits are made where needed.
MOST_LISTED = 1024


def rsparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None = None,
    bias: Tensor | None = None,
    shard_sizes: list[int] | None = None,
    ranks: list[int] | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Sparse-plus-low-rank linear; the op that ``vllm_rsparse.op.reference`` defines.

    Sums are float32 in a fixed order: equal inputs give bitwise equal outputs. Nothing
    waits for the host and no launch depends on data, so a call can be captured in a
    CUDA graph; its workspace comes from the caching allocator, per call and stream.

    Args:
        x: [M, K] bfloat16, float16 or float32; rows may lie apart, channels may not.
        weight: [N, K] in x's dtype, stored [K, N]: strides (1, >= N).
        thresholds: float32 [S, K], contiguous.
        u: [N, >= max(ranks)] in x's dtype, any strides; fast when stored [R, N].
        v: [sum(ranks), K] in x's dtype, any strides; fast when stored [K, R]
            (``vllm_rsparse.op.packing``).
        correction: float32 [N] or None.
        bias: [N], any float dtype, or None.
        shard_sizes: rows of each shard; default one shard of N rows.
        ranks: rank of each shard; default one shard of rank ``v.shape[0]``.
        config: how to cut up the work; None looks it up (``vllm_rsparse.op.tuning``).

    Returns:
        [M, N] in x's dtype, contiguous.

    Raises:
        ValueError: a tensor's shape, dtype, device or layout is not one of those above.
    """
    shard_sizes = [weight.shape[0]] if shard_sizes is None else list(shard_sizes)
    ranks = [v.shape[0]] if ranks is None else list(ranks)
    _check(x, weight, thresholds, u, v, correction, bias, shard_sizes, ranks)
    tokens, k = x.shape
    n = weight.shape[0]
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    if config is None:
        config = launch_config(
            _device_name(x.device), n, k, str(x.dtype).removeprefix("torch."), tokens
        )
    if k > 0 and x.stride(1) != 1:
        x = x.contiguous()

    shards = len(shard_sizes)
    rank_columns = sum(ranks)
    factors = rank_columns > 0
    split_k = config.split_k
    if config.listed:
        split_k = max(split_k, triton.cdiv(k, MOST_LISTED))
    direct = split_k == 1 and not factors
    partial = None
    if not direct:
        partial = torch.empty(
            split_k,
            tokens,
            rank_columns + n,
            dtype=torch.float32,
            device=x.device,
        )
    block_m = DOT_TOKENS if config.use_dot else min(4, triton.next_power_of_2(tokens))
    groups_m = triton.cdiv(tokens, block_m)
    # A few ranks in a tile of the weight's width would leave most threads idle.
    rank_block_n = min(config.block_n, triton.next_power_of_2(max(16, *ranks)))
    tiles = _tiles(shard_sizes, config.block_n) + _tiles(ranks, rank_block_n)
    channels = channel_list = channel_values = None
    if config.listed:
        channels = listed_channels(k, split_k)
        length = tiles * split_k * groups_m * (channels + config.block_k)
        channel_list = torch.empty(length, dtype=torch.int32, device=x.device)
        channel_values = torch.empty(length * block_m, dtype=x.dtype, device=x.device)
    pdl = _has_dependent_launch(x.device)
    options = {"launch_pdl": True} if pdl else {}
    sums_kernel[(tiles, split_k, groups_m)](
        x,
        weight,
        thresholds,
        v if factors else None,
        correction,
        bias,
        out,
        partial,
        channel_list,
        channel_values,
        tokens,
        n,
        k,
        rank_columns,
        x.stride(0),
        weight.stride(1),
        v.stride(1),
        v.stride(0),
        tuple(shard_sizes),
        tuple(ranks),
        SHARDS=shards,
        FACTORS=factors,
        DIRECT=direct,
        USE_DOT=config.use_dot,
        LISTED=config.listed,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        ROWS=_rows_at_once(config, config.block_n, x.element_size()),
        RANK_BLOCK_N=rank_block_n,
        RANK_ROWS=_rows_at_once(config, rank_block_n, x.element_size()),
        CHANNELS=channels,
        EVEN_N=all(size % config.block_n == 0 for size in shard_sizes),
        STAGES=config.num_stages,
        DOT_DTYPE=_dot_dtype(x.dtype),
        WIDE=max(_extent(weight), _extent(v)) >= 2**31,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    if direct:
        return out
    finish_kernel[(_tiles(shard_sizes, FINISH_BLOCK_N), tokens)](
        partial,
        u if factors else None,
        correction,
        bias,
        out,
        split_k,
        tokens,
        n,
        rank_columns,
        u.stride(0),
        u.stride(1),
        tuple(shard_sizes),
        tuple(ranks),
        SHARDS=shards,
        FACTORS=factors,
        SPLITS_BLOCK=triton.next_power_of_2(split_k),
        BLOCK_N=FINISH_BLOCK_N,
        BLOCK_R=min(FINISH_MAX_BLOCK_R, triton.next_power_of_2(max(1, *ranks))),
        PDL=pdl,
        num_warps=4,
        **options,
    )
    return out


def _tiles(sizes: list[int], block_n: int) -> int:
    return sum(triton.cdiv(size, block_n) for size in sizes)


def _rows_at_once(config: LaunchConfig, block_n: int, element_size: int) -> int:
    """Rows of a tile that a program's threads read with one 16-byte load each."""
    threads_of_row = max(1, block_n * element_size // 16)
    return min(config.block_k, max(1, config.num_warps * 32 // threads_of_row))


def listed_channels(k: int, split_k: int) -> int:
    """Most channels that one program lists, as a power of two."""
    groups = triton.cdiv(triton.cdiv(k, GROUP.value), split_k)
    return triton.next_power_of_2(max(1, groups) * GROUP.value)


def _extent(matrix: Tensor) -> int:
    """Elements from a matrix's first to its last one: whether 32-bit offsets do."""
    return sum(
        (size - 1) * stride
        for size, stride in zip(matrix.shape, matrix.stride(), strict=True)
    )


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operands of ``tl.dot``: as stored, widened only for the interpreter.

    Triton's interpreter multiplies bfloat16 operands as the integers that hold them.
    """
    if dtype is torch.float32 or triton.knobs.runtime.interpret:
        return tl.float32
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float16


@cache
def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    )


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    """Whether a launch may start while its predecessor drains (Hopper and later)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not triton.knobs.runtime.interpret
    )


def _check(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
) -> None:
    """Refuse what the kernels would read wrongly. Host-side metadata only."""
    n, k = weight.shape
    allowed = (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in allowed:
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [M, {k}] to fit the weight, got {list(x.shape)}")
    if n > 1 and weight.stride(0) != 1:
        raise ValueError(
            f"weight [N, K] = [{n}, {k}] must be stored [K, N], strides (1, >= N); got"
            f" {weight.stride()}. Use weight.t().contiguous().t()"
        )
    for name, tensor, shape, dtype in (
        ("weight", weight, (n, k), x.dtype),
        ("thresholds", thresholds, (len(shard_sizes), k), torch.float32),
        ("u", u, (n, max(u.shape[1], *ranks)), x.dtype),
        ("v", v, (sum(ranks), k), x.dtype),
        ("correction", correction, (n,), torch.float32),
        ("bias", bias, (n,), None),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {tensor.device}")
    for name, vector in (
        ("thresholds", thresholds),
        ("correction", correction),
        ("bias", bias),
    ):
        if vector is not None and not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous, strides {vector.stride()}")
    if sum(shard_sizes) != n or len(ranks) != len(shard_sizes):
        raise ValueError(
            f"shard_sizes {shard_sizes} must add up to N = {n}, with one rank each; got"
            f" ranks {ranks}"
        )
