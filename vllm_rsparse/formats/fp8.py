# SPDX-License-Identifier: Apache-2.0
"""The format ``fp8``: float8_e4m3fn with one scale per output channel.

    W[n, k] = q[n, k] * s[n]

``data`` is the [N, K] view of contiguous [K, N] storage. ``scales`` are float32 [N]; a
checkpoint with one scale per tensor repeats it over the tensor's output channels.
"""

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.require import require_fp8_rows, require_tensor


class Fp8Format(WeightFormat):
    """The scale leaves the sum over input channels."""

    name = "fp8"
    code = 1

    def check(self, weight: StoredWeight) -> None:
        """See the base class."""
        require_fp8_rows(weight)
        require_tensor("scales", weight.scales, (weight.n,), (torch.float32,))
        if weight.group:
            raise WeightFormatError(
                f"the format fp8 has no groups, got groups of {weight.group}"
            )

    def kind(self, dtype: torch.dtype) -> str:
        """The dtype, as for floats: scales per column cost nothing per row."""
        return "float8_e4m3fn"

    def dequantise(self, weight: StoredWeight) -> Tensor:
        """See the base class."""
        assert weight.scales is not None
        return weight.data.float() * weight.scales[:, None]

    def row_bytes(self, weight: StoredWeight, columns: int) -> float:
        """See the base class."""
        return columns

    def fixed_bytes(self, weight: StoredWeight, columns: int) -> int:
        """See the base class."""
        return columns * torch.float32.itemsize


FP8 = Fp8Format()


def store_fp8(elements: Tensor, scales: Tensor) -> StoredWeight:
    """Lay out a weight with scales per output channel as the kernels read it.

    Args:
        elements: float8_e4m3fn [N, K]; copied unless it is stored [K, N].
        scales: [N], one scale per output channel, in any float dtype.

    Raises:
        WeightFormatError: shapes or dtypes that the format does not have.
    """
    n, k = elements.shape
    return StoredWeight(
        FP8, elements.t().contiguous().t(), n, k, scales.float().contiguous()
    )
