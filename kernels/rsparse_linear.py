# SPDX-License-Identifier: Apache-2.0
"""Sparse-plus-low-rank linear layer in Triton; the maths and layouts are in README.md.

One launch reads the kept rows of the weight and the dropped rows of V. Where the
channels are not split and no shard has factors it writes the output itself. Otherwise
it leaves float32 sums in a workspace, and a second launch adds them up and adds U z.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .channels import GROUP
from .known_launch import launch
from .launch_config import MOST_LISTED, LaunchConfig
from .programs import finish_dense_kernel, finish_kernel, sums_kernel
from .sizes import cdiv, next_power_of_2
from .tiles import Constants, Input, Lists, Matrix, Tiling

# Tokens a program takes: the smallest tile of the matrix units.
DOT_TOKENS = 16
# The second launch: columns a program finishes, and most rows of U it holds at a time.
FINISH_BLOCK_N = 64
# Of the dense route: columns, and most tokens.
FINISH_DENSE_COLUMNS = 256
FINISH_DENSE_TOKENS = 4
FINISH_MAX_BLOCK_R = 128


def rsparse_linear(
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
    """Sparse-plus-low-rank linear on checked operands (``op.operands``).

    Sums are float32 in a fixed order: equal inputs give bitwise equal outputs. Nothing
    waits for the host and no launch depends on data, so a call can be captured in a
    CUDA graph; its workspace comes from the caching allocator, per call and stream.

    Args:
        x: [M, K] bfloat16, float16 or float32; rows may lie apart.
        weight: [N, K], an input channel a row.
        thresholds: float32 [S, K], contiguous.
        u: [N, >= max(ranks)] in x's dtype, any strides; fast when stored [R, N].
        v: [sum(ranks), K] in x's dtype, any strides; fast when stored [K, R].
        correction: float32 [N] or None.
        bias: [N] or None.
        shard_sizes: rows of each shard.
        ranks: rank of each shard.
        config: how to cut up the work.

    Returns:
        [M, N] in x's dtype, contiguous.
    """
    tokens, k = x.shape
    n, matrix = weight.n, weight.data
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out

    rank_columns = sum(ranks)
    factors = rank_columns > 0
    split_k = config.split_k
    if config.listed:
        split_k = max(split_k, cdiv(k, MOST_LISTED))
    partial = None
    if split_k > 1 or factors:
        shape = (split_k, tokens, rank_columns + n)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
    tiling = Tiling(
        block_m=DOT_TOKENS if config.use_dot else min(4, next_power_of_2(tokens)),
        block_n=config.block_n,
        block_k=config.block_k,
        rows=rows_at_once(config, config.block_n, matrix.element_size()),
        channels=listed_channels(k, split_k) if config.listed else None,
        even_n=all(size % config.block_n == 0 for size in shard_sizes),
        stages=config.num_stages,
        use_dot=config.use_dot,
        widen=triton.knobs.runtime.interpret,
        wide=max(_extent(matrix), _extent(v)) >= 2**31,
        pdl=has_dependent_launch(x.device),
    )
    factor_tiling = None
    tiles = tiles_of(shard_sizes, config.block_n)
    if factors:
        # A few ranks in a tile of the weight's width would leave most threads idle.
        block_n = min(config.block_n, next_power_of_2(max(16, *ranks)))
        rows = rows_at_once(config, block_n, v.element_size())
        factor_tiling = tiling._replace(block_n=block_n, rows=rows, even_n=False)
        tiles += tiles_of(ranks, block_n)
    groups_m = cdiv(tokens, tiling.block_m)
    lists = Lists(None, None)
    if tiling.channels is not None:
        length = tiles * split_k * groups_m * (tiling.channels + config.block_k)
        lists = Lists(
            torch.empty(length, dtype=torch.int32, device=x.device),
            torch.empty(length * tiling.block_m, dtype=x.dtype, device=x.device),
        )
    launch(
        sums_kernel,
        x.device,
        (tiles, split_k, groups_m),
        input_of(x),
        Matrix(matrix, matrix.stride(1), matrix.stride(0)),
        Matrix(v if factors else None, v.stride(1), v.stride(0)),
        thresholds,
        Constants(weight.scales, correction, bias),
        out,
        partial,
        lists,
        tokens,
        n,
        rank_columns,
        tuple(shard_sizes),
        tuple(ranks),
        TILING=tiling,
        FACTOR_TILING=factor_tiling,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        pdl=tiling.pdl,
    )
    if partial is not None:
        finish(partial, u, weight.scales, correction, bias, out, shard_sizes, ranks)
    return out


def finish(
    partial: Tensor,
    u: Tensor | None,
    scales: Tensor | None,
    correction: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    shard_sizes: Sequence[int],
    ranks: Sequence[int],
) -> None:
    """Second launch: add up the splits' partial sums and what belongs to a column.

    Args:
        partial: float32 [splits, M, R + N].
        u: [N, >= max(ranks)]; unused where the sum R of the ranks is 0.
        scales: float32 [N] that multiply the weight's sums, or None.
        correction: float32 [N] or None.
        bias: [N] or None.
        out: [M, N], written.
        shard_sizes: rows of each shard.
        ranks: rank of each shard.
    """
    splits, tokens, columns = partial.shape
    n = out.shape[1]
    factors = Matrix(None, 0, 0)
    if u is not None and columns > n:
        factors = Matrix(u, u.stride(1), u.stride(0))
    # 4096 x 14336 in fp8, two tokens, 99 splits: 18.0 instead of 19.5 us (H200).
    block_n = FINISH_BLOCK_N if splits <= 64 else FINISH_BLOCK_N // 2
    pdl = has_dependent_launch(out.device)
    launch(
        finish_kernel,
        out.device,
        (tiles_of(shard_sizes, block_n), tokens, 1),
        partial,
        factors,
        Constants(scales, correction, bias),
        out,
        splits,
        tokens,
        n,
        columns - n,
        tuple(shard_sizes),
        tuple(ranks),
        SPLITS_BLOCK=next_power_of_2(splits),
        BLOCK_N=block_n,
        BLOCK_R=min(FINISH_MAX_BLOCK_R, next_power_of_2(max(1, *ranks))),
        PDL=pdl,
        num_warps=4,
        pdl=pdl,
    )


def dense_workspace(splits: int, out: Tensor) -> Tensor | None:
    """Partial sums float32 [splits, M, N] for ``finish_dense``; None for one split."""
    if splits == 1:
        return None
    shape = (splits, *out.shape)
    return torch.empty(shape, dtype=torch.float32, device=out.device)


def finish_dense(
    partial: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    row_scales: Tensor | None = None,
) -> None:
    """``finish`` of the dense route, which has no factors and no correction.

    Args:
        partial: float32 [splits, M, N].
        scales: float32 [N] that multiply the sums, or None.
        bias: [N] or None.
        out: [M, N], written.
        row_scales: float32 [M, 1] that multiply the sums of a token, or None.
    """
    splits, tokens, n = partial.shape
    block_m = min(FINISH_DENSE_TOKENS, next_power_of_2(tokens))
    pdl = has_dependent_launch(out.device)
    launch(
        finish_dense_kernel,
        out.device,
        (cdiv(n, FINISH_DENSE_COLUMNS), cdiv(tokens, block_m), 1),
        partial,
        row_scales,
        Constants(scales, None, bias),
        out,
        splits,
        tokens,
        n,
        BLOCK_M=block_m,
        BLOCK_N=FINISH_DENSE_COLUMNS,
        AT_ONCE=min(8, next_power_of_2(splits)),
        PDL=pdl,
        num_warps=4,
        pdl=pdl,
    )


def tiles_of(sizes: Sequence[int], block_n: int) -> int:
    """Column tiles of all shards."""
    return sum(cdiv(size, block_n) for size in sizes)


def rows_at_once(config: LaunchConfig, block_n: int, element_size: int) -> int:
    """Rows of a tile that a program's threads read with one 16-byte load each."""
    threads_of_row = max(1, block_n * element_size // 16)
    return min(config.block_k, max(1, config.num_warps * 32 // threads_of_row))


def listed_channels(k: int, split_k: int) -> int:
    """Most channels that one program lists, as a power of two."""
    groups = cdiv(cdiv(k, GROUP.value), split_k)
    return next_power_of_2(max(1, groups) * GROUP.value)


def _extent(matrix: Tensor) -> int:
    """Elements from a matrix's first to its last one: whether 32-bit offsets do."""
    return sum(
        (size - 1) * stride
        for size, stride in zip(matrix.shape, matrix.stride(), strict=True)
    )


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Operands of ``tl.dot``: as stored, widened only for the interpreter.

    Triton's interpreter multiplies bfloat16 operands as the integers that hold them.
    """
    if dtype is torch.float32 or triton.knobs.runtime.interpret:
        return tl.float32
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float16


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a launch may start while its predecessor drains (Hopper and later)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and not triton.knobs.runtime.interpret
    )


def input_of(x: Tensor) -> Input:
    """x [M, K] as kernels take it: copied if its channels do not lie together."""
    if x.shape[1] > 0 and x.stride(1) != 1:
        x = x.contiguous()
    return Input(x, x.stride(0), x.shape[1])
