# SPDX-License-Identifier: Apache-2.0
"""``StoredWeight`` and ``WeightFormat``: the seam between weights and what reads them.

Every format stores an input channel as one contiguous row, so that a channel that is
dropped is a row that is not read. A format's definition is its ``dequantise``; the
reference, the tests and the dense fallback use it, and kernels are compared with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.stored_bytes import StoredBytes, stored_bytes


class WeightFormatError(RSparseError):
    """A weight's tensors do not fit its format; names the tensor and the format."""


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """The weight of a (fused) linear on one rank, as the kernels read it.

    Attributes:
        format: how to read ``data``, ``scales`` and ``zeros``.
        data: the stored elements; one input channel is one contiguous row of memory.
        n: output features N, all shards together.
        k: input features K.
        scales: factors of the stored elements, or None where there are none.
        zeros: zero points, or None for a symmetric format.
        group: input channels that share one row of ``scales``; 0 where a scale belongs
            to an output channel, or where there are no scales.
    """

    format: "WeightFormat"
    data: Tensor
    n: int
    k: int
    scales: Tensor | None = None
    zeros: Tensor | None = None
    group: int = 0

    def __post_init__(self) -> None:
        self.format.check(self)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored: data, and scales and zeros where the format has them."""
        stored = (self.data, self.scales, self.zeros)
        return tuple(tensor for tensor in stored if tensor is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.n, self.k

    @property
    def kind(self) -> str:
        """What tables of tuned configurations call it: ``bfloat16``, ``int4``."""
        return self.format.kind(self.data.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes at rest, scales and zeros included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.data.device

    def to(self, device: torch.device) -> "StoredWeight":
        """The same on a device."""
        return replace(
            self,
            data=self.data.to(device),
            scales=None if self.scales is None else self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
        )

    def dequantise(self) -> Tensor:
        """The dequantised weight: float32 [N, K]."""
        return self.format.dequantise(self)


# What x, factors, bias and output may be.
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class WeightFormat(ABC):
    """One way to store a weight. Instances have no state and are compared by identity.

    Attributes:
        name: what users, tuned tables and artifacts call it.
        code: its number in the op's schema and in the C++ kernels, which take no names.
        planes: parts of an element that are read or skipped by themselves, the most
            significant first; each has thresholds of its own.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    planes: ClassVar[int] = 1

    @abstractmethod
    def check(self, weight: StoredWeight) -> None:
        """Refuse tensors that the kernels would read wrongly. Metadata only.

        Raises:
            WeightFormatError: names the tensor, what it is and what it should be.
        """

    def check_shards(self, sizes: Sequence[int]) -> None:  # noqa: B027 (most need none)
        """Refuse linears that cannot share a weight, or rows that kernels cannot cut.

        Args:
            sizes: output features of each fused linear, in order.

        Raises:
            WeightFormatError: names the sizes.
        """

    def kind(self, dtype: torch.dtype) -> str:
        """What distinguishes weights that kernels read at different speeds.

        Args:
            dtype: of the stored elements, where the format allows several.
        """
        return self.name

    def input_dtypes(self, weight: StoredWeight) -> tuple[torch.dtype, ...]:
        """Which inputs the kernels multiply with this weight; factors are the same."""
        return INPUT_DTYPES

    @abstractmethod
    def dequantise(self, weight: StoredWeight) -> Tensor:
        """The definition of the format: float32 [N, K]."""

    def dequantise_planes(self, weight: StoredWeight) -> tuple[Tensor, ...]:
        """What each plane stands for, float32 [N, K] each; the weight is their sum."""
        return (self.dequantise(weight),)

    def bytes_of(self, weight: StoredWeight, columns: int) -> StoredBytes:
        """What reading ``columns`` output features of a weight costs."""
        widths = weight.data if weight.scales is None else weight.scales
        return stored_bytes(
            self.name,
            columns,
            weight.k,
            widths.element_size(),
            weight.group,
            weight.zeros is not None,
        )
