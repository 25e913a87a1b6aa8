# SPDX-License-Identifier: Apache-2.0
"""The backend ``cpu-torch``: ``embedding_bag`` over the weight rows that are needed.

For machines without a compiler; ``cpu`` is faster (docs/cpu.md).

With the weight stored [K, N], one input channel is one contiguous row, and
``sum_j x_j W[:, j]`` over the kept channels is what ``torch.embedding_bag`` computes in
mode "sum" with per-sample weights (FBGEMM, float32 accumulation). It uses one thread
per bag, so the columns are split into chunks: [K, N] viewed as [K * C, N / C] has chunk
c of channel j in row ``j * C + c``, and C bags per token use C threads. Chunks never
straddle two shards, so one call serves fused shards with separate masks.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from vllm_rsparse.op.operands import SparseOperands, require_whole_rows
from vllm_rsparse.op.reference import kept_mask

# embedding_bag's mode "sum".
_SUM = 0
# Columns per bag. Narrow chunks cost index arithmetic, wide ones push the sums out of
# the L1 cache: gate_up of 2048 x 16384, bf16, half kept, two threads of an AMD EPYC:
# 3.1 ms at 256 columns, 2.3 at 4096, 2.7 at 8192 (dense F.linear: 5.0).
_MIN_CHUNK = 256
_MAX_CHUNK = 4096


def rsparse_linear(x: Tensor, operands: SparseOperands, bias: Tensor | None) -> Tensor:
    """Sparse-plus-low-rank linear on the CPU; see ``reference.rsparse_linear``.

    Args:
        x: [M, K] in the weight's dtype (float32, bfloat16 or float16).
        operands: the weight's rows, an input channel each, must follow one another.
        bias: [N] in x's dtype, or None.

    Raises:
        OperandError: a tensor does not fit the others.
    """
    operands.check(x, bias)
    require_whole_rows(operands.weight)
    sizes = tuple(operands.shard_sizes)
    tokens, n = x.shape[0], operands.weight.n
    if tokens == 0:
        return x.new_empty(0, n)
    kept = kept_mask(x, operands.thresholds)  # [S, M, K]
    out = _sparse_product(x, operands.weight.data.t(), kept, sizes)
    if any(operands.ranks):
        _add_low_rank(out, x, kept, operands)
    if operands.correction is not None:
        out += operands.correction
    if bias is not None:
        out += bias
    return out


def _sparse_product(
    x: Tensor, weight_t: Tensor, kept: Tensor, shard_sizes: tuple[int, ...]
) -> Tensor:
    """W[:, kept] x[kept] for every token and shard: [M, N].

    The number of torch calls does not depend on tokens or shards: on small layers a
    call costs as much as the work that it does.
    """
    tokens, k = x.shape
    width = _chunk_width(shard_sizes, torch.get_num_threads())
    chunk_shards = _chunk_shards(shard_sizes, width)
    chunks = chunk_shards.numel()
    # One bag per (token, chunk), with the mask of the chunk's shard: [M * C, K].
    bags = kept[chunk_shards].transpose(0, 1).reshape(tokens * chunks, k)
    bag, channel = bags.nonzero(as_tuple=True)
    rows, source = channel * chunks, channel
    if tokens == 1:
        rows += bag
    else:
        rows += bag % chunks
        source = channel + bag.div(chunks, rounding_mode="floor") * k
    sums = torch.embedding_bag(
        weight_t.view(k * chunks, width),
        rows,
        # Bags start where the earlier ones end.
        torch.constant_pad_nd(bags[:-1].sum(1).cumsum(0), (1, 0)),
        False,
        _SUM,
        False,
        x.reshape(-1)[source],
    )[0]
    return sums.view(tokens, -1)


def _add_low_rank(
    out: Tensor, x: Tensor, kept: Tensor, operands: SparseOperands
) -> None:
    """Add U_s (V_s x_dropped) to each shard's columns of ``out``, in place."""
    u, v = operands.u, operands.v
    row = rank_row = 0
    for shard, (size, rank) in enumerate(
        zip(operands.shard_sizes, operands.ranks, strict=True)
    ):
        if rank > 0:
            dropped = x.masked_fill(kept[shard], 0)
            z = dropped @ v[rank_row : rank_row + rank].t()
            out[:, row : row + size].addmm_(z, u[row : row + size, :rank].t())
        row += size
        rank_row += rank


@lru_cache(maxsize=256)
def _chunk_shards(shard_sizes: tuple[int, ...], width: int) -> Tensor:
    """The shard that each chunk of columns belongs to: int64 [C]."""
    counts = torch.tensor([size // width for size in shard_sizes])
    return torch.arange(len(shard_sizes)).repeat_interleave(counts)


@lru_cache(maxsize=256)
def _chunk_width(shard_sizes: tuple[int, ...], threads: int) -> int:
    """Widest chunk that divides every shard and still gives each thread a bag.

    The smallest number of chunks that is a multiple of the threads balances best. If
    the shards' common divisor does not allow it, more chunks are used, never fewer. If
    it has no divisor of a good width, a shard is one chunk.
    """
    common = math.gcd(*shard_sizes)
    total = sum(shard_sizes)
    fitting = [
        width
        for width in range(1, common + 1)
        if common % width == 0 and min(_MIN_CHUNK, common) <= width <= _MAX_CHUNK
    ] or [common]
    balanced = [w for w in fitting if (total // w) % threads == 0]
    if balanced:
        return max(balanced)
    enough = [w for w in fitting if total // w >= threads]
    return max(enough) if enough else min(fitting)
