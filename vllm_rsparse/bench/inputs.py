# SPDX-License-Identifier: Apache-2.0
"""Random tensors of a layer's shape, with masks of a given kept fraction."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.op import reference
from vllm_rsparse.op.operands import SparseOperands

# Weights and inputs rotate over this many bytes: several times the H200's 60 MB of L2,
# and the 32 MB of L3 that a group of EPYC cores shares.
ROTATED_BYTES = {"cuda": 600e6, "cpu": 200e6}


@dataclass(frozen=True)
class Inputs:
    """One call's arguments and the weight in the layout of a dense layer.

    Attributes:
        x: [tokens, K].
        scales: float32 [K], the channels' scales.
        operands: what the op holds.
        dense_weight: [N, K], contiguous.
    """

    x: Tensor
    scales: Tensor
    operands: SparseOperands
    dense_weight: Tensor

    def call(self, sparse: Callable[..., Tensor], **options: Any) -> Tensor:
        """Call a sparse route of the table of backends on these tensors."""
        return sparse(self.x, self.operands, None, **options)

    def with_budget(self, layer: Layer) -> "Inputs":
        """The same weights and inputs, with the thresholds and ranks of a layer."""
        generator = torch.Generator(self.x.device).manual_seed(0)
        shards = _shards(layer, self.scales, self.x.dtype, generator)
        weight = self.operands.weight
        operands = SparseOperands.from_shards(
            weight, shards, layer.shard_sizes, self.x.dtype
        )
        return replace(self, operands=operands)


def make_inputs(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str, seed: int
) -> Inputs:
    """Random tensors of which each token keeps the layer's fraction of channels.

    Channels differ in scale, and thresholds follow the scales, as calibrated ones do.
    Masks of different tokens are independent; those of real text nearly are
    (kernels/README.md).
    """
    generator = torch.Generator(device).manual_seed(seed)
    k = layer.k
    scales = torch.rand(k, generator=generator, device=device) + 0.5
    x = (_randn(tokens, k, dtype, generator).float() * scales).to(dtype)
    shards = _shards(layer, scales, dtype, generator)
    weight = _randn(k, layer.n, dtype, generator).mul_(k**-0.5).t()
    operands = SparseOperands.from_shards(
        store_float(weight), shards, layer.shard_sizes, dtype
    )
    return Inputs(x, scales, operands, weight.contiguous())


def _shards(
    layer: Layer, scales: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> list[LinearTensors]:
    """Thresholds and factors of every shard."""
    normal = torch.distributions.Normal(0.0, 1.0)
    # The tails of a normal distribution with the kept fraction; 0 and 1 included.
    threshold = normal.icdf(torch.tensor(1 - layer.kept / 2)).item()
    threshold = -1.0 if layer.kept >= 1 else threshold
    shards = []
    for size, rank in zip(layer.shard_sizes, layer.ranks, strict=True):
        u = v = None
        if rank:
            u = _randn(size, rank, dtype, generator).mul_(rank**-0.5)
            v = _randn(rank, layer.k, dtype, generator).mul_(layer.k**-0.5)
        shards.append(LinearTensors(scales * threshold, u, v, correction=None))
    return shards


def _randn(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    return torch.randn(
        rows, columns, generator=generator, device=generator.device, dtype=dtype
    )


def rotation(
    layer: Layer, tokens: int, dtype: torch.dtype, device: str
) -> list[Inputs]:
    """Enough independent inputs that none of them is still in the cache."""
    weight_bytes = layer.n * layer.k * dtype.itemsize
    copies = max(2, round(ROTATED_BYTES[device] / weight_bytes))
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
