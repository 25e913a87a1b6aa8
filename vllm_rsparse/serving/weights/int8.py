# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors INT8, W8A8 and W8A16. The engine makes two planes of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)

from vllm_rsparse.formats.checkpoints.int8 import PER_WORD, Int8Channel, PackedInt8
from vllm_rsparse.serving.weights.base import Partition
from vllm_rsparse.serving.weights.layout import LayoutWeights, unloaded


class Int8ChannelWeights(LayoutWeights[Int8Channel]):
    """``weight_scale`` [N, 1]."""

    def _check(self, partition: Partition) -> None:
        """Any channels may be cut out of it."""

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        weight = ModelWeightParameter(
            data=torch.zeros(partition.n, partition.k, dtype=torch.int8),
            input_dim=1,
            output_dim=0,
            weight_loader=partition.weight_loader,
        )
        scale = ChannelQuantScaleParameter(
            data=unloaded((partition.n, 1), torch.float32),
            output_dim=0,
            weight_loader=partition.weight_loader,
        )
        return {"weight": weight, "weight_scale": scale}


class PackedInt8Weights(LayoutWeights[PackedInt8]):
    """``weight_scale`` [N, K/G]; with one group, all ranks have it."""

    def _check(self, partition: Partition) -> None:
        unit = self.layout.group or PER_WORD
        if partition.k % unit:
            raise self._error(
                f"a rank would hold {partition.k} of {partition.full_k} input channels,"
                f" which splits a group of {unit}: use fewer tensor-parallel ranks"
            )

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        group = self.layout.group
        packed = PackedvLLMParameter(
            data=torch.zeros(partition.n, partition.k // PER_WORD, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=PER_WORD,
            weight_loader=partition.weight_loader,
        )
        groups = 1 if group is None else partition.k // group
        # Wider than any scale in a checkpoint: whether a code can be split exactly
        # depends on its last bit.
        common: dict[str, Any] = {
            "data": unloaded((partition.n, groups), torch.float32),
            "output_dim": 0,
            "weight_loader": partition.weight_loader,
        }
        if group is None:
            scale: Parameter = ChannelQuantScaleParameter(**common)
        else:
            scale = GroupQuantScaleParameter(input_dim=1, **common)
        return {"weight_packed": packed, "weight_scale": scale}
