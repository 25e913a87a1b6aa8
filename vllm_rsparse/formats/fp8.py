# SPDX-License-Identifier: Apache-2.0
"""The format ``fp8``: float8_e4m3fn with one scale per output channel.

    W[n, k] = q[n, k] * s[n]

``data`` is the [N, K] view of contiguous [K, N] storage. ``scales`` are float32 [N]; a
checkpoint with one scale per tensor repeats it over the tensor's output channels.

A float weight becomes FP8 by rounding W / s to the nearest element (ties to even), with
s[n] = max_k |W[n, k]| / 448, so that the largest element of a row is 448, float8's
largest number.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.formats.require import require_fp8_rows, require_tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Rows are quantized in pieces: the float32 intermediates of a 70B model's largest
# weight would take 3.8 GB.
_PIECE = 1 << 24


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


def channel_scales(weight: Tensor) -> Tensor:
    """Scales float32 [N] of a float weight [N, K]; 1 where a row is zero."""
    largest = weight.abs().amax(dim=1).float()
    # A tensor as divisor: on CUDA, a number would become a product with its inverse,
    # whose last bit differs from what other devices compute.
    scales = largest / torch.tensor(LARGEST, device=weight.device)
    return scales.masked_fill_(scales == 0, 1)


def quantise_fp8(weight: Tensor, scales: Tensor) -> StoredWeight:
    """Round a float weight to FP8.

    Args:
        weight: [N, K] in any float dtype.
        scales: float32 [N]; elements beyond 448 times their scale become 448.

    Raises:
        WeightFormatError: shapes or dtypes that the format does not have.
    """
    n, k = weight.shape
    require_tensor("scales", scales, (n,), (torch.float32,))
    rows = torch.empty(k, n, dtype=torch.float8_e4m3fn, device=weight.device)
    for piece, elements in _rounded(weight, scales):
        rows[:, piece] = elements.t()
    return StoredWeight(FP8, rows.t(), n, k, scales)


def _rounded(weight: Tensor, scales: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after others: which, and their elements float8_e4m3fn."""
    n, k = weight.shape
    step = max(1, _PIECE // k)
    for first in range(0, n, step):
        piece = slice(first, first + step)
        quotient = weight[piece].float() / scales[piece, None]
        yield piece, quotient.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


class Fp8WhileLoading(LoadTimeFormat):
    """Float weights, rounded to FP8 per output channel."""

    name = "fp8"
    format = FP8
    bases = (FLOAT.name,)
    artifact_scales = True
    quantised_inputs = True

    def scales(self, weight: Tensor) -> Tensor:
        """See the base class."""
        return channel_scales(weight)

    def encode(
        self,
        weight: Tensor,
        scales: Tensor | None = None,
        channels: int | None = None,
    ) -> StoredWeight:
        """See the base class."""
        return quantise_fp8(weight, self.scales(weight) if scales is None else scales)

    def round_trip(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        """See the base class. Without storing [K, N] in between, which is slow."""
        scales = self.scales(weight) if scales is None else scales
        result = torch.empty_like(weight, dtype=torch.float32)
        for piece, elements in _rounded(weight, scales):
            torch.mul(elements.float(), scales[piece, None], out=result[piece])
        return result


FP8_WHILE_LOADING = Fp8WhileLoading()
