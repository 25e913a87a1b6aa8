# SPDX-License-Identifier: Apache-2.0
"""``SparseLayer``: how a layer of vLLM's model holds the op's tensors and calls it."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from vllm_rsparse.op import layers, ops
from vllm_rsparse.op.backends import load_backend
from vllm_rsparse.op.layers import DenseLayer
from vllm_rsparse.op.operands import SparseOperands
from vllm_rsparse.serving.served import ServedModel


class SparseLayer:
    """Base of the methods whose layers run through the op.

    Tensors of a loaded layer (N, K of this rank; S fused shards):
        weight, rsparse_scales, rsparse_zeros: the stored weight (``weights.base``).
        rsparse_thresholds: float32 [S, K].
        rsparse_u, rsparse_v: the factors in the layout of ``SparseOperands``.
        rsparse_correction: float32 [N], or None.

    Args:
        served: the model, shared by the methods of all its layers.
        names: of the fused shards in the artifact, in the order of the output.
        data_name: name of the parameter for the weight's elements.

    Attributes:
        layer_number: for metrics and other observers; a reload of the weights does not
            change it.
    """

    def __init__(self, served: ServedModel, names: list[str], data_name: str) -> None:
        self.served = served
        self.names = names
        self.data_name = data_name
        # Plain ints: they become constants of the traced graph.
        self.backend = int(served.route.backend)
        self.max_sparse_tokens = served.route.policy.max_sparse_tokens
        # The route was chosen in another process, perhaps on another machine.
        load_backend(self.backend)
        self.layer_number = layers.next_layer()

    def hold(
        self,
        layer: torch.nn.Module,
        operands: SparseOperands,
        dense: DenseLayer | None = None,
    ) -> None:
        """Register everything but the stored weight, which the layer has already.

        Args:
            layer: gets the parameters.
            operands: on their device.
            dense: what the dense steps use instead of the backend's dense route, such
                as the base model's own layer.
        """
        layers.forget_layer(self.layer_number)
        if dense is not None:
            layers.set_dense_layer(self.layer_number, dense)
        for name in ("thresholds", "u", "v", "correction"):
            tensor = getattr(operands, name)
            frozen = None if tensor is None else Parameter(tensor, requires_grad=False)
            layer.register_parameter(f"rsparse_{name}", frozen)
        thresholds = layer.get_parameter("rsparse_thresholds")
        layers.set_layer(thresholds, self.layer_number)
        weakref.finalize(layer, layers.forget_layer, self.layer_number)
        # Lists and plain ints: they become constants of the traced graph.
        self.shard_sizes: Sequence[int] = list(operands.shard_sizes)
        self.ranks: Sequence[int] = list(operands.ranks)
        self.weight_format = operands.weight.format.code
        self.group = operands.weight.group

    def call_op(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., K] to [..., N]; the op decides between the sparse and dense route."""
        flat = x.dim() == 2
        out = ops.linear(
            x if flat else x.reshape(-1, x.shape[-1]),
            getattr(layer, self.data_name),
            layer.rsparse_scales,
            layer.rsparse_zeros,
            layer.rsparse_thresholds,
            layer.rsparse_u,
            layer.rsparse_v,
            layer.rsparse_correction,
            bias,
            self.shard_sizes,
            self.ranks,
            self.weight_format,
            self.group,
            self.max_sparse_tokens,
            self.backend,
        )
        return out if flat else out.reshape(*x.shape[:-1], out.shape[-1])
