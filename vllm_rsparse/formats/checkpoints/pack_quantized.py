# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' ``pack-quantized`` with four bits.

``weight_packed`` int32 [N, K/8] packs eight input channels to a word, low nibble first.
``weight_scale`` is [N, K/G]. Where the weight is not symmetric, ``weight_zero_point``
int32 [N/8, K/G] packs eight output channels to a word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.checkpoints.groups import (
    group_count,
    pack_quantized_shape,
)
from vllm_rsparse.formats.checkpoints.layout import (
    GroupLayout,
    require_shape,
)
from vllm_rsparse.formats.int4 import INT4, store_int4
from vllm_rsparse.formats.nibbles import PER_WORD, unpack_nibbles


@dataclass(frozen=True)
class PackQuantized(GroupLayout):
    """Symmetric (zero point 8)."""

    format = INT4
    required: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    # vLLM's fused layers have the shape of the last linear only.
    unread = ("weight_shape",)
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {"weight_packed": torch.int32}
    scales = "weight_scale"

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        return pack_quantized_shape(shapes, PER_WORD, self.group)

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        codes = unpack_nibbles(tensors["weight_packed"]).t()
        return store_int4(codes, tensors["weight_scale"].t(), self._zeros(tensors))

    def _zeros(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """uint8 [K/G, N]."""
        return None


@dataclass(frozen=True)
class PackQuantizedAsymmetric(PackQuantized):
    """With zero points."""

    required = ("weight_packed", "weight_scale", "weight_zero_point")
    dtypes: ClassVar = {"weight_packed": torch.int32, "weight_zero_point": torch.int32}

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        n, k = super().shape(shapes)
        count = group_count("weight_packed", k, self.group)
        require_shape(shapes, "weight_zero_point", (-(-n // PER_WORD), count))
        return n, k

    def _zeros(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return unpack_nibbles(tensors["weight_zero_point"].t())
