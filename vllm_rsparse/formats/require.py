# SPDX-License-Identifier: Apache-2.0
"""Checks that several formats share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.nibbles import PER_WORD

# What the scales of four-bit codes may be.
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


def require_nibbles(
    weight: StoredWeight,
    groups: Sequence[int],
    planes: Sequence[int] = (),
    whole: bool = False,
) -> None:
    """Refuse a weight whose codes of four bits are packed by output channels wrongly.

    Args:
        weight: ``data`` must be int32 [*planes, K, N/8], with scales [K/G, N] and
            maybe zeros int32 [K/G, N/8].
        groups: what G may be, if that divides K.
        planes: leading dimensions of ``data``.
        whole: whether G may also be K.

    Raises:
        WeightFormatError: names the tensor, what it is and what it should be.
    """
    n, k, group, name = weight.n, weight.k, weight.group, weight.format.name
    if n % PER_WORD:
        raise WeightFormatError(
            f"weight [N, K] = [{n}, {k}]: the format {name} packs eight output"
            f" channels to a word, so N must be a multiple of {PER_WORD}"
        )
    if (group not in groups and not (whole and group == k)) or k % group:
        raise WeightFormatError(
            f"weight [N, K] = [{n}, {k}]: groups of {group} input channels; the"
            f" format {name} takes {', '.join(map(str, groups))} if that divides K"
            f"{', or K itself' if whole else ''}"
        )
    words = n // PER_WORD
    require_tensor("weight", weight.data, (*planes, k, words), (torch.int32,))
    require_tensor("scales", weight.scales, (k // group, n), SCALE_DTYPES)
    if weight.zeros is not None:
        require_tensor("zeros", weight.zeros, (k // group, words), (torch.int32,))


def require_whole_words(name: str, sizes: Sequence[int]) -> None:
    """Refuse fused linears of which two would have channels in one word.

    Args:
        name: of the format.
        sizes: output features of each linear.

    Raises:
        WeightFormatError: names the sizes.
    """
    if any(size % PER_WORD for size in sizes):
        raise WeightFormatError(
            f"linears with {', '.join(map(str, sizes))} output channels cannot be"
            f" fused in the format {name}: each needs a multiple of {PER_WORD}"
        )
