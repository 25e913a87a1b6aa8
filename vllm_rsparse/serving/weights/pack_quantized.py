# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors W4A16."""

from collections.abc import Mapping

from torch.nn import Parameter

from vllm_rsparse.formats.checkpoints.pack_quantized import (
    PackQuantized,
    PackQuantizedAsymmetric,
)
from vllm_rsparse.serving.weights.base import Partition
from vllm_rsparse.serving.weights.layout import GroupedInt4


class PackQuantizedWeights(GroupedInt4[PackQuantized]):
    """Output channels come first in every tensor."""

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        parameters = {
            "weight_packed": self._words(
                partition, packed_dim=1, output_dim=0, input_dim=1
            ),
            "weight_scale": self._scales(partition, output_dim=0),
        }
        if isinstance(self.layout, PackQuantizedAsymmetric):
            parameters["weight_zero_point"] = self._zeros(partition, output_dim=0)
        return parameters
