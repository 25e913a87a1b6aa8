# SPDX-License-Identifier: Apache-2.0
"""Launchers for int4 and fp8 weights: sparse, dense, and dequantised to scratch.

The device code is in ``packed.py`` and ``dense_tiles.py``; README.md says which route
is for what.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .codes import FP8, INT4, INT8_PLANES
from .dense_tiles import dense_kernel, dequantise_kernel
from .launch_config import LaunchConfig
from .packed import packed_kernel
from .packed_scales import SCALE_BLOCK
from .packing import STEP, GroupLists, Packing, Scales, Words
from .rsparse_linear import (
    dot_dtype,
    finish,
    has_dependent_launch,
    rows_at_once,
    tiles_of,
)
from .tiles import Input, Matrix, Tiling

# Most rows of words that a program lists, for its registers: more splits are made
# where needed.
MOST_LISTED = 1024
# Most tokens of a program of the sparse route, and of the dense one.
SPARSE_TOKENS = 8
DENSE_TOKENS = 16
# Ranks of V that a program sums, and the rows of V that its one warp reads at once.
RANK_BLOCK_N = 64


def codes_per_word(weight: StoredWeight) -> int:
    """Columns in a 32-bit word of the stored weight."""
    return 8 if _is_four_bit(weight) else 4


def is_packable(weight: StoredWeight, shard_sizes: Sequence[int]) -> bool:
    """Whether ``packed.py`` reads the weight: whole words in every shard's rows."""
    whole = all(size % codes_per_word(weight) == 0 for size in shard_sizes)
    if _is_four_bit(weight):
        return whole
    data = weight.data
    return whole and data.stride(1) % 4 == 0 and data.data_ptr() % 4 == 0


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
    return _packed(
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
        min(SPARSE_TOKENS, triton.next_power_of_2(max(1, x.shape[0]))),
    )


