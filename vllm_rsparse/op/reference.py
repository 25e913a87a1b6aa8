# SPDX-License-Identifier: Apache-2.0
"""The op in plain float32 PyTorch: the definition every backend is held to.

Paper: R-Sparse (arXiv 2504.19449), section 3. For one linear layer with weight
W [N, K], factors U [N, r] and V [r, K], and an input x [K]::

    kept = { j : |x_j| > threshold_j }
    y    = W[:, kept] x[kept] + U (V x[not kept]) + correction + bias

A fused layer (q,k,v or gate,up) holds several such linears ("shards") that share x and
whose outputs follow one another. Each shard has its own thresholds and factors.
"""

import torch
from torch import Tensor


def kept_mask(x: Tensor, thresholds: Tensor) -> Tensor:
    """Which input channels take the exact path.

    The comparison is strict: a channel with ``|x| == threshold`` is dropped. It is
    written as ``not (|x| <= threshold)`` so that a NaN in ``x`` counts as kept and
    reaches the output, as it would in the dense layer, instead of vanishing.

    Args:
        x: [M, K], any floating dtype.
        thresholds: [K] or [S, K], float32. ``+inf`` never keeps, negative always keeps.

    Returns:
        bool [M, K], or [S, M, K] for thresholds [S, K].
    """
    magnitude = x.float().abs()
    if thresholds.dim() == 2:
        thresholds = thresholds.unsqueeze(1)
    return ~(magnitude <= thresholds)


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
) -> Tensor:
    """Sparse-plus-low-rank linear layer with S >= 1 fused shards.

    Args:
        x: [M, K] input tokens; the leading dimension may be 0.
        weight: [N, K], any strides. Shards are consecutive blocks of rows.
        thresholds: float32 [S, K], one row a shard.
        u: [N, max(ranks)]; rows of shard s use its first ``ranks[s]`` columns, the rest
            is padding that is never read.
        v: [sum(ranks), K]; the rows of shard s follow those of the shards before it.
        correction: float32 [N], added on the sparse route only, or None.
        bias: [N], the layer's own bias, or None.
        shard_sizes: rows of each shard; default one shard of N rows.
        ranks: rank of each shard; default one shard of rank ``v.shape[0]``.

    Returns:
        [M, N] in x's dtype. All arithmetic is float32.
    """
    shard_sizes = [weight.shape[0]] if shard_sizes is None else shard_sizes
    ranks = [v.shape[0]] if ranks is None else ranks
    x32 = x.float()
    outputs = []
    row = rank_row = 0
    for shard, (size, rank) in enumerate(zip(shard_sizes, ranks, strict=True)):
        kept = kept_mask(x, thresholds[shard])
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        y = torch.where(kept, x32, zero) @ weight[row : row + size].float().T
        if rank > 0:
            dropped = torch.where(kept, zero, x32)
            z = dropped @ v[rank_row : rank_row + rank].float().T
            y = y + z @ u[row : row + size, :rank].float().T
        outputs.append(y)
        row += size
        rank_row += rank
    out = torch.cat(outputs, dim=-1)
    if correction is not None:
        out = out + correction
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)
