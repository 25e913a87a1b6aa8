# SPDX-License-Identifier: Apache-2.0
"""``Layout``: the tensors of a quantized linear, in a checkpoint or just loaded."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormat, WeightFormatError
from vllm_rsparse.formats.plain import FLOAT


class Layout(ABC):
    """How a checkpoint stores a quantized linear. Subclasses are frozen dataclasses.

    Attributes:
        format: of what ``store`` returns.
        required: suffixes of the tensors that the linear must have; ``store`` reads
            them.
        checked: suffixes of tensors that it may have; where ``store`` is given one, it
            refuses values that it would otherwise have to take into account.
        unread: suffixes of tensors that it may have and that nobody needs.
        dtypes: of the required tensors that hold codes, by suffix.
        scales: suffix of the required tensor that holds the scales.
        quantised_inputs: whether the base model's own layer rounds x to the format of
            the weight.
    """

    format: ClassVar[WeightFormat]
    required: ClassVar[tuple[str, ...]]
    checked: ClassVar[tuple[str, ...]] = ()
    unread: ClassVar[tuple[str, ...]] = ()
    dtypes: ClassVar[Mapping[str, torch.dtype]]
    scales: ClassVar[str]
    quantised_inputs: bool = False

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of all tensors that belong to the weight, whether they are read or not."""
        return self.required + self.checked + self.unread

    @property
    def zeros(self) -> bool:
        """Whether the checkpoint has zero points, and so what ``store`` returns."""
        return any("zero" in suffix for suffix in self.required)

    @abstractmethod
    def shape(self, shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
        """(N, K) of the linear.

        Args:
            shapes: shape of each required tensor, by suffix.

        Raises:
            WeightFormatError: names the tensor whose shape does not fit the others'.
        """

    def store(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None = None
    ) -> StoredWeight:
        """The weight as the kernels read it.

        Args:
            tensors: the required tensors by suffix, and maybe checked ones. Of fused
                linears, each is the concatenation along the output channels, of a
                tensor-parallel rank its slice.
            sizes: output features of each fused linear; None means a single linear.

        Raises:
            WeightFormatError: names the tensor and what is wrong with it.
        """
        if sizes is not None:
            self.format.check_shards(sizes)
        self._check_shapes(shapes_of(tensors), sizes)
        for suffix, dtype in self.dtypes.items():
            require_dtype(tensors, suffix, dtype)
        require_scales(tensors, self.scales)
        return self._stored(tensors, sizes)

    def _check_shapes(
        self, shapes: Mapping[str, Sequence[int]], sizes: Sequence[int] | None
    ) -> None:
        """Refuse shapes that do not fit each other, of one linear or of fused ones."""
        self.shape(shapes)

    @abstractmethod
    def _stored(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[int] | None
    ) -> StoredWeight:
        """``store`` of tensors whose shapes, dtypes and scales have been checked."""


@dataclass(frozen=True)
class GroupLayout(Layout):
    """A layout whose scales may belong to groups of input channels.

    Attributes:
        group: input channels that share a scale; None for all of them.
    """

    group: int | None


def format_of_layout(layout: Layout | None) -> tuple[str, int]:
    """Name of a linear's format, and the input channels that share a scale in INT4.

    The number is 0 if all of them do, and in the other formats.

    Args:
        layout: None for a linear that is not quantized.
    """
    if layout is None:
        return FLOAT.name, 0
    group = layout.group if isinstance(layout, GroupLayout) else None
    return layout.format.name, group or 0


def main_format(formats: Iterable[tuple[str, int]]) -> tuple[str, int]:
    """The format of most quantized linears; that of floats if none is quantized.

    Args:
        formats: of each linear, as ``format_of_layout`` gives it.
    """
    counts = Counter(one for one in formats if one[0] != FLOAT.name)
    return max(counts, key=counts.__getitem__, default=(FLOAT.name, 0))


def matrix(shapes: Mapping[str, Sequence[int]], suffix: str) -> tuple[int, int]:
    """Shape of a tensor that must have two dimensions."""
    shape = shapes[suffix]
    if len(shape) != 2:
        raise WeightFormatError(f"{suffix} must have 2 dimensions, got {list(shape)}")
    return shape[0], shape[1]


def channel_shape(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """(N, K) of ``weight`` [N, K] and ``weight_scale`` [N, 1]."""
    n, k = matrix(shapes, "weight")
    require_shape(shapes, "weight_scale", (n, 1))
    return n, k


def require_shape(
    shapes: Mapping[str, Sequence[int]], suffix: str, expected: Sequence[int]
) -> None:
    """Refuse a tensor of another shape by its suffix."""
    if list(shapes[suffix]) != list(expected):
        raise WeightFormatError(
            f"{suffix} must be {list(expected)}, got {list(shapes[suffix])}"
        )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor by suffix."""
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


def require_dtype(
    tensors: Mapping[str, Tensor], suffix: str, dtype: torch.dtype
) -> None:
    """Refuse a tensor of another dtype by its suffix."""
    if tensors[suffix].dtype != dtype:
        raise WeightFormatError(
            f"{suffix} must be {dtype}, got {tensors[suffix].dtype}"
        )


def require_scales(tensors: Mapping[str, Tensor], suffix: str) -> None:
    """Refuse scales that are not finite, or that vLLM allocated but never loaded."""
    scales = tensors[suffix]
    if not scales.is_floating_point():
        raise WeightFormatError(f"{suffix} must be a float, got {scales.dtype}")
    # vLLM fills scales with the lowest number of their dtype until they are loaded.
    if not bool((scales.isfinite() & (scales > torch.finfo(scales.dtype).min)).all()):
        raise WeightFormatError(
            f"{suffix} has values that are not finite, or was not loaded; the"
            " checkpoint is damaged: download it again"
        )
