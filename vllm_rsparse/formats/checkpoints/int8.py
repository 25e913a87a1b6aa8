# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' symmetric INT8: ``int-quantized`` and ``pack-quantized``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.checkpoints.groups import (
    pack_quantized_shape,
)
from vllm_rsparse.formats.checkpoints.layout import (
    GroupLayout,
    Layout,
    channel_shape,
)
from vllm_rsparse.formats.int8 import INT8, store_int8

# Codes in an int32, and what is added to them there.
PER_WORD = 4
OFFSET = 128


@dataclass(frozen=True)
class Int8Channel(Layout):
    """``weight`` int8 [N, K] and ``weight_scale`` [N, 1], of W8A8 checkpoints."""

    format = INT8
    required = ("weight", "weight_scale")
    # Activations stay in the model's dtype: their scales are not used.
    unread = ("input_scale", "input_zero_point")
    dtypes: ClassVar = {"weight": torch.int8}
    scales = "weight_scale"

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        return channel_shape(shapes)

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        return store_int8(tensors["weight"], tensors["weight_scale"])


@dataclass(frozen=True)
class PackedInt8(GroupLayout):
    """W8A16: ``weight_packed`` int32 [N, K/4], and ``weight_scale`` [N, K/G].

    A word holds four input channels, low byte first, with 128 added to each code.
    """

    format = INT8
    required = ("weight_packed", "weight_scale")
    # vLLM's fused layers have the shape of the last linear only.
    unread = ("weight_shape",)
    dtypes: ClassVar = {"weight_packed": torch.int32}
    scales = "weight_scale"

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        return pack_quantized_shape(shapes, PER_WORD, self.group)

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        # One bit is what 128 adds to a byte, modulo 256.
        signed = tensors["weight_packed"].contiguous().view(torch.uint8) ^ OFFSET
        return store_int8(signed.view(torch.int8), tensors["weight_scale"])
