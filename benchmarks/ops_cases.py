# SPDX-License-Identifier: Apache-2.0
"""Layers to measure: real shapes, random tensors, masks of a stated kept fraction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rsparse import reference
from vllm_rsparse.artifact import factor_rank
from vllm_rsparse.packing import pack_factors

# Weights and inputs rotate over this many bytes, several times the H200's 60 MB L2.
ROTATED_BYTES = 600e6


@dataclass(frozen=True)
class Layer:
    """A linear of a model: fused shards of one input, as one rank sees them."""

    name: str
    shard_sizes: tuple[int, ...]
    k: int

    @property
    def n(self) -> int:
        return sum(self.shard_sizes)


LLAMA_3_8B = (
    Layer("qkv", (4096, 1024, 1024), 4096),
    Layer("o", (4096,), 4096),
    Layer("gate_up", (14336, 14336), 4096),
    Layer("down", (4096,), 14336),
)
# Mistral-7B has the shapes of Llama-3-8B.
LAYERS: dict[str, tuple[Layer, ...]] = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b-tp4": (
        Layer("qkv", (2048, 256, 256), 8192),
        Layer("o", (8192,), 2048),
        Layer("gate_up", (7168, 7168), 8192),
        Layer("down", (8192,), 7168),
    ),
    "qwen3-8b": (
        Layer("qkv", (4096, 1024, 1024), 4096),
        Layer("o", (4096,), 4096),
        Layer("gate_up", (12288, 12288), 4096),
        Layer("down", (4096,), 12288),
    ),
    "qwen3-32b": (
        Layer("qkv", (8192, 1024, 1024), 5120),
        Layer("o", (5120,), 8192),
        Layer("gate_up", (25600, 25600), 5120),
        Layer("down", (5120,), 25600),
    ),
}


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

    def op_args(self) -> tuple:
        return (
            self.x,
            self.weight,
            self.thresholds,
            self.u,
            self.v,
            None,
            None,
            self.shard_sizes,
            self.ranks,
        )


def make_inputs(
    layer: Layer, tokens: int, dtype: torch.dtype, rho: float, seed: int
) -> Inputs:
    """Random tensors at model sparsity 0.5: rho * 50% of the channels are kept.

    Channels differ in scale, and thresholds follow them, as calibrated ones do. Masks
    of different tokens are independent, the worst case for a batch.
    """
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)
        return made.mul_(scale)

    k = layer.k
    keep = 0.5 * rho
    threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - keep / 2))
    scales = torch.rand(k, generator=generator, device="cuda") + 0.5
    x = (randn(tokens, k).float() * scales).to(dtype)
    ranks = [factor_rank(size, k, 0.5, rho) for size in layer.shard_sizes]
    factors = [
        (randn(size, rank, scale=rank**-0.5), randn(rank, k, scale=k**-0.5))
        if rank
        else None
        for size, rank in zip(layer.shard_sizes, ranks, strict=True)
    ]
    sizes = list(layer.shard_sizes)
    u, v, padded = pack_factors(factors, sizes, k, dtype, "cuda")
    weight = randn(k, layer.n, scale=k**-0.5).t()
    return Inputs(
        x=x,
        weight=weight,
        thresholds=(scales * threshold.item()).expand(len(sizes), k).contiguous(),
        u=u,
        v=v,
        shard_sizes=sizes,
        ranks=padded,
        dense_weight=weight.contiguous(),
    )


def rotation(layer: Layer, tokens: int, dtype: torch.dtype, rho: float) -> list[Inputs]:
    """Enough independent inputs that none of them is still in the cache."""
    copies = max(4, round(ROTATED_BYTES / (layer.n * layer.k * dtype.itemsize)))
    return [make_inputs(layer, tokens, dtype, rho, seed) for seed in range(copies)]


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
