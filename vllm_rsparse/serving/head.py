# SPDX-License-Identifier: Apache-2.0
"""The output layer (lm_head) in FP8, also where it shares the embedding's weight.

vLLM computes logits outside of the compiled model, by the quantization method of the
module that it calls ``lm_head``. That is a ``ParallelLMHead``, or the embedding itself
where the two are tied; an embedding keeps its own weight for looking tokens up.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_rsparse.artifact.tensors import LinearTensors
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.op import layers, ops
from vllm_rsparse.op.backends import load_backend, routes_of
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.serving.served import ServedModel
from vllm_rsparse.serving.weights.base import DATA

# Where the elements are if `weight` is the embedding's.
_DATA_BESIDE_EMBEDDING = "rsparse_head_weight"
_TENSORS = ("scales", "zeros", "thresholds", "u", "v")


def head_method(
    served: ServedModel,
    load_time: LoadTimeFormat,
    layer: VocabParallelEmbedding,
    method: QuantizeMethodBase | None,
) -> QuantizeMethodBase | None:
    """The method of an embedding or an output layer whose logits are quantized.

    Args:
        served: the model.
        load_time: what the output layer is quantized to.
        layer: an embedding, or an output layer.
        method: what vLLM gives the layer without rsparse; None: its plain method.

    Raises:
        ArtifactError: the checkpoint has quantized the output layer itself.
    """
    plain = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
    is_head = isinstance(layer, ParallelLMHead)
    if method is not None and not isinstance(method, plain):
        if not is_head:
            return method
        raise ArtifactError(
            f"head is {load_time.name}, but the checkpoint has quantized the output"
            f" layer itself ({type(method).__name__}); use head: as-stored"
        )
    if is_head:
        served.heads += 1
        return HeadMethod(served, load_time)
    served.embeddings += 1
    return EmbeddingMethod(served, load_time)


class _Projection:
    """The quantized output layer among a layer's parameters.

    Args:
        served: the model.
        load_time: what the weight is quantized to.
        data: name of the parameter for the elements.
    """

    def __init__(
        self, served: ServedModel, load_time: LoadTimeFormat, data: str
    ) -> None:
        self._load_time = load_time
        self._data = data
        self._backend = int(served.route.backend)
        load_backend(self._backend)
        routes_of(self._backend, load_time.format)
        self._number = layers.next_layer()

    def register(self, layer: nn.Module, weight: Tensor) -> None:
        """Quantize a weight [N, K]; rows that pad the vocabulary stay zero."""
        layers.forget_layer(self._number)
        k = weight.shape[1]
        stored = self._load_time.encode(weight)
        operands = SparseOperands.from_shards(
            stored,
            [LinearTensors(torch.full((k,), -1.0))],
            [stored.n],
            weight.dtype,
        )
        thresholds = Parameter(operands.thresholds, requires_grad=False)
        layers.set_layer(thresholds, self._number)
        tensors = (stored.scales, stored.zeros, thresholds, operands.u, operands.v)
        names = (f"rsparse_head_{name}" for name in _TENSORS)
        pairs = zip((self._data, *names), (stored.data, *tensors), strict=True)
        for name, tensor in pairs:
            if tensor is not None and not isinstance(tensor, Parameter):
                tensor = Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, tensor)
        weakref.finalize(layer, layers.forget_layer, self._number)
        self._n, self._group = stored.n, stored.group

    def __call__(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., K] to [..., N], every input channel at any number of tokens."""
        out = ops.linear(
            x.reshape(-1, x.shape[-1]),
            getattr(layer, self._data),
            *(getattr(layer, f"rsparse_head_{name}") for name in _TENSORS),
            None,
            bias,
            [self._n],
            [0],
            self._load_time.format.code,
            self._group,
            0,
            self._backend,
        )
        return out.reshape(*x.shape[:-1], out.shape[-1])


class HeadMethod(QuantizeMethodBase):
    """An output layer with a weight of its own, which is quantized in place."""

    def __init__(self, served: ServedModel, load_time: LoadTimeFormat) -> None:
        self._plain = UnquantizedEmbeddingMethod()
        self._projection = _Projection(served, load_time, DATA)

    def create_weights(self, layer: nn.Module, *args: object, **kwargs: object) -> None:
        """Register what the checkpoint has."""
        self._plain.create_weights(layer, *args, **kwargs)

    def tie_weights(
        self, layer: nn.Module, embed_tokens: VocabParallelEmbedding
    ) -> nn.Module:
        """The module that computes the logits from now on: the embedding itself.

        Raises:
            ArtifactError: the model builds its embedding without our config.
        """
        method = embed_tokens.quant_method
        if not isinstance(method, EmbeddingMethod):
            raise ArtifactError(
                "head: the output layer shares the embedding's weight, and"
                f" {type(method).__name__} in this model's embedding cannot serve it;"
                " use head: as-stored"
            )
        method.is_head = True
        return embed_tokens

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the weight by its quantized form."""
        weight = layer.get_parameter("weight").data
        del layer.weight
        self._projection.register(layer, weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        return self._projection(layer, x, bias)


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """An embedding that may be the output layer too.

    It is looked up as it is stored; logits come from a quantized copy.

    Attributes:
        is_head: an output layer was tied to it.
    """

    def __init__(self, served: ServedModel, load_time: LoadTimeFormat) -> None:
        super().__init__()
        self.is_head = False
        self._served = served
        self._projection = _Projection(served, load_time, _DATA_BESIDE_EMBEDDING)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Add the quantized copy if logits are computed here.

        Some models have no module for the output layer if it is tied.
        """
        alone = self._served.heads == 0 and get_pp_group().is_last_rank
        if self.is_head or alone:
            self.is_head = True
            self._projection.register(layer, layer.get_parameter("weight").data)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        if not self.is_head:
            return super().apply(layer, x, bias)
        return self._projection(layer, x, bias)
