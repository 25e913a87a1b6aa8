# SPDX-License-Identifier: Apache-2.0
"""GPTQ, symmetric and without act-order.

``g_idx`` is not read here: ``prepare`` has refused a checkpoint where it orders the
input channels, and vLLM drops it before it reaches a layer (since 0.30).
"""

from collections.abc import Mapping

from torch.nn import Parameter

from vllm_rsparse.formats.checkpoints.gptq import Gptq
from vllm_rsparse.serving.weights.base import Partition
from vllm_rsparse.serving.weights.layout import GroupedInt4


class GptqWeights(GroupedInt4[Gptq]):
    """Input channels come first in every tensor; words hold input channels."""

    def _required(self, partition: Partition) -> Mapping[str, Parameter]:
        return {
            "qweight": self._words(partition, packed_dim=0, output_dim=1, input_dim=0),
            "scales": self._scales(partition, output_dim=1),
        }
