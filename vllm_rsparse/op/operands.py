# SPDX-License-Identifier: Apache-2.0
"""``SparseOperands``: the tensors of a (fused) sparse linear on a rank. Plain torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.base import StoredWeight

# Ranks are padded to a multiple of this with zero rows, so that in [K, R] storage every
# shard's part of V starts at a 32-byte boundary (16-byte loads on the GPU).
RANK_MULTIPLE = 16


class OperandError(RSparseError):
    """A tensor does not match the others of its linear, or the input; names it."""


@dataclass(frozen=True, eq=False)
class SparseOperands:
    """The tensors of S linears with the same input ("shards"), which run as one.

    Attributes:
        weight: [N, K], the shards' output features one after another.
        thresholds: float32 [P S, K], contiguous, with P planes of the weight's format
            (1 for most): a row for each shard and the first plane, then for the next.
        u: [N, >= max(ranks)] in x's dtype; rows of shard s use the first ``ranks[s]``
            columns, the rest is never read. Fast when stored [R, N].
        v: [sum(ranks), K] in x's dtype, the shards' rows one after another. Fast when
            stored [K, R], an input channel a row.
        correction: float32 [N], added on the sparse route only, or None.
        shard_sizes: output features of each shard; they add up to N.
        ranks: rank of each shard's factors, 0 if it has none.
    """

    weight: StoredWeight
    thresholds: Tensor
    u: Tensor
    v: Tensor
    correction: Tensor | None
    shard_sizes: Sequence[int]
    ranks: Sequence[int]

    @classmethod
    def from_shards(
        cls,
        weight: StoredWeight,
        shards: Sequence[LinearTensors],
        shard_sizes: Sequence[int],
        dtype: torch.dtype,
        *,
        with_correction: bool = True,
    ) -> "SparseOperands":
        """Store the artifact's tensors of fused shards in the layout of the kernels.

        Args:
            weight: of all shards; its device is that of the result.
            shards: one per fused linear, in the order of the output.
            shard_sizes: output features N_s of each.
            dtype: of the factors: that of the activations.
            with_correction: False on the later ranks of a row-parallel layer. The
                all-reduce adds up the ranks' outputs, so that the constant enters on
                the first rank alone, like the bias.
        """
        u, v, ranks = _pack_factors(weight, shards, shard_sizes, dtype)
        correction = None
        if with_correction and any(shard.correction is not None for shard in shards):
            parts = [
                torch.zeros(size)
                if shard.correction is None
                else shard.correction.cpu()
                for size, shard in zip(shard_sizes, shards, strict=True)
            ]
            correction = torch.cat(parts).to(weight.device)
        # [S, K], or [P, S, K].
        thresholds = torch.stack([shard.thresholds for shard in shards], dim=-2)
        return cls(
            weight,
            thresholds.flatten(0, -2).to(weight.device),
            u,
            v,
            correction,
            tuple(shard_sizes),
            ranks,
        )

    def check(self, x: Tensor, bias: Tensor | None) -> None:
        """Refuse what the kernels would read wrongly. Host-side metadata only.

        The operands themselves are checked only once.

        Args:
            x: [M, K], bfloat16, float16 or float32 as the weight's format allows.
            bias: [N] in x's dtype, contiguous, or None.

        Raises:
            OperandError: names the tensor, what it is and what it should be.
        """
        check_input(x, self.weight, bias)
        if self._factor_dtype is not x.dtype:
            raise OperandError(
                f"u and v must be {_name(x.dtype)} like x, got"
                f" {_name(self._factor_dtype)}"
            )

    @cached_property
    def _factor_dtype(self) -> torch.dtype:
        """The dtype of u and v, once all operands match one another."""
        weight, u, sizes, ranks = self.weight, self.u, self.shard_sizes, self.ranks
        n, k, device, dtype = weight.n, weight.k, weight.device, self.u.dtype
        if sum(sizes) != n or len(ranks) != len(sizes):
            raise OperandError(
                f"shard_sizes {list(sizes)} must add up to N = {n}, with one rank each;"
                f" got ranks {list(ranks)}"
            )
        weight.format.check_shards(sizes)
        columns = max(u.shape[-1], *ranks)
        rows = weight.format.planes * len(sizes)
        _require("thresholds", self.thresholds, (rows, k), torch.float32, device)
        _require("u", u, (n, columns), dtype, device, packed=False)
        _require("v", self.v, (sum(ranks), k), dtype, device, packed=False)
        if self.correction is not None:
            _require("correction", self.correction, (n,), torch.float32, device)
        return dtype

    def read_cost(self, tokens: int) -> list[tuple[float, float]]:
        """Bytes that a sparse call reads by row of thresholds, linear in the channels.

        The one model of bytes for measurements and metrics. A channel is read if any
        token keeps it; a row of V if any token drops it, which for several tokens is
        counted as always. The input x is divided equally among the shards.

        Returns:
            Per row of ``thresholds`` (bytes per kept channel, bytes independent of
            what is kept).
        """
        weight, k, size = self.weight, self.weight.k, self.u.element_size()
        costs = []
        later: list[list[tuple[float, float]]] = []
        for n, rank in zip(self.shard_sizes, self.ranks, strict=True):
            size_of = weight.format.bytes_of(weight, n)
            (row, *others), fixed = size_of.rows, size_of.fixed
            factors = rank * size * (k + n)
            inputs = 4 * k + tokens * k * size / len(self.shard_sizes)
            saved = rank * size if tokens == 1 else 0
            costs.append((row - saved, fixed + factors + inputs))
            later.append([(other, 4.0 * k) for other in others])
        for plane in zip(*later, strict=True):
            costs += plane
        return costs

    def bytes_read(self, kept: Iterable[float], tokens: int) -> float:
        """Bytes that a sparse call must read: weight, factors, thresholds and x.

        Args:
            kept: channels kept by each row of ``thresholds``, by any of the tokens; at
                most K.
            tokens: rows of x.
        """
        costs = self.read_cost(tokens)
        return sum(
            channels * row + fixed
            for channels, (row, fixed) in zip(kept, costs, strict=True)
        )

    @property
    def artifact_nbytes(self) -> int:
        """Bytes at rest of the artifact's tensors: everything except the weight."""
        tensors = (self.thresholds, self.u, self.v, self.correction)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def schema_args(self, bias: Tensor | None = None) -> tuple[Any, ...]:
        """The arguments of ``ops.linear`` between x and the switch point."""
        return (
            self.weight.data,
            self.weight.scales,
            self.weight.zeros,
            self.thresholds,
            self.u,
            self.v,
            self.correction,
            bias,
            list(self.shard_sizes),
            list(self.ranks),
            self.weight.format.code,
            self.weight.group,
        )


