# SPDX-License-Identifier: Apache-2.0
"""Random calls of the Triton backend, what they must return, and how exactly."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_rsparse.op import reference
from vllm_rsparse.op.packing import pack_factors
from vllm_rsparse.op.tuning import LaunchConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Root mean square of the error over that of the expected output, which the inputs keep
# near 1. float32: both sides round sums of up to a few thousand terms. The half types
# round the output once, at 2^-9 and 2^-12 relative; Triton's interpreter truncates to
# bfloat16 instead of rounding, which doubles the error.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}

VECTOR = LaunchConfig(32, 64, 1, 2, 1, use_dot=False)
# Lists of up to 128 channels at K = 77, steps of 16: whole steps and a remainder.
LISTED = LaunchConfig(32, 16, 1, 1, 1, use_dot=False, listed=True)
DOT = LaunchConfig(32, 32, 1, 2, 2, use_dot=True)
CONFIGS = [VECTOR, LISTED, DOT]
CONFIG_IDS = ["masked", "listed", "dot"]


@dataclass
class Case:
    """Arguments of one call."""

    x: Tensor
    weight: Tensor
    thresholds: Tensor
    u: Tensor
    v: Tensor
    correction: Tensor | None
    bias: Tensor | None
    shard_sizes: list[int]
    ranks: list[int]

    def args(self) -> tuple:
        return tuple(vars(self).values())

    def expected(self) -> Tensor:
        return reference.rsparse_linear(*self.args())


def make_case(
    tokens: int = 1,
    k: int = 77,
    shard_sizes: tuple[int, ...] = (40, 17, 9),
    ranks: tuple[int, ...] = (5, 0, 19),
    dtype: torch.dtype = torch.float32,
    constants: bool = True,
    seed: int = 0,
) -> Case:
    """Random tensors scaled for outputs near 1, about half of the channels kept."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    n = sum(shard_sizes)
    factors = [
        (
            randn(size, rank, scale=rank**-0.5).to(DEVICE),
            randn(rank, k, scale=max(k, 1) ** -0.5).to(DEVICE),
        )
        if rank
        else None
        for size, rank in zip(shard_sizes, ranks, strict=True)
    ]
    u, v, padded = pack_factors(factors, list(shard_sizes), k, dtype, DEVICE)
    return Case(
        x=randn(tokens, k).to(DEVICE, dtype),
        weight=randn(k, n, scale=max(k, 1) ** -0.5).to(DEVICE, dtype).t(),
        thresholds=torch.rand(len(shard_sizes), k, generator=generator).to(DEVICE)
        * 1.35,
        u=u,
        v=v,
        correction=randn(n).to(DEVICE) if constants else None,
        bias=randn(n).to(DEVICE, dtype) if constants else None,
        shard_sizes=list(shard_sizes),
        ranks=padded,
    )


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual.float() - expected.float()).nan_to_num()
    size = expected.float().nan_to_num().pow(2).mean().sqrt()
    ratio = (error.pow(2).mean().sqrt() / size).item() if size > 0 else error.max()
    assert ratio < TOLERANCE[expected.dtype], f"relative error {ratio:.2e}"
