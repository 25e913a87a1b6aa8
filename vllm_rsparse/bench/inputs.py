# SPDX-License-Identifier: Apache-2.0
"""Random tensors of a layer's shape, with masks of a given kept fraction."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.op import reference
from vllm_rsparse.op.operands import SparseOperands

# Weights and inputs rotate over this many bytes, several times the H200's 60 MB L2.
ROTATED_BYTES = 600e6


@dataclass(frozen=True)
class Inputs:
    """One call's arguments and the weight in the layout of a dense layer."""

    x: Tensor
    operands: SparseOperands
    dense_weight: Tensor

    def call(self, sparse: Callable[..., Tensor], **options: Any) -> Tensor:
        """Call a sparse route of the table of backends on these tensors."""
        return sparse(self.x, self.operands, None, **options)


def make_inputs(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Random tensors of which each token keeps the layer's fraction of channels.

    Channels differ in scale, and thresholds follow the scales, as calibrated ones do.
    Masks of different tokens are independent; those of real text nearly are
    (kernels/README.md).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return made.mul_(scale)

    k = layer.k
    normal = torch.distributions.Normal(0.0, 1.0)
    # The tails of a normal distribution with the kept fraction; 0 and 1 included.
    threshold = normal.icdf(torch.tensor(1 - layer.kept / 2)).item()
    threshold = -1.0 if layer.kept >= 1 else threshold
    scales = torch.rand(k, generator=generator, device=device) + 0.5
    x = (randn(tokens, k).float() * scales).to(dtype)
    shards = []
    for size, rank in zip(layer.shard_sizes, layer.ranks, strict=True):
        u = randn(size, rank, scale=rank**-0.5) if rank else None
        v = randn(rank, k, scale=k**-0.5) if rank else None
        shards.append(LinearTensors(scales * threshold, u, v, correction=None))
    weight = randn(k, layer.n, scale=k**-0.5).t()
    operands = SparseOperands.from_shards(
        store_float(weight), shards, layer.shard_sizes, dtype
    )
    return Inputs(x, operands, weight.contiguous())


def rotation(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str
) -> list[Inputs]:
    """Enough independent inputs that none of them is still in the cache."""
    copies = max(4, round(ROTATED_BYTES / (layer.n * layer.k * dtype.itemsize)))
    return [make_inputs(layer, tokens, dtype, device, seed) for seed in range(copies)]


def kept_fraction(inputs: list[Inputs]) -> float:
    """Counted fraction of channels that a call reads: the union over its tokens."""
    unions = [
        reference.kept_mask(one.x, one.operands.thresholds).any(1).float().mean()
        for one in inputs
    ]
    return torch.stack(unions).mean().item()


def bytes_read(inputs: list[Inputs], kept: float) -> float:
    """Bytes that a call must read if it keeps this fraction of every shard."""
    one = inputs[0]
    channels = [kept * one.operands.weight.k] * len(one.operands.shard_sizes)
    return one.operands.bytes_read(channels, one.x.shape[0])
