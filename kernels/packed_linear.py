# SPDX-License-Identifier: Apache-2.0
"""The launcher of ``packed.py``: sparse int4 and fp8 weights, or dense ones."""

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .codes import FP8, FP8_BLOCK, INT4
from .known_launch import launch
from .launch_config import MOST_LISTED, LaunchConfig
from .packed import packed_kernel
from .packed_integers import PAIRS, TOKENS
from .packed_scales import SCALE_BLOCK
from .packing import SLOTS, STEP, UNIT_ROWS, GroupLists, Packing, Scales, Words
from .rsparse_linear import (
    dot_dtype,
    finish,
    has_dependent_launch,
    input_of,
    rows_at_once,
    tiles_of,
)
from .sizes import cdiv, next_power_of_2
from .stored_rows import column_scales, is_four_bit, rows_of, words_of_thread
from .tiles import Matrix, Tiling

# Columns of a warp that need few registers.
_NARROW = 128
# Ranks of V that a program sums.
RANK_BLOCK_N = 64


def packed_linear(
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
    """Launch ``packed_kernel``, then ``finish``: a sparse linear, or a dense one.

    Args:
        x, weight, u, v, correction, bias, shard_sizes, ranks: as ``rsparse_linear``'s;
            the weight is packable (``stored_rows``).
        thresholds: float32 [planes S, K]; None reads all channels.
        config: ``packed`` is set.
        block_m: tokens of a program, a power of two.

    Raises:
        ValueError: the configuration has too few or too many columns for its warps.
    """
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    sparse = thresholds is not None
    span = min(SCALE_BLOCK.value, _span(weight), config.block_k)
    blocks = cdiv(k, span)
    split_k = max(1, min(config.split_k, blocks))
    planes = weight.format.planes
    if sparse:
        split_k = max(split_k, cdiv(planes * k, MOST_LISTED))
    few = sparse and tokens <= TOKENS
    integer = few and is_four_bit(weight) and x.itemsize == 2
    grouped = integer or (
        sparse and tokens == 1 and weight.format.code == FP8_BLOCK.value
    )
    if grouped:
        most = PAIRS.value // block_m if integer else SLOTS.value
        split_k = max(split_k, cdiv(blocks, most))
    pdl = has_dependent_launch(x.device)
    # Columns of a thread.
    width = config.block_n // config.num_warps // 8
    blocks_each = next_power_of_2(max(1, cdiv(blocks, split_k)))
    starts = [sum(shard_sizes[:index]) for index in range(len(shard_sizes))]
    packing = Packing(
        code=INT4.value if planes > 1 else weight.format.code,
        planes=planes,
        sparse=sparse,
        tokens=block_m,
        spread=block_m <= 4 and not grouped,
        grouped=grouped,
        integer=integer,
        warps=config.num_warps,
        columns=config.block_n,
        words=words_of_thread(config, weight),
        half=max(1, config.num_stages // 2),
        halves=min(2, config.num_stages),
        group=weight.group,
        span=span,
        blocks=blocks_each,
        length=blocks_each * planes * span,
        aligned=all(start % width == 0 for start in [*starts, n]),
        even_n=all(size % config.block_n == 0 for size in shard_sizes),
        even_k=k % span == 0,
        pdl=pdl,
    )
    groups_m = cdiv(tokens, block_m)
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
    lists = GroupLists(None, None, None, None, None)
    if sparse:
        programs = tiles * split_k * groups_m
        lists = _workspace(programs * packing.length, x, packing, weight)
    data, pitch = rows_of(weight, words=True)
    per_column = weight.format.code == FP8.value
    launch(
        packed_kernel,
        x.device,
        (groups_m, tiles, split_k),
        input_of(x),
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
        num_warps=config.num_warps,
        num_stages=1,
        pdl=pdl,
        registers=_registers(packing, len(shard_sizes)),
    )
    scales = column_scales(weight)
    finish(partial, u, scales, correction, bias, out, shard_sizes, ranks)
    return out


def _registers(packing: Packing, shards: int) -> int | None:
    """Registers of a thread; None leaves them to the compiler.

    In integers with 128 columns a warp it takes 128, or 132 to 134 with two tokens or
    three shards, and then 12 warps fit into a multiprocessor instead of 16. Two tokens
    of planes at 4.16 bits take 69.3 us instead of 88.4 with 128, the four linears of
    Llama-3-8B on an H200.
    """
    narrow = packing.columns == _NARROW * packing.warps
    many = packing.tokens > 1 or shards > 2
    return 128 if packing.integer and narrow and many else None


def _workspace(
    rows: int, x: Tensor, packing: Packing, weight: StoredWeight
) -> GroupLists:
    """Lists for all programs of a launch, uninitialised; see ``list_groups``.

    Args:
        rows: of all lists together.
        x: gives dtype and device of the values.
        packing: of the programs.
        weight: of two planes with zero points, the sums of the second are listed too.
    """
    steps = rows // STEP.value
    units = rows // UNIT_ROWS.value if packing.grouped else steps
    second = None
    blocks = None
    if packing.integer:
        blocks = x.new_empty(
            rows // packing.length * 3 * packing.blocks * packing.tokens,
            dtype=torch.float32,
        )
    elif weight.format.planes > 1 and weight.zeros is not None:
        second = x.new_empty(steps * packing.tokens, dtype=torch.float32)
    return GroupLists(
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty(
            rows * packing.tokens, dtype=torch.int16 if packing.integer else x.dtype
        ),
        x.new_empty(units, dtype=torch.int32),
        second,
        blocks,
    )


def _span(weight: StoredWeight) -> int:
    """Channels whose sums may be scaled together."""
    if weight.group in (0, weight.k):
        return SCALE_BLOCK.value
    return weight.group
