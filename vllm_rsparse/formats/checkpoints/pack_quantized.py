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

from vllm_rsparse.formats.base import StoredWeight, WeightFormat
from vllm_rsparse.formats.checkpoints.groups import (
    group_count,
    pack_quantized_shape,
)
from vllm_rsparse.formats.checkpoints.layout import (
    Layout,
    require_dtype,
    require_scales,
    require_shape,
    shapes_of,
)
from vllm_rsparse.formats.int4 import INT4, store_int4
from vllm_rsparse.formats.nibbles import PER_WORD, unpack_nibbles


@dataclass(frozen=True)
class PackQuantized(Layout):
    """Symmetric (zero point 8).

    Attributes:
        group: input channels that share a scale; None for all of them.
    """

    group: int | None

    required: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    # vLLM's fused layers have the shape of the last linear only.
    unread = ("weight_shape",)

    @property
    def format(self) -> WeightFormat:
        """See the base class."""
        return INT4

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        return pack_quantized_shape(shapes, PER_WORD, self.group)

    def store(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None = None
    ) -> StoredWeight:
        """See the base class."""
        self.shape(shapes_of(tensors))
        require_dtype(tensors, "weight_packed", torch.int32)
        require_scales(tensors, "weight_scale")
        codes = unpack_nibbles(tensors["weight_packed"]).t()
        return store_int4(codes, tensors["weight_scale"].t(), self._zeros(tensors))

    def _zeros(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """uint8 [K/G, N]."""
        return None


@dataclass(frozen=True)
class PackQuantizedAsymmetric(PackQuantized):
    """With zero points."""

    required = ("weight_packed", "weight_scale", "weight_zero_point")

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        n, k = super().shape(shapes)
        count = group_count("weight_packed", k, self.group)
        require_shape(shapes, "weight_zero_point", (-(-n // PER_WORD), count))
        return n, k

    def _zeros(self, tensors: Mapping[str, Tensor]) -> Tensor:
        require_dtype(tensors, "weight_zero_point", torch.int32)
        return unpack_nibbles(tensors["weight_zero_point"].t())