def _pack_factors(
    weight: StoredWeight,
    shards: Sequence[LinearTensors],
    shard_sizes: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """u stored [max rank, N], v stored [K, sum of ranks], and the padded ranks.

    The padding is zeros and adds nothing.
    """
    pairs = [None if s.u is None or s.v is None else (s.u, s.v) for s in shards]
    ranks = tuple(
        0 if pair is None else -(-pair[1].shape[0] // RANK_MULTIPLE) * RANK_MULTIPLE
        for pair in pairs
    )
    u = torch.zeros(max(ranks), weight.n, dtype=dtype, device=weight.device).t()
    v = torch.zeros(weight.k, sum(ranks), dtype=dtype, device=weight.device).t()
    row = rank_row = 0
    for pair, size, rank in zip(pairs, shard_sizes, ranks, strict=True):
        if pair is not None:
            shard_u, shard_v = pair
            u[row : row + size, : shard_u.shape[1]] = shard_u
            v[rank_row : rank_row + shard_v.shape[0]] = shard_v
        row += size
        rank_row += rank
    return u, v, ranks


def check_input(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> None:
    """Refuse an input or a bias that does not match the weight.

    Raises:
        OperandError: names the tensor, what it is and what it should be.
    """
    if x.dim() != 2 or x.shape[1] != weight.k:
        raise OperandError(
            f"x must be [M, {weight.k}] to fit the weight, got {list(x.shape)}"
        )
    allowed = weight.format.input_dtypes(weight)
    if x.dtype not in allowed:
        raise OperandError(
            f"x must be {' or '.join(map(_name, allowed))} to fit the weight of the"
            f" format {weight.format.name}, got {_name(x.dtype)}"
        )
    if weight.device != x.device:
        raise OperandError(f"weight must be on {x.device}, got {weight.device}")
    if bias is not None:
        _require("bias", bias, (weight.n,), x.dtype, x.device)


def require_whole_rows(weight: StoredWeight) -> None:
    """Refuse a weight whose rows, one per input channel, are not adjacent.

    The kernels for CPUs take no stride.

    Raises:
        OperandError: names the strides.
    """
    data = weight.data
    if data.stride() != (1, weight.n) and not data.t().is_contiguous():
        raise OperandError(
            f"weight [N, K] = {list(weight.shape)} has strides {data.stride()}; the"
            " backends for CPUs need [K, N] storage without gaps, strides (1, N)"
        )


def _require(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    packed: bool = True,
) -> None:
    if tensor.shape != shape:
        raise OperandError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise OperandError(f"{name} must be {_name(dtype)}, got {_name(tensor.dtype)}")
    if tensor.device != device:
        raise OperandError(f"{name} must be on {device}, got {tensor.device}")
    if packed and not tensor.is_contiguous():
        raise OperandError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
