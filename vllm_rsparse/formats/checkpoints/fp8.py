# SPDX-License-Identifier: Apache-2.0
"""FP8: ``weight`` float8_e4m3fn [N, K] and scales per channel, tensor or block.

Scales are multiplied with, including those called ``weight_scale_inv``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.checkpoints.layout import (
    Layout,
    channel_shape,
    matrix,
    require_shape,
)
from vllm_rsparse.formats.fp8 import FP8, store_fp8
from vllm_rsparse.formats.fp8_block import (
    BLOCK,
    FP8_BLOCK,
    store_fp8_block,
)


class _Fp8(Layout):
    format: ClassVar[WeightFormat] = FP8
    required = ("weight", "weight_scale")
    # Where x is rounded, it gets a scale per token: those of the checkpoint are unused.
    unread = ("input_scale", "input_zero_point")
    dtypes: ClassVar = {"weight": torch.float8_e4m3fn}
    scales = "weight_scale"


def _without_nan(weight: Tensor) -> Tensor:
    """Refuse a weight with NaN: the kernels' conversion reads the two NaNs as 480."""
    if bool(((weight.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise WeightFormatError(
            "weight contains NaN; the checkpoint is damaged: download it again"
        )
    return weight


@dataclass(frozen=True)
class Fp8Channel(_Fp8):
    """``weight_scale`` [N, 1]."""

    quantised_inputs: bool = field(default=True, repr=False)

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        return channel_shape(shapes)

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        scales = tensors["weight_scale"].flatten()
        return store_fp8(_without_nan(tensors["weight"]), scales)


@dataclass(frozen=True)
class Fp8Tensor(_Fp8):
    """``weight_scale`` [] or [1]; of fused linears one scale per linear."""

    quantised_inputs: bool = field(default=True, repr=False)

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        if list(shapes["weight_scale"]) not in ([], [1]):
            require_shape(shapes, "weight_scale", (1,))
        return matrix(shapes, "weight")

    def _check_shapes(
        self, shapes: Mapping[str, Sequence[int]], sizes: Sequence[int] | None
    ) -> None:
        weight, count = shapes["weight"], prod(shapes["weight_scale"])
        sizes = [weight[0]] if sizes is None else list(sizes)
        if count != len(sizes) or sum(sizes) != weight[0]:
            raise WeightFormatError(
                f"weight_scale has {count} scales for {len(sizes)} fused linears of"
                f" {sizes} output channels and a weight of {list(weight)}; there must"
                " be one for each linear"
            )

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        weight, scales = tensors["weight"], tensors["weight_scale"].reshape(-1)
        sizes = [weight.shape[0]] if sizes is None else list(sizes)
        repeats = torch.tensor(sizes, device=scales.device)
        return store_fp8(_without_nan(weight), scales.repeat_interleave(repeats))


@dataclass(frozen=True)
class Fp8Block(_Fp8):
    """``weight_scale`` [ceil(N/128), ceil(K/128)], as compressed-tensors calls it."""

    format = FP8_BLOCK

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        n, k = matrix(shapes, "weight")
        require_shape(shapes, self.scales, (-(-n // BLOCK), -(-k // BLOCK)))
        return n, k

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        return store_fp8_block(_without_nan(tensors["weight"]), tensors[self.scales])


@dataclass(frozen=True)
class Fp8BlockInverse(Fp8Block):
    """The same with the native method's name of the scales, ``weight_scale_inv``."""

    required = ("weight", "weight_scale_inv")
    scales = "weight_scale_inv"
