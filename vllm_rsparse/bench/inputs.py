# SPDX-License-Identifier: Apache-2.0
"""Random tensors of a layer's shape, with masks of a stated kept fraction."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.op import reference
from vllm_rsparse.op.packing import pack_factors

# Weights and inputs rotate over this many bytes, several times the H200's 60 MB L2.
ROTATED_BYTES = 600e6


@dataclass
class Inputs:
    """One call's arguments and the weight in the layout of a dense layer."""

    x: Tensor
    weight: Tensor
    thresholds: Tensor
    u: Tensor
    v: Tensor
    shard_sizes: list[int]
    ranks: list[int]
    dense_weight: Tensor

    def call(self, op: Callable[..., Tensor], **options: Any) -> Tensor:
        """The op, or a kernel of its signature, on these tensors."""
        return op(
            self.x,
            self.weight,
            self.thresholds,
            self.u,
            self.v,
            None,
            None,
            self.shard_sizes,
            self.ranks,
            **options,
        )


def make_inputs(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Random tensors of which each token keeps the layer's fraction of channels.

    Channels differ in scale, and thresholds follow them, as calibrated ones do. Masks
    of different tokens are independent, as those of real text nearly are
    (kernels/README.md).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return made.mul_(scale)

    k = layer.k
    normal = torch.distributions.Normal(0.0, 1.0)
    # The tails of a normal distribution that hold the kept fraction; 0 and 1 included.
    threshold = normal.icdf(torch.tensor(1 - layer.kept / 2)).item()
    threshold = -1.0 if layer.kept >= 1 else threshold
    scales = torch.rand(k, generator=generator, device=device) + 0.5
    x = (randn(tokens, k).float() * scales).to(dtype)
    factors = [
        (randn(size, rank, scale=rank**-0.5), randn(rank, k, scale=k**-0.5))
        if rank
        else None
        for size, rank in zip(layer.shard_sizes, layer.ranks, strict=True)
    ]
    sizes = list(layer.shard_sizes)
    u, v, padded = pack_factors(factors, sizes, k, dtype, device)
    weight = randn(k, layer.n, scale=k**-0.5).t()
    return Inputs(
        x=x,
        weight=weight,
        thresholds=(scales * threshold).expand(len(sizes), k).contiguous(),
        u=u,
        v=v,
        shard_sizes=sizes,
        ranks=padded,
        dense_weight=weight.contiguous(),
    )


def rotation(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str
) -> list[Inputs]:
    """Enough independent inputs that none of them is still in the cache."""
    copies = max(4, round(ROTATED_BYTES / (layer.n * layer.k * dtype.itemsize)))
    return [make_inputs(layer, tokens, dtype, device, seed) for seed in range(copies)]


def kept_fraction(inputs: list[Inputs]) -> float:
    """Counted fraction of channels that a call reads: the union over its tokens."""
    unions = [
        reference.kept_mask(one.x, one.thresholds).any(1).float().mean()
        for one in inputs
    ]
    return torch.stack(unions).mean().item()


def bytes_read(layer: Layer, inputs: list[Inputs], kept: float) -> float:
    """Bytes a call must read: kept rows, dropped rows of V, U, thresholds and x."""
    one = inputs[0]
    size = one.weight.element_size()
    tokens = one.x.shape[0]
    dropped = 1 - kept if tokens == 1 else 1.0
    factors = sum(
        rank * (layer.k * dropped + rows)
        for rank, rows in zip(one.ranks, one.shard_sizes, strict=True)
    )
    weights = layer.n * layer.k * kept
    small = one.thresholds.numel() * 4 + one.x.numel() * size
    return (weights + factors) * size + small
