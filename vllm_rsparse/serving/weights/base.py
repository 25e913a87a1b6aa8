# SPDX-License-Identifier: Apache-2.0
"""``CheckpointWeights``: from a checkpoint's tensors to the kernels' stored weight.

A linear's weight has two forms. While the model loads, its parameters have the names,
shapes and dtypes of the checkpoint, in vLLM's parameter classes, so that vLLM's own
loaders fill this rank's slice of every fused shard. After that, the layer has one
``StoredWeight`` (``vllm_rsparse.formats``), whatever the checkpoint's format.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase

from vllm_rsparse.formats.base import StoredWeight

# Names of a layer's parameters for its stored weight. vLLM's LoRA layers also read
# `weight`, for its device and dtype.
DATA, SCALES, ZEROS = "weight", "rsparse_scales", "rsparse_zeros"
# The name for the elements where `weight` belongs to the base model's own layer.
DATA_BESIDE_BASE = "rsparse_weight"


@dataclass(frozen=True)
class Partition:
    """One rank's part of a (fused) linear, as vLLM describes it.

    Attributes:
        k: input features of this rank.
        shard_sizes: output features of this rank, per fused shard, in order.
        full_k: input features of the whole layer.
        full_n: output features of the whole layer; more than the checkpoint's where
            key and value heads are replicated.
        dtype: of the activations, and of weights that are not quantized.
        weight_loader: what vLLM's parameter classes call with the checkpoint's tensor.
    """

    k: int
    shard_sizes: tuple[int, ...]
    full_k: int
    full_n: int
    dtype: torch.dtype
    weight_loader: Callable[..., None]

    @property
    def n(self) -> int:
        """Output features of this rank, all shards together."""
        return sum(self.shard_sizes)


class CheckpointWeights(ABC):
    """One checkpoint format, for one layer.

    Attributes:
        parameters: names of the parameters that ``create`` registers.
        required: those that ``stored`` reads; the others only accept a tensor that
            some checkpoints have.
        while_loading: the parameters have no memory until the layer's tensors are
            there. vLLM allocates them then, and processes the layer before it loads
            the next: the device never holds more than one layer in both forms.
        quantised_inputs: whether dense steps may round x to the format of the weight,
            as the base model's own layer does.
    """

    parameters: tuple[str, ...]
    required: tuple[str, ...]
    while_loading: bool = False
    quantised_inputs: bool = False

    @abstractmethod
    def create(self, layer: LinearBase, partition: Partition) -> None:
        """Register the parameters that vLLM's loaders fill.

        Raises:
            RSparseError: this rank's part cannot be cut out of the format, because a
                group or a block would be split; names the layer and the size.
        """

    @abstractmethod
    def stored(self, layer: LinearBase, partition: Partition) -> StoredWeight:
        """The loaded parameters in the layout of the kernels, on their device.

        It may be called again with the same layer after vLLM has reloaded the weights,
        and must give tensors of the same shapes and dtypes.

        Raises:
            RSparseError: a tensor was not loaded or has values that the format does
                not allow; names it.
        """


def replace_parameters(
    layer: LinearBase, weights: CheckpointWeights, stored: StoredWeight
) -> None:
    """Drop the checkpoint's parameters and register the stored weight's instead."""
    for name in weights.parameters:
        delattr(layer, name)
    register_stored(layer, stored, DATA)


def register_stored(layer: LinearBase, stored: StoredWeight, data: str) -> None:
    """Register the stored weight under fixed names; absent tensors as None.

    Sleeping, moving and reloading the model then include them.

    Args:
        layer: the layer that gets the parameters.
        stored: the weight.
        data: name of the parameter for its elements, ``DATA`` or ``DATA_BESIDE_BASE``.
    """
    for name, tensor in (
        (data, stored.data),
        (SCALES, stored.scales),
        (ZEROS, stored.zeros),
    ):
        frozen = None if tensor is None else Parameter(tensor, requires_grad=False)
        layer.register_parameter(name, frozen)
