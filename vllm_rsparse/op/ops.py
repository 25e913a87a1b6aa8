# SPDX-License-Identifier: Apache-2.0
"""The op ``vllm_rsparse::linear``, which takes the sparse or the dense route.

Dynamo traces a model once and CUDA graphs capture each padded batch size, so the branch
on the number of tokens is inside an opaque op: it is evaluated at capture, for the
captured size, and in eager mode for every call. Nothing here imports vLLM.
"""

import torch
from torch import Tensor

from vllm_rsparse.op.backends import routes_of
from vllm_rsparse.op.layers import dense_layer_of, operands_of_call
from vllm_rsparse.op.observers import notify


def _linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
    format: int,
    group: int,
    max_sparse_tokens: int,
    backend: int,
) -> Tensor:
    operands = operands_of_call(
        weight,
        scales,
        zeros,
        thresholds,
        u,
        v,
        correction,
        shard_sizes,
        ranks,
        format,
        group,
    )
    dense = x.shape[0] > max_sparse_tokens
    notify(x, operands, dense)
    if dense:
        base_layer = dense_layer_of(thresholds)
        if base_layer is not None:
            return base_layer(x, bias)
    routes = routes_of(backend, operands.weight.format)
    if dense:
        return routes.dense(x, operands.weight, bias)
    return routes.sparse(x, operands, bias)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
    format: int,
    group: int,
    max_sparse_tokens: int,
    backend: int,
) -> Tensor:
    return x.new_empty(x.shape[0], sum(shard_sizes))


# Own namespace: a name clash in `vllm` takes the server down. The Library object must
# outlive the op, hence the module global.
_LIBRARY = torch.library.Library("vllm_rsparse", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor thresholds,"
    " Tensor u, Tensor v, Tensor? correction, Tensor? bias, SymInt[] shard_sizes,"
    " SymInt[] ranks, SymInt format, SymInt group, SymInt max_sparse_tokens,"
    " SymInt backend) -> Tensor",
    # The weight is a [N, K] view of [K, N] storage; Inductor must pass it unchanged.
    tags=(torch.Tag.needs_exact_strides,),
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", _linear, _key)
torch.library.register_fake("vllm_rsparse::linear", _linear_fake, lib=_LIBRARY)

linear = torch.ops.vllm_rsparse.linear.default
