# SPDX-License-Identifier: Apache-2.0
"""``LayoutWeights``: quantized checkpoints, by the layouts of ``formats``."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.nibbles import PER_WORD
from vllm_rsparse.serving.weights.base import CheckpointWeights, Partition

AnyLayout = TypeVar("AnyLayout", bound=Layout)


class LayoutWeights(CheckpointWeights, Generic[AnyLayout]):
    """Parameters with the names, shapes and dtypes of a layout.

    Args:
        layout: of every fused shard.
        names: checkpoint names of the fused shards, for errors.
    """

    def __init__(self, layout: AnyLayout, names: list[str]) -> None:
        self.layout = layout
        self.names = names
        self.parameters = layout.suffixes
        self.required = layout.required
        self.quantised_inputs = layout.quantised_inputs

    def create(self, layer: LinearBase, partition: Partition) -> None:
        """See the base class."""
        self._check(partition)
        for name, parameter in self._required(partition).items():
            layer.register_parameter(name, parameter)
        for name in (*self.layout.checked, *self.layout.unread):
            layer.register_parameter(name, _ignored())

    def stored(self, layer: LinearBase, partition: Partition) -> StoredWeight:
        """See the base class."""
        tensors = {name: getattr(layer, name).data for name in self.layout.required}
        try:
            return self.layout.store(tensors, partition.shard_sizes)
        except WeightFormatError as error:
            raise self._error(str(error)) from error

    @abstractmethod
    def _check(self, partition: Partition) -> None:
        """Refuse a partition that cannot be cut out of the checkpoint's tensors."""

    @abstractmethod
    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        """A parameter for each required tensor of the layout."""

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{' + '.join(self.names)}: {message}")


class GroupedInt4(LayoutWeights[AnyLayout]):
    """Common to the four-bit layouts: groups, and words of eight output channels."""

    def __init__(self, layout: AnyLayout, names: list[str], group: int | None) -> None:
        super().__init__(layout, names)
        self._group = group

    def _check(self, partition: Partition) -> None:
        if any(size % PER_WORD for size in partition.shard_sizes):
            raise self._error(
                f"a rank would hold {list(partition.shard_sizes)} output channels;"
                f" four-bit weights are cut in multiples of {PER_WORD}: use fewer"
                " tensor-parallel ranks"
            )
        unit = self._group or PER_WORD
        if partition.k % unit:
            raise self._error(
                f"a rank would hold {partition.k} of {partition.full_k} input channels,"
                f" which splits a group of {unit}: use fewer tensor-parallel ranks, or"
                " a checkpoint with smaller groups"
            )

    def _groups(self, partition: Partition) -> int:
        """Rows of scales on this rank."""
        return 1 if self._group is None else partition.k // self._group

    def _words(self, partition: Partition, packed_dim: int, **dims: int) -> Parameter:
        """Words int32 [N, K/8], [K/8, N] or [K, N/8], by the dimensions given."""
        shape = [0, 0]
        shape[dims["output_dim"]] = partition.n
        shape[dims["input_dim"]] = partition.k
        shape[packed_dim] //= PER_WORD
        return PackedvLLMParameter(
            data=torch.zeros(shape, dtype=torch.int32),
            packed_dim=packed_dim,
            packed_factor=PER_WORD,
            weight_loader=partition.weight_loader,
            **dims,
        )

    def _scales(self, partition: Partition, output_dim: int) -> Parameter:
        """[N, groups] or [groups, N]; where there is one group, ranks share it."""
        data = unloaded(
            _shape(partition.n, self._groups(partition), output_dim), partition.dtype
        )
        common: dict[str, Any] = {
            "data": data,
            "output_dim": output_dim,
            "weight_loader": partition.weight_loader,
        }
        if self._group is None:
            return ChannelQuantScaleParameter(**common)
        return GroupQuantScaleParameter(input_dim=1 - output_dim, **common)

    def _zeros(self, partition: Partition, output_dim: int) -> Parameter:
        """int32 [N/8, groups] or [groups, N/8]."""
        shape = _shape(partition.n // PER_WORD, self._groups(partition), output_dim)
        common: dict[str, Any] = {
            "data": torch.zeros(shape, dtype=torch.int32),
            "output_dim": output_dim,
            "packed_dim": output_dim,
            "packed_factor": PER_WORD,
            "weight_loader": partition.weight_loader,
        }
        if self._group is None:
            return PackedColumnParameter(**common)
        return PackedvLLMParameter(input_dim=1 - output_dim, **common)


def _shape(output: int, other: int, output_dim: int) -> tuple[int, int]:
    return (output, other) if output_dim == 0 else (other, output)


def unloaded(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Scales that ``store`` recognises as never loaded."""
    return torch.full(shape, torch.finfo(dtype).min, dtype=dtype)


def _ignored() -> Parameter:
    """A parameter for a tensor of the checkpoint that is not used."""
    parameter = Parameter(torch.empty(0), requires_grad=False)
    parameter.weight_loader = _load_nothing  # type: ignore[attr-defined]
    return parameter


def _load_nothing(*arguments: Any, **options: Any) -> None:
    """Accept what vLLM's loader passes and ignore it."""
