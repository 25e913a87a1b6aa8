# SPDX-License-Identifier: Apache-2.0
"""``LoadTimeFormat``: the seam for weights that are quantized while a model loads.

The checkpoint on disk stays as it is. ``prepare`` and ``evaluate`` run on what
``round_trip`` makes of a weight, the engine on what ``encode`` makes of it: the same
numbers, whatever the number of ranks.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from vllm_rsparse.errors import SettingError
from vllm_rsparse.formats.base import StoredWeight, WeightFormat
from vllm_rsparse.formats.names import AS_STORED, ONLY_AS


class LoadTimeFormat(ABC):
    """One way to quantize a linear's weight while it loads. Instances have no state.

    Attributes:
        name: value of ``prepare --weights`` and of the key ``weights``.
        format: the weight format that it gives.
        bases: names of the formats that the checkpoint's own weights may have.
        artifact_scales: whether ``prepare`` writes ``scales`` into the artifact.
        quantised_inputs: whether dense steps may round x to the format too, as vLLM
            does where it quantizes to it while loading.
        multiples: of what N and K of a whole linear must be multiples.
    """

    name: ClassVar[str]
    format: ClassVar[WeightFormat]
    bases: ClassVar[tuple[str, ...]]
    artifact_scales: ClassVar[bool] = False
    quantised_inputs: ClassVar[bool] = False
    multiples: ClassVar[tuple[int, int]] = (1, 1)

    def scales(self, weight: Tensor) -> Tensor:
        """What ``encode`` needs to know of the whole linear: float32 [N].

        A rank of a row-parallel layer loads some input channels only, and would find
        other scales than calibration did. They are therefore part of the artifact.
        Defined where ``artifact_scales``.

        Args:
            weight: [N, K] of the whole linear, or its rows, in any float dtype.
        """
        raise NotImplementedError(f"{self.name} has no scales in the artifact")

    @abstractmethod
    def encode(
        self,
        weight: Tensor,
        scales: Tensor | None = None,
        channels: int | None = None,
    ) -> StoredWeight:
        """Quantize a weight into the layout of the kernels, on its device.

        Args:
            weight: [N, K] in any float dtype: a linear, several fused ones, or this
                rank's part of them.
            scales: float32 [N] from the artifact; None takes those of ``weight``.
            channels: input channels of the whole linear, where ``weight`` has a part of
                them; None: K.

        Raises:
            WeightFormatError: a shape that the format does not have.
        """

    def requantise(
        self,
        weight: StoredWeight,
        dtype: torch.dtype,
        scales: Tensor | None = None,
        channels: int | None = None,
    ) -> StoredWeight:
        """Quantize a weight that the checkpoint has in another format.

        Args:
            weight: in one of ``bases``.
            dtype: that the weight is rounded to once dequantised; the base's own.
            scales: as for ``encode``.
            channels: as for ``encode``.

        Raises:
            WeightFormatError: a shape that the format does not have.
        """
        return self.encode(weight.dequantise().to(dtype), scales, channels)

    def round_trip(self, weight: Tensor, scales: Tensor | None = None) -> Tensor:
        """The weight that is served, float32 [N, K]; arguments as for ``encode``."""
        return self.encode(weight, scales).dequantise()

    def check_base(self, base: str, what: str) -> None:
        """Refuse a checkpoint that this format cannot be made from.

        Args:
            base: name of the format of the checkpoint's weights.
            what: the checkpoint, for the message.

        Raises:
            SettingError: names the checkpoint's format and what to do.
        """
        if base not in self.bases:
            other = ONLY_AS.get(base, AS_STORED)
            raise SettingError(
                f"weights {self.name} are made from {' or '.join(self.bases)} weights,"
                f" but {what} has {base}; use --weights {other} to prepare, or the key"
                f" weights = {other} to serve"
            )
