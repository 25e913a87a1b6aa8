# SPDX-License-Identifier: Apache-2.0
"""Weights that are quantized while they load, layer by layer."""

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload.layerwise import (
    initialize_online_processing,
)

from vllm_rsparse.artifact.tensors import Artifact
from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.serving.weights.base import CheckpointWeights, Partition
from vllm_rsparse.serving.weights.float import FloatWeights

logger = logging.getLogger(__name__)

# A slice's own scale may exceed the artifact's where vLLM rounds the weights first, to
# bfloat16 by less than this. Elements beyond the scale become the largest number.
_ROUNDING = 2**-7


class LoadTimeWeights(CheckpointWeights):
    """What a checkpoint's own format gives, quantized to another.

    Args:
        source: the checkpoint's own format for this layer.
        load_time: the format to quantize to.
        artifact: has the scales, if the format needs those of the whole linear.
        names: checkpoint names of the fused shards, for messages.
    """

    def __init__(
        self,
        source: CheckpointWeights,
        load_time: LoadTimeFormat,
        artifact: Artifact,
        names: list[str],
    ) -> None:
        self._source = source
        self._load_time = load_time
        self._artifact = artifact
        self._names = names
        self.parameters = source.parameters
        self.required = source.required
        self.quantised_inputs = load_time.quantised_inputs
        # Other sources start with values by which they recognise what was not loaded.
        self.while_loading = isinstance(source, FloatWeights)

    def create(self, layer: LinearBase, partition: Partition) -> None:
        """See the base class."""
        if not self.while_loading:
            self._source.create(layer, partition)
            return
        with torch.device("meta"):
            self._source.create(layer, partition)
        initialize_online_processing(layer)

    def stored(self, layer: LinearBase, partition: Partition) -> StoredWeight:
        """See the base class."""
        loaded = self._source.stored(layer, partition)
        channels = partition.full_k
        try:
            if loaded.format is FLOAT:
                scales = self._scales(layer, loaded.data)
                return self._load_time.encode(loaded.data, scales, channels)
            # What ``prepare`` rounded: a weight dequantised to the base's own dtype.
            dtype = getattr(torch, self._artifact.info.base.dtype)
            return self._load_time.requantise(loaded, dtype, channels=channels)
        except WeightFormatError as error:
            names = " + ".join(self._names)
            raise CheckpointError(f"{names}: {error}") from error

    def _scales(self, layer: LinearBase, weight: Tensor) -> Tensor | None:
        """The artifact's scales of this rank's rows, or what takes their place.

        Raises:
            ArtifactError: a scale is not a positive number.
        """
        if not self._load_time.artifact_scales:
            return None
        mine = self._load_time.scales(weight)
        if self._artifact.info.weights != self._load_time.name:
            return mine
        slices: list[Any] = layer.rsparse_slices
        parts = [self._artifact.read_scales(s.name, s.rows) for s in slices]
        scales = torch.cat([part for part in parts if part is not None])
        scales = scales.to(weight.device)
        changed = mine > scales * (1 + _ROUNDING)
        if changed.any():
            logger.warning(
                "rsparse: %s: %d of %d output channels have larger weights than the"
                " model that was prepared; they get scales of their own. Prepare this"
                " model if it is not a fine-tuned version of the other",
                " + ".join(self._names),
                int(changed.sum()),
                len(scales),
            )
            scales = torch.where(changed, mine, scales)
        return scales
