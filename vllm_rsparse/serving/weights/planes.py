# SPDX-License-Identifier: Apache-2.0
"""Weights in two planes, as ``prepare --copy-weights`` wrote them."""

from collections.abc import Mapping

import torch
from torch.nn import Parameter
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

from vllm_rsparse.formats.checkpoints.on_disk import PlanesOnDisk
from vllm_rsparse.formats.nibbles import PER_WORD
from vllm_rsparse.formats.plane_bits import group_of
from vllm_rsparse.serving.weights.base import Partition
from vllm_rsparse.serving.weights.layout import LayoutWeights, unloaded


class PlanesWeights(LayoutWeights[PlanesOnDisk]):
    """Output channels come last in every tensor, input channels before them."""

    def _check(self, partition: Partition) -> None:
        if any(size % PER_WORD for size in partition.shard_sizes):
            raise self._error(
                f"a rank would hold {list(partition.shard_sizes)} output channels;"
                f" int8-planes are cut in multiples of {PER_WORD}: use fewer"
                " tensor-parallel ranks"
            )
        group = group_of(partition.full_k)
        if group is None or partition.k % group:
            raise self._error(
                f"a rank would hold {partition.k} of {partition.full_k} input channels,"
                f" which splits a group of {group}: use fewer tensor-parallel ranks"
            )

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        n, k = partition.n, partition.k
        groups = k // (group_of(partition.full_k) or k)
        loader = partition.weight_loader
        planes, scale, zeros = self.layout.required
        return {
            planes: PackedvLLMParameter(
                data=torch.zeros(2, k, n // PER_WORD, dtype=torch.int32),
                input_dim=1,
                output_dim=2,
                packed_dim=2,
                packed_factor=PER_WORD,
                weight_loader=loader,
            ),
            scale: GroupQuantScaleParameter(
                data=unloaded((groups, n), torch.bfloat16),
                input_dim=0,
                output_dim=1,
                weight_loader=loader,
            ),
            zeros: PackedvLLMParameter(
                data=torch.zeros(groups, n // PER_WORD, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=1,
                packed_factor=PER_WORD,
                weight_loader=loader,
            ),
        }
