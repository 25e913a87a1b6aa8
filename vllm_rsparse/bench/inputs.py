# SPDX-License-Identifier: Apache-2.0
"""Random tensors of a layer's shape, with masks of a given kept fraction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.bench.weights import random_weight
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.op import reference
from vllm_rsparse.op.operands import SparseOperands

# Weights and inputs rotate over this many bytes: several times the H200's 60 MB of L2,
# and the 32 MB of L3 that a group of EPYC cores shares.
ROTATED_BYTES = {"cuda": 600e6, "cpu": 200e6}


@dataclass(frozen=True)
class Inputs:
    """One call's arguments.

    Attributes:
        x: [tokens, K].
        scales: float32 [K], the channels' scales.
        operands: what the op holds.
    """

    x: Tensor
    scales: Tensor
    operands: SparseOperands

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
    weight = random_weight(layer, dtype, generator)
    operands = SparseOperands.from_shards(weight, shards, layer.shard_sizes, dtype)
    return Inputs(x, scales, operands)


def _shards(
    layer: Layer, scales: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> list[LinearTensors]:
    """Thresholds and factors of every shard."""
    thresholds = scales * _threshold(layer.kept)
    if layer.format == INT8_PLANES.name:
        thresholds = torch.stack([thresholds, scales * _threshold(layer.full)])
    shards = []
    for size, rank in zip(layer.shard_sizes, layer.ranks, strict=True):
        u = v = None
        if rank:
            u = _randn(size, rank, dtype, generator).mul_(rank**-0.5)
            v = _randn(rank, layer.k, dtype, generator).mul_(layer.k**-0.5)
        shards.append(LinearTensors(thresholds, u, v, correction=None))
    return shards


def _threshold(kept: float) -> float:
    """Where the tails of a normal distribution have this fraction; 0 and 1 included."""
    if kept >= 1:
        return -1.0
    normal = torch.distributions.Normal(0.0, 1.0)
    return normal.icdf(torch.tensor(1 - kept / 2)).item()


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
    first = make_inputs(layer, tokens, dtype, device, seed=0)
    copies = max(2, round(ROTATED_BYTES[device] / first.operands.weight.nbytes))
    others = (
        make_inputs(layer, tokens, dtype, device, seed) for seed in range(1, copies)
    )
    return [first, *others]


def kept_fractions(inputs: Sequence[Inputs]) -> list[float]:
    """Counted fraction of channels that a call reads, for each plane of the weight.

    A channel is read if any of the tokens keeps it.
    """
    unions = [
        reference.kept_mask(one.x, one.operands.thresholds).any(1).float().mean(1)
        for one in inputs
    ]
    rows = torch.stack(unions).mean(0)
    planes = inputs[0].operands.weight.format.planes
    return rows.unflatten(0, (planes, -1)).mean(1).tolist()


def bytes_read(inputs: Sequence[Inputs], kept: Sequence[float]) -> float:
    """Bytes that a call must read if it keeps these fractions of every shard.

    Args:
        inputs: of the call.
        kept: by plane.
    """
    operands = inputs[0].operands
    shards = len(operands.shard_sizes)
    channels = [part * operands.weight.k for part in kept for _ in range(shards)]
    return operands.bytes_read(channels, inputs[0].x.shape[0])
