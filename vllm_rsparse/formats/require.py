# SPDX-License-Identifier: Apache-2.0
"""Checks that several formats share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormatError


def require_tensor(
    name: str,
    tensor: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> None:
    """Refuse a tensor that is missing, or has another shape, dtype or layout.

    Raises:
        WeightFormatError: names the tensor, what it is and what it should be.
    """
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    expected = f"{name} must be contiguous {allowed} {list(shape)}"
    if tensor is None:
        raise WeightFormatError(f"{expected}; there are none")
    if tensor.dtype not in dtypes or list(tensor.shape) != list(shape):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise WeightFormatError(f"{expected}, got {dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise WeightFormatError(f"{expected}, got strides {tensor.stride()}")


def require_fp8_rows(weight: StoredWeight) -> None:
    """Refuse ``data`` that is not an [N, K] view of contiguous [K, N] float8_e4m3fn.

    Raises:
        WeightFormatError: as above; or the weight has zero points.
    """
    require_tensor(
        "weight.t()", weight.data.t(), (weight.k, weight.n), (torch.float8_e4m3fn,)
    )
    if weight.zeros is not None:
        raise WeightFormatError(f"the format {weight.format.name} has no zeros")
