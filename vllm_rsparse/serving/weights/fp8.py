# SPDX-License-Identifier: Apache-2.0
"""FP8 with scales per output channel, per tensor, or per block of 128 x 128."""

from collections.abc import Mapping

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.parameter import (
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from vllm_rsparse.formats.checkpoints.fp8 import Fp8Block, Fp8Channel, Fp8Tensor
from vllm_rsparse.formats.fp8_block import BLOCK
from vllm_rsparse.serving.weights.base import Partition
from vllm_rsparse.serving.weights.layout import AnyLayout, LayoutWeights, unloaded


class _Fp8Weights(LayoutWeights[AnyLayout]):
    def _check(self, partition: Partition) -> None:
        """Any channels may be cut out of a weight whose scales are not blocks."""

    def _weight(self, partition: Partition) -> Parameter:
        shape = (partition.n, partition.k)
        return ModelWeightParameter(
            data=torch.empty(shape, dtype=torch.float8_e4m3fn),
            input_dim=1,
            output_dim=0,
            weight_loader=partition.weight_loader,
        )


class Fp8ChannelWeights(_Fp8Weights[Fp8Channel]):
    """``weight_scale`` [N, 1]."""

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        scale = ChannelQuantScaleParameter(
            data=unloaded((partition.n, 1), torch.float32),
            output_dim=0,
            weight_loader=partition.weight_loader,
        )
        return {"weight": self._weight(partition), "weight_scale": scale}


class Fp8TensorWeights(_Fp8Weights[Fp8Tensor]):
    """``weight_scale`` [shards]: each fused linear keeps a scale of its own."""

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        scale = PerTensorScaleParameter(
            data=unloaded((len(partition.shard_sizes),), torch.float32),
            weight_loader=partition.weight_loader,
        )
        return {"weight": self._weight(partition), "weight_scale": scale}


class Fp8BlockWeights(_Fp8Weights[Fp8Block]):
    """Scales [ceil(N/128), ceil(K/128)]."""

    def create(self, layer: LinearBase, partition: Partition) -> None:
        """See the base class."""
        # vLLM's loaders of fused layers take the size of a scale's block from here.
        layer.weight_block_size = [BLOCK, BLOCK]
        super().create(layer, partition)

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        blocks = (-(-partition.n // BLOCK), -(-partition.k // BLOCK))
        scale = BlockQuantScaleParameter(
            data=unloaded(blocks, torch.float32),
            input_dim=1,
            output_dim=0,
            weight_loader=partition.weight_loader,
        )
        return {"weight": self._weight(partition), self.layout.scales: scale}

    def _check(self, partition: Partition) -> None:
        *inner, last = partition.shard_sizes
        # The last shard may end in part of a block where it is a whole linear.
        if partition.n != partition.full_n:
            inner.append(last)
        if any(size % BLOCK for size in inner):
            raise self._error(
                f"a rank would hold {list(partition.shard_sizes)} output channels,"
                f" which splits a block of {BLOCK}: use fewer tensor-parallel ranks"
            )
        if partition.k != partition.full_k and partition.k % BLOCK:
            raise self._error(
                f"a rank would hold {partition.k} of {partition.full_k} input channels,"
                f" which splits a block of {BLOCK}: use fewer tensor-parallel ranks"
            )