def dense_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, config: LaunchConfig
) -> Tensor:
    """x [M, K] times the whole weight, each word of it read from memory once.

    Args:
        x: [M, K]; rows may lie apart.
        weight: int4 or fp8, packable where ``config.packed``.
        bias: [N] or None.
        config: ``packed`` for a few tokens; else ``use_dot``.
    """
    if config.packed:
        return _packed(
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
            min(DENSE_TOKENS, triton.next_power_of_2(max(1, x.shape[0]))),
        )
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    if k > 0 and x.stride(1) != 1:
        x = x.contiguous()
    group = weight.group or k
    block_k = config.block_k if group == k else min(config.block_k, group)
    block_m = min(64, triton.next_power_of_2(max(16, tokens)))
    partial = torch.empty(
        config.split_k, tokens, n, dtype=torch.float32, device=x.device
    )
    pdl = has_dependent_launch(x.device)
    options = {"launch_pdl": True} if pdl else {}
    grid = (
        triton.cdiv(tokens, block_m),
        triton.cdiv(n, config.block_n),
        config.split_k,
    )
    data, pitch = _rows_of(weight)
    dense_kernel[grid](
        x,
        data,
        weight.scales,
        weight.zeros,
        partial,
        tokens,
        n,
        k,
        pitch,
        x.stride(0),
        CODE=weight.format.code,
        GROUP=group,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        STAGES=config.num_stages,
        DTYPE=dot_dtype(x.dtype),
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    finish(partial, None, _column_scales(weight), None, bias, out, (n,), (0,))
    return out


def dequantise(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``: the [N, K] view of contiguous [K, N] storage."""
    n, k = weight.n, weight.k
    out = torch.empty(k, n, dtype=dtype, device=weight.device)
    group = weight.group or k
    block_k = 32
    data, pitch = _rows_of(weight)
    dequantise_kernel[(triton.cdiv(k, block_k), triton.cdiv(n, 256))](
        data,
        weight.scales,
        weight.zeros,
        _column_scales(weight),
        out,
        n,
        k,
        pitch,
        CODE=weight.format.code,
        GROUP=group,
        BLOCK_N=256,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return out.t()


def _packed(
    x: Tensor,
    weight: StoredWeight,
    thresholds: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: tuple[int, ...],
    ranks: tuple[int, ...],
    config: LaunchConfig,
    block_m: int,
) -> Tensor:
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    if k > 0 and x.stride(1) != 1:
        x = x.contiguous()
    sparse = thresholds is not None
    span = min(SCALE_BLOCK.value, _span(weight), config.block_k)
    blocks = triton.cdiv(k, span)
    split_k = max(1, min(config.split_k, blocks))
    planes = weight.format.planes
    if sparse:
        split_k = max(split_k, triton.cdiv(planes * k, MOST_LISTED))
    pdl = has_dependent_launch(x.device)
    # Columns of a thread.
    width = config.block_n // 8
    blocks_each = triton.next_power_of_2(max(1, triton.cdiv(blocks, split_k)))
    starts = [sum(shard_sizes[:index]) for index in range(len(shard_sizes))]
    packing = Packing(
        code=INT4.value if planes > 1 else weight.format.code,
        planes=planes,
        sparse=sparse,
        tokens=block_m,
        spread=block_m <= 4,
        columns=config.block_n,
        words=width // codes_per_word(weight),
        at_once=config.num_stages,
        group=weight.group,
        span=span,
        blocks=blocks_each,
        length=blocks_each * planes * span,
        aligned=all(start % width == 0 for start in [*starts, n]),
        even_n=all(size % config.block_n == 0 for size in shard_sizes),
        even_k=k % span == 0,
        pdl=pdl,
    )
    groups_m = triton.cdiv(tokens, block_m)
    rank_columns = sum(ranks)
    tiles = tiles_of(shard_sizes, config.block_n)
    matrix_v, factor_tiling = Matrix(None, 0, 0), None
    if v is not None and rank_columns > 0:
        matrix_v = Matrix(v, v.stride(1), v.stride(0))
        tiles += tiles_of(ranks, RANK_BLOCK_N)
        rows_v = rows_at_once(config, RANK_BLOCK_N, v.element_size())
        factor_tiling = Tiling(
            block_m=block_m,
            block_n=RANK_BLOCK_N,
            block_k=4 * rows_v,
            rows=rows_v,
            channels=None,
            even_n=False,
            stages=1,
            use_dot=False,
            widen=False,
            wide=True,
            pdl=pdl,
        )
    partial = torch.empty(
        split_k, tokens, rank_columns + n, dtype=torch.float32, device=x.device
    )
    lists = GroupLists(None, None, None, None)
    if sparse:
        programs = tiles * split_k * groups_m
        lists = _workspace(programs * packing.length, x, block_m, weight)
    data, pitch = _rows_of(weight, words=True)
    per_column = weight.format.code == FP8.value
    options = {"launch_pdl": True} if pdl else {}
    packed_kernel[(groups_m, tiles, split_k)](
        Input(x, x.stride(0), k),
        Words(data, pitch),
        Scales(None if per_column else weight.scales, weight.zeros, n),
        thresholds,
        matrix_v,
        partial,
        lists,
        tokens,
        rank_columns,
        shard_sizes,
        ranks,
        PACKING=packing,
        FACTOR_TILING=factor_tiling,
        DTYPE=dot_dtype(x.dtype),
        num_warps=1,
        num_stages=1,
        **options,
    )
    scales = _column_scales(weight)
    finish(partial, u, scales, correction, bias, out, shard_sizes, ranks)
    return out


def _workspace(rows: int, x: Tensor, tokens: int, weight: StoredWeight) -> GroupLists:
    """Lists for all programs of a launch, uninitialised; see ``list_groups``.

    Args:
        rows: of all lists together.
        x: gives dtype and device of the values.
        tokens: of a program.
        weight: of two planes with zero points, the sums of the second are listed too.
    """
    steps = rows // STEP.value
    second = None
    if weight.format.planes > 1 and weight.zeros is not None:
        second = x.new_empty(steps * tokens, dtype=torch.float32)
    return GroupLists(
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty(rows * tokens),
        x.new_empty(steps, dtype=torch.int32),
        second,
    )


def _is_four_bit(weight: StoredWeight) -> bool:
    """Whether words hold codes of four bits."""
    return weight.format.code in (INT4.value, INT8_PLANES.value)


def _span(weight: StoredWeight) -> int:
    """Channels whose sums may be scaled together."""
    if weight.group in (0, weight.k):
        return SCALE_BLOCK.value
    return weight.group


def _rows_of(weight: StoredWeight, words: bool = False) -> tuple[Tensor, int]:
    """The stored rows and the distance between them, in elements or in words."""
    if _is_four_bit(weight):
        return weight.data, weight.data.stride(-2)
    rows = weight.data.t()
    if words:
        return rows.view(torch.int32), rows.stride(0) // 4
    return rows, rows.stride(0)


def _column_scales(weight: StoredWeight) -> Tensor | None:
    """Scales that belong to an output channel and leave the sum."""
    return weight.scales if weight.format.code == FP8.value else None
