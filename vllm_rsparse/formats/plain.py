# SPDX-License-Identifier: Apache-2.0
"""The format ``float``: bfloat16, float16 or float32, no scales.

``data`` is the [N, K] view of contiguous [K, N] storage.
"""

import torch
from torch import Tensor

from vllm_rsparse.formats.base import (
    INPUT_DTYPES,
    StoredWeight,
    WeightFormat,
    WeightFormatError,
)


class FloatFormat(WeightFormat):
    """An element of the storage is an element of the weight."""

    name = "float"
    code = 0

    def check(self, weight: StoredWeight) -> None:
        """See the base class."""
        data = weight.data
        if data.dtype not in INPUT_DTYPES:
            raise WeightFormatError(
                "weight must be bfloat16, float16 or float32 in the format float, got"
                f" {data.dtype}"
            )
        if data.shape != weight.shape:
            raise WeightFormatError(
                f"weight must be {list(weight.shape)}, got {list(data.shape)}"
            )
        if weight.n > 1 and data.stride(0) != 1:
            raise WeightFormatError(
                f"weight [N, K] = {list(weight.shape)} must be stored [K, N], strides"
                f" (1, >= N); got {data.stride()}. Use weight.t().contiguous().t()"
            )
        if weight.scales is not None or weight.zeros is not None or weight.group:
            raise WeightFormatError("the format float has no scales, zeros or groups")

    def kind(self, dtype: torch.dtype) -> str:
        """The dtype: bfloat16, float16 or float32."""
        return str(dtype).removeprefix("torch.")

    def input_dtypes(self, weight: StoredWeight) -> tuple[torch.dtype, ...]:
        """The weight's own: vector and matrix units multiply two of a kind."""
        return (weight.data.dtype,)

    def dequantise(self, weight: StoredWeight) -> Tensor:
        """See the base class."""
        return weight.data.float()


FLOAT = FloatFormat()


def store_float(weight: Tensor) -> StoredWeight:
    """A dense weight [N, K] in the layout of the kernels; copies unless it has it."""
    n, k = weight.shape
    data = weight if n == 1 or weight.stride(0) == 1 else weight.t().contiguous().t()
    return StoredWeight(FLOAT, data, n, k)
