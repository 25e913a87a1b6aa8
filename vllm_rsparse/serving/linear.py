# SPDX-License-Identifier: Apache-2.0
"""``RSparseLinearMethod``: how a linear layer gets its tensors and uses them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.op.backends import DenseRoute, routes_of
from vllm_rsparse.op.layers import DenseLayer
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.serving.dense import BaseLayer
from vllm_rsparse.serving.layer import SparseLayer
from vllm_rsparse.serving.served import ServedModel
from vllm_rsparse.serving.weights.base import (
    DATA,
    DATA_BESIDE_BASE,
    CheckpointWeights,
    Partition,
    register_stored,
    replace_parameters,
)

# vLLM processes a layer once when it is loaded and would do so again at the end; it
# deletes this mark of its own methods before it reloads a layer.
_PROCESSED = "_already_called_process_weights_after_loading"


@dataclass(frozen=True)
class ShardSlice:
    """What one rank owns of one linear of the checkpoint."""

    name: str
    rows: slice
    columns: slice

    @property
    def row_count(self) -> int:
        return self.rows.stop - self.rows.start


@register_weight_loader_v2_supported_method
class RSparseLinearMethod(SparseLayer, LinearMethodBase):
    """Sparse-plus-low-rank linear layer with a dense route on the same weight copy.

    Args:
        served: the model, shared by the methods of all its layers.
        names: checkpoint names of the fused shards, in the order of the output.
        weights: how the checkpoint stores the layer's weight.
        dense: the base model's own layer for the dense steps; None: they use the same
            weights as the sparse ones.
    """

    def __init__(
        self,
        served: ServedModel,
        names: list[str],
        weights: CheckpointWeights,
        dense: BaseLayer | None = None,
    ) -> None:
        super().__init__(served, names, DATA if dense is None else DATA_BESIDE_BASE)
        self.weights = weights
        self.dense = dense
        # vLLM reads this. The base's own layer allocates its parameters at once.
        self.uses_meta_device = weights.while_loading and dense is None

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's parameters and check shapes by header alone.

        The artifact's tensors are read after loading: a dummy load format would
        overwrite them, and the device is known by then.
        """
        layer.rsparse_slices = shard_slices(
            layer,
            self.names,
            [self.served.artifact.entry(name).shape for name in self.names],
            input_size_per_partition,
            output_partition_sizes,
        )
        self.partition = Partition(
            k=input_size_per_partition,
            shard_sizes=tuple(output_partition_sizes),
            full_k=input_size,
            full_n=output_size,
            dtype=params_dtype,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        if self.dense is None:
            self.weights.create(layer, self.partition)
            return
        self.dense.create(
            layer,
            self.weights,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            input_size=input_size,
            output_size=output_size,
            params_dtype=params_dtype,
            **extra_weight_attrs,
        )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Store the weight for the kernels and read this rank's part of the artifact.

        Only one layer at a time is in memory twice.
        """
        if self.uses_meta_device and getattr(layer, _PROCESSED, False):
            return
        self.served.check_coverage()
        stored = self.weights.stored(layer, self.partition)
        # A backend that cannot read the format fails here, and not at a request.
        routes = routes_of(self.backend, stored.format)
        dense_bytes, dense_layer = 0, None
        if self.dense is None:
            replace_parameters(layer, self.weights, stored)
            if self.weights.quantised_inputs and routes.dense_quantised is not None:
                dense_layer = _with_weight(routes.dense_quantised, stored)
        else:
            register_stored(layer, stored, DATA_BESIDE_BASE)
            dense_bytes = self.dense.process(layer)
            dense_layer = self.dense.bound_to(layer)
        slices: list[ShardSlice] = layer.rsparse_slices
        artifact = self.served.artifact
        # The all-reduce after a row-parallel layer adds up the ranks' outputs.
        later_rank = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
        operands = SparseOperands.from_shards(
            stored,
            [artifact.read(s.name, s.rows, s.columns) for s in slices],
            [s.row_count for s in slices],
            self.partition.dtype,
            with_correction=not later_rank,
        )
        self.hold(layer, operands, dense_layer)
        self.served.note_loaded(
            self.names, stored.nbytes, dense_bytes, operands.artifact_nbytes
        )
        counters = self.served.open_counters()
        if counters is not None:
            counters.register(self.layer_number, self.names, operands)
        if self.uses_meta_device:
            setattr(layer, _PROCESSED, True)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] to [..., N]; the op decides between the sparse and dense route."""
        return self.call_op(layer, x, bias)


def _with_weight(route: DenseRoute, weight: StoredWeight) -> DenseLayer:
    """x [M, K], bias -> [M, N] by a route on this weight."""

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        return route(x, weight, bias)

    return apply


def shard_slices(
    layer: LinearBase,
    names: list[str],
    shapes: list[tuple[int, int]],
    input_size_per_partition: int,
    output_partition_sizes: list[int],
) -> list[ShardSlice]:
    """Which rows and columns of each checkpoint linear this rank owns.

    Column-parallel layers own rows, row-parallel layers columns. Key and value heads
    are replicated where there are fewer of them than ranks.

    Raises:
        ArtifactError: the artifact's shape does not fit the model's layer.
    """
    rank, size = layer.tp_rank, layer.tp_size
    row_parallel = isinstance(layer, RowParallelLinear)
    slices = []
    for index, (name, (n, k), rows) in enumerate(
        zip(names, shapes, output_partition_sizes, strict=True)
    ):
        replicas = getattr(layer, "num_kv_head_replicas", 1) if index > 0 else 1
        column_ranks = 1 if row_parallel else size // replicas
        row_ranks = size if row_parallel else 1
        expected = (rows * column_ranks, input_size_per_partition * row_ranks)
        if (n, k) != expected:
            raise ArtifactError(
                f"the artifact's {name} is [{n}, {k}], the model's is"
                f" [{expected[0]}, {expected[1]}]; it was prepared from another model:"
                " prepare this one"
            )
        row = 0 if row_parallel else rank // replicas * rows
        column = rank * input_size_per_partition if row_parallel else 0
        slices.append(
            ShardSlice(
                name,
                slice(row, row + rows),
                slice(column, column + input_size_per_partition),
            )
        )
    return slices
