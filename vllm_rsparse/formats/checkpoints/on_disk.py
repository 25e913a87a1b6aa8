# SPDX-License-Identifier: Apache-2.0
"""Linears as ``prepare --copy-weights --weights FORMAT`` writes them.

The tensors are what the engine would otherwise make of the base's weights while it
loads them. A rank reads its slice of them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.checkpoints.fp8 import Fp8Channel
from vllm_rsparse.formats.checkpoints.layout import (
    Layout,
    require_shape,
    shapes_of,
)
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.formats.nibbles import PER_WORD
from vllm_rsparse.formats.plane_bits import group_of

# Shape and dtype of a tensor.
Spec = tuple[tuple[int, ...], torch.dtype]


class OnDisk(Layout):
    """A layout that ``prepare`` writes.

    Attributes:
        name: of the load-time format that makes the weights.
    """

    name: ClassVar[str]

    @abstractmethod
    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """Shape and dtype of the tensors of a linear [N, K], by suffix."""

    @abstractmethod
    def tensors(self, stored: StoredWeight) -> dict[str, Tensor]:
        """The tensors of a weight, by suffix; ``store`` is the inverse."""

    @abstractmethod
    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The tensors of some output channels."""


@dataclass(frozen=True)
class PlanesOnDisk(OnDisk):
    """``int8-planes`` in the layout of the kernels.

    ``weight_planes`` int32 [2, K, N/8], ``weight_scale`` bfloat16 [K/G, N] and
    ``weight_zero_point`` int32 [K/G, N/8].
    """

    name = INT8_PLANES.name
    format = INT8_PLANES
    required = ("weight_planes", "weight_scale", "weight_zero_point")
    dtypes: ClassVar = {"weight_planes": torch.int32, "weight_zero_point": torch.int32}
    scales = "weight_scale"

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """See the base class."""
        planes = list(shapes["weight_planes"])
        if len(planes) != 3 or planes[0] != INT8_PLANES.planes:
            raise WeightFormatError(f"weight_planes must be [2, K, N/8], got {planes}")
        k, words = planes[1:]
        groups = len(shapes["weight_scale"]) and shapes["weight_scale"][0]
        require_shape(shapes, "weight_scale", (groups, words * PER_WORD))
        require_shape(shapes, "weight_zero_point", (groups, words))
        return words * PER_WORD, k

    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        """Nothing is copied unless it is a slice."""
        n, k = self.shape(shapes_of(tensors))
        planes, scales, zeros = (tensors[suffix] for suffix in self.required)
        return StoredWeight(
            INT8_PLANES,
            planes.contiguous(),
            n,
            k,
            scales.contiguous(),
            zeros.contiguous(),
            k // max(1, scales.shape[0]),
        )

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """See the base class."""
        group = group_of(k)
        if group is None or n % PER_WORD:
            raise WeightFormatError(
                f"a linear [N, K] = [{n}, {k}] cannot be stored in {self.name}"
            )
        return {
            "weight_planes": ((2, k, n // PER_WORD), torch.int32),
            "weight_scale": ((k // group, n), torch.bfloat16),
            "weight_zero_point": ((k // group, n // PER_WORD), torch.int32),
        }

    def tensors(self, stored: StoredWeight) -> dict[str, Tensor]:
        """See the base class."""
        assert stored.scales is not None
        assert stored.zeros is not None
        found = (stored.data, stored.scales, stored.zeros)
        return dict(zip(self.required, found, strict=True))

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """See the base class. Both ends must be multiples of 8."""
        words = slice(rows.start // PER_WORD, rows.stop // PER_WORD)
        return {
            suffix: tensor[..., rows if suffix == "weight_scale" else words]
            for suffix, tensor in tensors.items()
        }


@dataclass(frozen=True)
class Fp8OnDisk(Fp8Channel, OnDisk):
    """``fp8`` as compressed-tensors names it: ``weight``, ``weight_scale`` [N, 1]."""

    name = "fp8"

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """See the base class."""
        return {
            "weight": ((n, k), torch.float8_e4m3fn),
            "weight_scale": ((n, 1), torch.float32),
        }

    def tensors(self, stored: StoredWeight) -> dict[str, Tensor]:
        """See the base class."""
        assert stored.scales is not None
        return {"weight": stored.data, "weight_scale": stored.scales[:, None]}

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """See the base class."""
        return {suffix: tensor[rows] for suffix, tensor in tensors.items()}


_LAYOUTS: tuple[OnDisk, ...] = (PlanesOnDisk(), Fp8OnDisk())


def on_disk_layout(name: str) -> OnDisk:
    """The layout of a load-time format by its name, which is known."""
    return next(layout for layout in _LAYOUTS if layout.name == name)
