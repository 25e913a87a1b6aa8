# SPDX-License-Identifier: Apache-2.0
"""The output layer (lm_head) quantized, sparse, or both; also tied to the embedding.

vLLM computes logits outside of the compiled model, of the positions that it samples
from, by the quantization method of the module that it calls ``lm_head``. That is a
``ParallelLMHead``, or the embedding itself where the two are tied; an embedding keeps
its own weight for looking tokens up.
"""

import logging
import weakref

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
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
from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.load_time import LoadTimeFormat
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.model.names import HEAD
from vllm_rsparse.op.backends import routes_of
from vllm_rsparse.op.layers import DenseLayer
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.serving.layer import SparseLayer
from vllm_rsparse.serving.route import DenseWeights
from vllm_rsparse.serving.served import HeadPlan, ServedModel
from vllm_rsparse.serving.weights.base import DATA, DATA_BESIDE_BASE, register_stored

logger = logging.getLogger(__name__)


def head_method(
    served: ServedModel,
    plan: HeadPlan,
    layer: VocabParallelEmbedding,
    method: QuantizeMethodBase | None,
) -> QuantizeMethodBase | None:
    """The method of an embedding or an output layer whose logits are not the base's.

    Args:
        served: the model.
        plan: how the output layer is served.
        layer: an embedding, or an output layer.
        method: what vLLM gives the layer without rsparse; None: its plain method.

    Raises:
        ArtifactError: the checkpoint has quantized the output layer itself, or vLLM is
            to compute logits in another dtype.
    """
    plain = (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)
    is_head = isinstance(layer, ParallelLMHead)
    if method is not None and not isinstance(method, plain):
        if not is_head:
            return method
        raise ArtifactError(
            f"head is {plan}, but the checkpoint has quantized the output layer itself"
            f" ({type(method).__name__}); {plan.remedy}"
        )
    model = get_current_vllm_config().model_config
    dtype = None if model is None else getattr(model, "head_dtype", None)
    if model is not None and dtype not in (None, model.dtype):
        raise ArtifactError(
            f"head is {plan}, but head_dtype is {dtype}: vLLM would multiply with the"
            f" base's weight; leave head_dtype out, or {plan.remedy}"
        )
    if is_head:
        served.heads += 1
        return HeadMethod(served, plan)
    served.embeddings += 1
    return EmbeddingMethod(served, plan)


class _Logits(SparseLayer):
    """An output layer that runs through the op.

    Args:
        served: the model.
        plan: how the output layer is served.
        keeps_weight: the layer's own ``weight`` stays: an embedding looks tokens up in
            it, and dense steps use it unless the output layer is quantized.
    """

    def __init__(
        self, served: ServedModel, plan: HeadPlan, *, keeps_weight: bool
    ) -> None:
        super().__init__(served, [HEAD], DATA_BESIDE_BASE if keeps_weight else DATA)
        self._plan = plan
        self._keeps_weight = keeps_weight
        if plan.entry is None:
            self.max_sparse_tokens = 0

    def store(self, layer: VocabParallelEmbedding) -> None:
        """Store this rank's rows for the kernels; those that pad stay zero."""
        plan, weight = self._plan, layer.get_parameter("weight").data
        if not self._keeps_weight:
            del layer.weight
        if plan.load_time is None:
            stored = store_float(weight)
        else:
            stored = self._encode(weight, plan.load_time)
        routes_of(self.backend, stored.format)
        register_stored(layer, stored, self.data_name)
        as_the_base = self._keeps_weight and plan.load_time is None
        rows = (stored.format.planes,) if stored.format.planes > 1 else ()
        tensors = LinearTensors(torch.full((*rows, stored.k), -1.0))
        if plan.entry is not None:
            _require_shape(layer, plan.entry.shape)
            tensors = self.served.artifact.read(HEAD)
        operands = SparseOperands.from_shards(
            stored, [tensors], [stored.n], weight.dtype
        )
        self.hold(layer, operands, _base_layer(layer) if as_the_base else None)
        if plan.entry is not None:
            counters = self.served.open_counters()
            if counters is not None:
                counters.register(self.layer_number, self.names, operands, last=True)
        kept = weight.nbytes if self._keeps_weight else 0
        logger.info(
            "rsparse: %s loaded: %s, %.1f MiB%s",
            HEAD,
            plan,
            stored.nbytes / (1 << 20),
            f" next to the base's {kept / (1 << 20):.1f} MiB" if kept else "",
        )

    def _encode(self, weight: Tensor, load_time: LoadTimeFormat) -> StoredWeight:
        try:
            return load_time.encode(weight)
        except WeightFormatError as error:
            raise ArtifactError(
                f"head is {self._plan}, but the output layer cannot be: {error};"
                f" {self._plan.remedy}"
            ) from error


def _require_shape(layer: VocabParallelEmbedding, shape: tuple[int, int]) -> None:
    found = (layer.org_vocab_size, layer.embedding_dim)
    if shape != found:
        raise ArtifactError(
            f"the artifact's {HEAD} is {list(shape)}, the model's is {list(found)}; it"
            " was prepared from another model: prepare this one"
        )


def _base_layer(layer: VocabParallelEmbedding) -> DenseLayer:
    """Logits as vLLM computes them without rsparse; does not keep the layer alive."""
    reference, plain = weakref.ref(layer), UnquantizedEmbeddingMethod()

    def apply(x: Tensor, bias: Tensor | None) -> Tensor:
        return plain.apply(reference(), x, bias)

    return apply


class HeadMethod(_Logits, QuantizeMethodBase):
    """An output layer with a weight of its own, which is replaced.

    It stays where the output layer is not quantized and dense weights are separate.
    """

    def __init__(self, served: ServedModel, plan: HeadPlan) -> None:
        separate = served.route.dense_weights is DenseWeights.SEPARATE
        keeps_weight = separate and plan.load_time is None
        super().__init__(served, plan, keeps_weight=keeps_weight)
        self._plain = UnquantizedEmbeddingMethod()

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
                f"head is {self._plan}, but the output layer shares the embedding's"
                f" weight, and {type(method).__name__} in this model's embedding cannot"
                f" serve it; {self._plan.remedy}"
            )
        method.is_head = True
        return embed_tokens

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Replace the weight by what is served, or add that to it."""
        if self._keeps_weight:
            self._plain.process_weights_after_loading(layer)
        self.store(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        return self.call_op(layer, x, bias)


class EmbeddingMethod(_Logits, UnquantizedEmbeddingMethod):
    """An embedding that may be the output layer too.

    It is looked up as it is stored; logits come from a copy.

    Attributes:
        is_head: an output layer was tied to it.
    """

    def __init__(self, served: ServedModel, plan: HeadPlan) -> None:
        super().__init__(served, plan, keeps_weight=True)
        self.is_head = False

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Add the copy if logits are computed here.

        Some models have no module for the output layer if it is tied.
        """
        alone = self.served.heads == 0 and get_pp_group().is_last_rank
        if not self.is_head and not alone:
            return
        self.is_head = True
        if self._plan.load_time is None:
            UnquantizedEmbeddingMethod.process_weights_after_loading(self, layer)
        self.store(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank's part of the vocabulary."""
        if not self.is_head:
            return UnquantizedEmbeddingMethod.apply(self, layer, x, bias)
        return self.call_op(layer, x, bias)
