# SPDX-License-Identifier: Apache-2.0
"""How the tensors of fused shards are laid out for the op. Plain torch."""

import torch
from torch import Tensor

# Rows of a shard's factors are padded to this with zeros, so that in [K, R] storage
# every shard's part of V starts at a 32-byte boundary (16-byte loads on the GPU).
RANK_MULTIPLE = 16


def pack_factors(
    factors: list[tuple[Tensor, Tensor] | None],
    shard_sizes: list[int],
    k: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, list[int]]:
    """Lay out the factors of fused shards: an input channel of V is one row.

    Args:
        factors: per shard (u [N_s, r_s], v [r_s, K]), or None for rank 0.
        shard_sizes: N_s of each shard.
        k: input features.
        dtype: of the result.
        device: of the result.

    Returns:
        u [N, max rank] stored [max rank, N], v [sum of ranks, K] stored [K, sum of
        ranks], and the ranks padded to a multiple of 16; the padding adds nothing.
    """
    ranks = [
        0 if pair is None else -(-pair[1].shape[0] // RANK_MULTIPLE) * RANK_MULTIPLE
        for pair in factors
    ]
    u = torch.zeros(max(ranks), sum(shard_sizes), dtype=dtype).t()
    v = torch.zeros(k, sum(ranks), dtype=dtype).t()
    row = rank_row = 0
    for pair, size, rank in zip(factors, shard_sizes, ranks, strict=True):
        if pair is not None:
            shard_u, shard_v = pair
            u[row : row + size, : shard_u.shape[1]] = shard_u
            v[rank_row : rank_row + shard_v.shape[0]] = shard_v
        row += size
        rank_row += rank
    return u.to(device), v.to(device), ranks
