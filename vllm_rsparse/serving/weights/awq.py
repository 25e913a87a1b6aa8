# SPDX-License-Identifier: Apache-2.0
"""AWQ, version gemm."""

from collections.abc import Mapping

from torch.nn import Parameter

from vllm_rsparse.formats.checkpoints.awq import AwqGemm
from vllm_rsparse.serving.weights.base import Partition
from vllm_rsparse.serving.weights.layout import GroupedInt4


class AwqWeights(GroupedInt4[AwqGemm]):
    """Input channels come first in every tensor; words hold output channels."""

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        return {
            "qweight": self._words(partition, packed_dim=1, output_dim=1, input_dim=0),
            "qzeros": self._zeros(partition, output_dim=1),
            "scales": self._scales(partition, output_dim=1),
        }
