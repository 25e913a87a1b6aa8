# SPDX-License-Identifier: Apache-2.0
"""Random calls of a sparse linear, their expected results, and comparisons."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.op import ops, reference
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.testing.tolerances import tolerance

_INTEGERS = {torch.float32: torch.int32}


@dataclass(frozen=True)
class Case:
    """Arguments of one call of a sparse route."""

    x: Tensor
    operands: SparseOperands
    bias: Tensor | None

    def args(self) -> tuple[Tensor, SparseOperands, Tensor | None]:
        """The arguments of a route of the table of backends."""
        return self.x, self.operands, self.bias

    def expected(self) -> Tensor:
        """The definition, rounded to x's dtype."""
        return reference.rsparse_linear(*self.args())

    def exact(self) -> Tensor:
        """The definition in float32."""
        return reference.rsparse_linear(self.x.float(), self.operands, self.bias)

    def through_op(self, backend: int, max_sparse_tokens: int = 64) -> Tensor:
        """The call through ``ops.linear``."""
        arguments = self.operands.schema_args(self.bias)
        return ops.linear(self.x, *arguments, max_sparse_tokens, int(backend))

    def with_operands(self, **changes: Any) -> "Case":
        """The case with other operands; not checked."""
        return replace(self, operands=replace(self.operands, **changes))

    def with_weight(self, data: Tensor) -> "Case":
        """The case with another weight of the format float, [N, K] in any layout."""
        return self.with_operands(weight=store_float(data))


def make_case(
    tokens: int = 1,
    k: int = 77,
    shard_sizes: Sequence[int] = (40, 17, 9),
    ranks: Sequence[int] = (5, 0, 19),
    dtype: torch.dtype = torch.float32,
    *,
    constants: bool = True,
    seed: int = 0,
    device: str = "cpu",
    store: Callable[[Tensor], StoredWeight] = store_float,
) -> Case:
    """Random tensors scaled for outputs near 1; about half of the channels are kept.

    Args:
        tokens: rows of x.
        k: input features.
        shard_sizes: output features of each shard.
        ranks: of each shard's factors, before padding.
        dtype: of x, the factors, the bias, and the weight that is stored.
        constants: whether the case has a correction and a bias.
        seed: of the random numbers.
        device: where the tensors are.
        store: the format's function that stores a dense weight [N, K].
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    shards = [
        LinearTensors(
            thresholds=torch.rand(k, generator=generator) * 1.35,
            u=randn(size, rank, scale=rank**-0.5) if rank else None,
            v=randn(rank, k, scale=k**-0.5) if rank else None,
            correction=randn(size) if constants else None,
        )
        for size, rank in zip(shard_sizes, ranks, strict=True)
    ]
    n = sum(shard_sizes)
    weight = randn(k, n, scale=max(k, 1) ** -0.5).to(device, dtype).t()
    stored = store(weight)
    if stored.format.planes > 1:
        shards = [
            replace(shard, thresholds=_by_plane(shard.thresholds, stored.format.planes))
            for shard in shards
        ]
    return Case(
        x=randn(tokens, k).to(device, dtype),
        operands=SparseOperands.from_shards(stored, shards, shard_sizes, dtype),
        bias=randn(n).to(device, dtype) if constants else None,
    )


def _by_plane(thresholds: Tensor, planes: int) -> Tensor:
    """[P, K] from [K]: a later plane keeps some of the channels of the one before."""
    return torch.stack([thresholds * (1 + 0.6 * plane) for plane in range(planes)])


def one_linear(
    x: Tensor,
    weight: Tensor,
    tensors: Mapping[str, Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """The definition on one linear that is neither fused nor sharded.

    Args:
        x: [M, K].
        weight: [N, K] in any layout.
        tensors: of its artifact by name: thresholds, and optionally u, v, correction.
        bias: [N], the layer's own, or None.
    """
    names = ("thresholds", "u", "v", "correction")
    shard = LinearTensors(**{name: tensors.get(name) for name in names})  # type: ignore[arg-type]
    stored, sizes = store_float(weight), [weight.shape[0]]
    operands = SparseOperands.from_shards(stored, [shard], sizes, weight.dtype)
    return reference.rsparse_linear(x, operands, bias)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: -0 differs from 0, and a NaN equals itself."""
    kind = _INTEGERS.get(a.dtype, torch.int16)
    return torch.equal(a.view(kind), b.view(kind))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, roundings: int = 2) -> None:
    """Equal shape, dtype and NaNs, and an error that rounding explains."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    error = relative_error(actual.nan_to_num(), expected.nan_to_num())
    assert error < tolerance(expected.dtype, roundings), f"relative error {error:.2e}"
