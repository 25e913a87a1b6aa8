# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' symmetric INT8: ``int-quantized`` and ``pack-quantized``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat
from vllm_rsparse.formats.checkpoints.groups import (
    pack_quantized_shape,
)
from vllm_rsparse.formats.checkpoints.layout import (
    Layout,
    matrix,
    require_dtype,
    require_scales,
    require_shape,
    shapes_of,
)
from vllm_rsparse.formats.int8 import INT8, store_int8

# Codes in an int32, and what is added to them there.
PER_WORD = 4
OFFSET = 128


@dataclass(frozen=True)
class Int8Channel(Layout):
    """``weight`` int8 [N, K] and ``weight_scale`` [N, 1], of W8A8 checkpoints."""

    required = ("weight", "weight_scale")
    # Activations stay in the model's dtype: their scales are not used.
    unread = ("input_scale", "input_zero_point")

    @property
    def format(self) -> WeightFormat:
        """See the base class."""
        return INT8

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        n, k = matrix(shapes, "weight")
        require_shape(shapes, "weight_scale", (n, 1))
        return n, k

    def store(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None = None
    ) -> StoredWeight:
        """See the base class."""
        self.shape(shapes_of(tensors))
        require_dtype(tensors, "weight", torch.int8)
        require_scales(tensors, "weight_scale")
        return store_int8(tensors["weight"], tensors["weight_scale"])


@dataclass(frozen=True)
class PackedInt8(Layout):
    """W8A16: ``weight_packed`` int32 [N, K/4], and ``weight_scale`` [N, K/G].

    A word holds four input channels, low byte first, with 128 added to each code.

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
        return INT8

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
        # One bit is what 128 adds to a byte, modulo 256.
        signed = tensors["weight_packed"].contiguous().view(torch.uint8) ^ OFFSET
        return store_int8(signed.view(torch.int8), tensors["weight_scale"])
