# SPDX-License-Identifier: Apache-2.0
"""The op in plain float32 PyTorch: the definition that backends are tested against.

Paper: R-Sparse (arXiv 2504.19449), section 3. For one linear layer with weight
W [N, K], factors U [N, r] and V [r, K], and an input x [K]::

    kept = { j : |x_j| > threshold_j }
    y    = W[:, kept] x[kept] + U (V x[not kept]) + correction + bias

A fused layer (q,k,v or gate,up) has several such linears ("shards") with the same x and
concatenated outputs. Each shard has its own thresholds and factors.

A weight in several planes, W = W_1 + W_2 + ..., has thresholds for each, and a channel
that a plane drops contributes the planes before it. Factors and constant stand in for
what the first plane drops::

    y = sum over planes p of W_p[:, kept_p] x[kept_p] + U (V x[not kept_1]) + ...
"""

import torch
from torch import Tensor
from torch.nn import functional

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.kernels.launch_config import Rounding
from vllm_rsparse.op.operands import SparseOperands


def kept_mask(x: Tensor, thresholds: Tensor) -> Tensor:
    """Which input channels take the exact path.

    The comparison is strict: a channel with ``|x| == threshold`` is dropped. It is
    written as ``not (|x| <= threshold)`` so that a NaN in ``x`` counts as kept and
    reaches the output, as in the dense layer.

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


def rsparse_linear(x: Tensor, operands: SparseOperands, bias: Tensor | None) -> Tensor:
    """The sparse route.

    Args:
        x: [M, K] input tokens, any floating dtype; M may be 0.
        operands: of S >= 1 fused shards, in any layout.
        bias: [N], the layer's own bias, or None.

    Returns:
        [M, N] in x's dtype. All arithmetic is float32.
    """
    weight, u, v = operands.weight, operands.u, operands.v
    planes = weight.format.dequantise_planes(weight)
    x32 = x.float()
    zero = torch.zeros((), dtype=torch.float32, device=x.device)
    outputs = []
    row = rank_row = 0
    for shard, (size, rank) in enumerate(
        zip(operands.shard_sizes, operands.ranks, strict=True)
    ):
        kept = kept_mask(x, operands.thresholds[shard])
        y = torch.where(kept, x32, zero) @ planes[0][row : row + size].T
        for plane in range(1, len(planes)):
            index = plane * len(operands.shard_sizes) + shard
            also_kept = kept_mask(x, operands.thresholds[index])
            part = planes[plane][row : row + size]
            y = y + torch.where(also_kept, x32, zero) @ part.T
        if rank > 0:
            dropped = torch.where(kept, zero, x32)
            z = dropped @ v[rank_row : rank_row + rank].float().T
            y = y + z @ u[row : row + size, :rank].float().T
        outputs.append(y)
        row += size
        rank_row += rank
    out = torch.cat(outputs, dim=-1)
    if operands.correction is not None:
        out = out + operands.correction
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def dense_linear(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """The dense route: x [M, K] times the whole weight [N, K], in x's dtype."""
    return functional.linear(x, weight.dequantise().to(x.dtype), bias)


def dense_quantised_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None
) -> Tensor:
    """The dense route of a weight of the format fp8 with x rounded to fp8 as well.

    Each token has a scale of its own, its largest magnitude over 448, as vLLM's FP8
    layers round with dynamic scales.
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = x.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    rounded = (x.float() / scales).clamp(-largest, largest).to(torch.float8_e4m3fn)
    out = (rounded.float() * scales) @ weight.dequantise().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def dense_bytes_linear(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, rounding: Rounding
) -> Tensor:
    """The dense route of an int4 or int8-planes weight with x rounded to bytes."""
    out = round_to_bytes(x, rounding) @ weight.dequantise().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def round_to_bytes(x: Tensor, rounding: Rounding) -> Tensor:
    """x [M, K] as multiples of a unit for each token and block of channels, in float32.

    The largest magnitude of a block is 127 units, or 32639 in two bytes (127 times 256
    and 127). A unit is cut off to 22 bits. A block with an element that is infinite or
    NaN makes its token NaN.
    """
    largest = 127 if rounding.digits == 1 else 127 * 256 + 127
    blocks = x.float().unflatten(1, (-1, rounding.block))
    units = blocks.abs().amax(2, keepdim=True).clamp(min=2.0**-100) / largest
    units = (units.view(torch.int32) & ~3).view(torch.float32)
    return ((blocks * (1 / units)).round() * units).flatten(1)
