# SPDX-License-Identifier: Apache-2.0
"""FP8: ``weight`` float8_e4m3fn [N, K] and scales per channel, tensor or block.

Scales are multiplied with, including those called ``weight_scale_inv``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.checkpoints.layout import (
    Layout,
    matrix,
    require_dtype,
    require_scales,
    require_shape,
    shapes_of,
)
from vllm_rsparse.formats.fp8 import FP8, store_fp8
from vllm_rsparse.formats.fp8_block import (
    BLOCK,
    FP8_BLOCK,
    store_fp8_block,
)


class _Fp8(Layout):
    required = ("weight", "weight_scale")
    # Where x is rounded, it gets a scale per token: those of the checkpoint are unused.
    unread = ("input_scale", "input_zero_point")

    @property
    def format(self) -> WeightFormat:
        """See the base class."""
        return FP8

    def _check(self, tensors: Mapping[str, Tensor], scale: str) -> None:
        require_dtype(tensors, "weight", torch.float8_e4m3fn)
        require_scales(tensors, scale)
        # The kernels' conversion reads the two NaNs as 480.
        if bool(((tensors["weight"].view(torch.uint8) & 0x7F) == 0x7F).any()):
            raise WeightFormatError(
                "weight contains NaN; the checkpoint is damaged: download it again"
            )


@dataclass(frozen=True)
class Fp8Channel(_Fp8):
    """``weight_scale`` [N, 1]."""

    quantised_inputs: bool = field(default=True, repr=False)

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
        self._check(tensors, "weight_scale")
        return store_fp8(tensors["weight"], tensors["weight_scale"].flatten())


@dataclass(frozen=True)
class Fp8Tensor(_Fp8):
    """``weight_scale`` [] or [1]; of fused linears one scale per linear."""

    quantised_inputs: bool = field(default=True, repr=False)

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        if list(shapes["weight_scale"]) not in ([], [1]):
            require_shape(shapes, "weight_scale", (1,))
        return matrix(shapes, "weight")

    def store(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None = None
    ) -> StoredWeight:
        """See the base class."""
        self._check(tensors, "weight_scale")
        weight, scales = tensors["weight"], tensors["weight_scale"].reshape(-1)
        sizes = [weight.shape[0]] if sizes is None else list(sizes)
        if scales.numel() != len(sizes) or sum(sizes) != weight.shape[0]:
            raise WeightFormatError(
                f"weight_scale has {scales.numel()} scales for {len(sizes)} fused"
                f" linears of {sizes} output channels and a weight of"
                f" {list(weight.shape)}; there must be one for each linear"
            )
        repeats = torch.tensor(sizes, device=scales.device)
        return store_fp8(weight, scales.repeat_interleave(repeats))


@dataclass(frozen=True)
class Fp8Block(_Fp8):
    """``weight_scale`` [ceil(N/128), ceil(K/128)], as compressed-tensors calls it."""

    scale = "weight_scale"

    @property
    def format(self) -> WeightFormat:
        """See the base class."""
        return FP8_BLOCK

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        n, k = matrix(shapes, "weight")
        require_shape(shapes, self.scale, (-(-n // BLOCK), -(-k // BLOCK)))
        return n, k

    def store(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None = None
    ) -> StoredWeight:
        """See the base class."""
        if sizes is not None:
            FP8_BLOCK.check_shards(sizes)
        self.shape(shapes_of(tensors))
        self._check(tensors, self.scale)
        return store_fp8_block(tensors["weight"], tensors[self.scale])


@dataclass(frozen=True)
class Fp8BlockInverse(Fp8Block):
    """The same with the native method's name of the scales, ``weight_scale_inv``."""

    required = ("weight", "weight_scale_inv")
    scale = "weight_scale_inv"
