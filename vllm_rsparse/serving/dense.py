# SPDX-License-Identifier: Apache-2.0
"""``BaseLayer``: the base model's own linear layer, kept for the dense steps."""

import weakref
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.op.layers import DenseLayer
from vllm_rsparse.serving.weights.base import CheckpointWeights

# How deep an operator lies below a method: method, scheme, kernel, operator.
_DEPTH = 4


class BaseLayer:
    """vLLM's method for one layer of the base model, next to the sparse one.

    Args:
        method: what vLLM gives the layer without rsparse.
        names: checkpoint names of the fused shards, for messages.
    """

    def __init__(self, method: QuantizeMethodBase | None, names: list[str]) -> None:
        if method is None:
            raise CheckpointError(
                f"dense_weights is separate, but vLLM has no method of its own for"
                f" {', '.join(names)}; use dense_weights: shared"
            )
        self._method = method
        self._names = names

    def create(
        self, layer: LinearBase, weights: CheckpointWeights, **description: Any
    ) -> None:
        """Register the base's parameters, which both copies are made from.

        Args:
            layer: the layer that gets them.
            weights: the sparse route's view of the same checkpoint.
            description: vLLM's arguments of ``create_weights``.

        Raises:
            CheckpointError: vLLM has no kernel for the format on this device, or
                loads the checkpoint into other parameters than expected.
        """
        names = ", ".join(self._names)
        try:
            self._method.create_weights(layer, **description)
        except ValueError as error:
            raise CheckpointError(
                f"dense_weights is separate, but vLLM cannot serve {names} itself on"
                f" this device ({error}); use dense_weights: shared"
            ) from error
        missing = [name for name in weights.required if not hasattr(layer, name)]
        if missing:
            raise CheckpointError(
                f"dense_weights is separate, but vLLM loads {names} without the"
                f" parameter {missing[0]} in this release; use dense_weights: shared"
            )

    def process(self, layer: LinearBase) -> int:
        """Let vLLM lay out its copy. Returns its bytes.

        Called after the sparse route has read the parameters of the checkpoint. On a
        CPU vLLM packs them for oneDNN, outside the layer's parameters: a packed copy
        counts as many bytes as what it was made from.
        """
        unpacked = _nbytes(layer)
        self._method.process_weights_after_loading(layer)
        for owner in (self._method, getattr(layer, "scheme", None)):
            _use_kernels(owner, _DEPTH)
        return max(unpacked, _nbytes(layer))

    def bound_to(self, layer: LinearBase) -> DenseLayer:
        """x [M, K], bias -> [M, N] by the base's layer; does not keep it alive."""
        reference = weakref.ref(layer)
        method = self._method

        def apply(x: Tensor, bias: Tensor | None) -> Tensor:
            owner = reference()
            assert owner is not None  # it calls the op
            return method.apply(owner, x, bias)  # type: ignore[attr-defined]

        return apply


def _nbytes(layer: LinearBase) -> int:
    """Bytes of the base model's parameters of a layer."""
    return sum(
        parameter.nbytes
        for name, parameter in layer.named_parameters(recurse=False)
        if not name.startswith("rsparse_")
    )


def _use_kernels(owner: object, depth: int) -> None:
    """Make vLLM's custom operators below an object use their CUDA kernels.

    vLLM replaces some by plain PyTorch for Inductor to fuse, such as the quantization
    of activations to FP8. Inside our opaque op nothing is fused, and they would be a
    dozen launches.
    """
    if not torch.cuda.is_available() or depth == 0:
        return
    if isinstance(owner, CustomOp):
        owner._forward_method = owner.forward_cuda
        return
    if type(owner).__module__.startswith("vllm."):
        for value in vars(owner).values():
            _use_kernels(value, depth - 1)
