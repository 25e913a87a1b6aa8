# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in bfloat16, float16 or float32: one tensor ``weight`` [N, K]."""

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.serving.weights.base import CheckpointWeights, Partition


class FloatWeights(CheckpointWeights):
    """The weight as the base model's unquantized layer allocates and loads it."""

    parameters = ("weight",)
    required = parameters

    def create(self, layer: LinearBase, partition: Partition) -> None:
        """See the base class."""
        weight = ModelWeightParameter(
            data=torch.empty(partition.n, partition.k, dtype=partition.dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=partition.weight_loader,
        )
        layer.register_parameter("weight", weight)

    def stored(self, layer: LinearBase, partition: Partition) -> StoredWeight:
        """See the base class. Only one layer at a time is held twice."""
        return store_float(layer.weight.data)
