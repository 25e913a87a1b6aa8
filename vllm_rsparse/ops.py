# SPDX-License-Identifier: Apache-2.0
"""The op ``vllm_rsparse::linear``, and the one place that picks a backend and a route.

Dynamo traces a model once and CUDA graphs capture each padded batch size, so the branch
on the number of tokens lives inside an opaque op: at capture it is taken for the size
captured, in eager mode for every call. Nothing here imports vLLM.
"""

import os
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from vllm_rsparse import cpu, reference


class Backend(IntEnum):
    """Implementations of the sparse route. An int, because ops take no names."""

    REFERENCE = 0
    CPU = 1
    TRITON = 2


def resolve_backend(name: str, device_type: str) -> Backend:
    """Turn a requested backend into one that runs on the device.

    Args:
        name: ``auto``, or a backend by name. A named backend is used or refused.
        device_type: ``cuda`` or ``cpu``, where the model runs.

    Raises:
        ValueError: unknown name, or a named backend that cannot run here.
    """
    names = {backend.name.lower(): backend for backend in Backend}
    if name == "auto":
        name = {"cuda": "triton", "cpu": "cpu"}.get(device_type, device_type)
        if name not in names:
            raise ValueError(
                f"vllm-rsparse has no kernels for device {device_type!r}; it runs on"
                " cuda and cpu. VLLM_RSPARSE_BACKEND=reference runs anywhere, slowly"
            )
    if name not in names:
        raise ValueError(
            f"VLLM_RSPARSE_BACKEND is {name!r}; allowed are auto, {', '.join(names)}"
        )
    backend = names[name]
    if backend is Backend.CPU and device_type != "cpu":
        raise ValueError(
            f"VLLM_RSPARSE_BACKEND=cpu, but the model runs on {device_type}; use auto"
            " or triton"
        )
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if backend is Backend.TRITON and device_type != "cuda" and not interpreted:
        raise ValueError(
            f"VLLM_RSPARSE_BACKEND=triton, but the model runs on {device_type}; use"
            " auto, or TRITON_INTERPRET=1 to interpret the kernels (tests only)"
        )
    return backend


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
    backend: int,
) -> Tensor:
    """The sparse route on one backend; arguments as in ``reference.rsparse_linear``."""
    args = (x, weight, thresholds, u, v, correction, bias, shard_sizes, ranks)
    if backend == Backend.TRITON:
        # Imported here: on a machine without Triton the other backends still work.
        from vllm_rsparse.kernels.rsparse_linear import rsparse_linear

        return rsparse_linear(*args)
    if backend == Backend.CPU:
        return cpu.rsparse_linear(*args)
    return reference.rsparse_linear(*args)


# Called with (x, thresholds, whether the call goes dense) before each call.
_observer: Callable[[Tensor, Tensor, bool], None] | None = None


def set_observer(observer: Callable[[Tensor, Tensor, bool], None] | None) -> None:
    """Let the metrics see every call whose Python body runs; None stops that."""
    global _observer
    _observer = observer


def _linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
    max_sparse_tokens: int,
    backend: int,
) -> Tensor:
    dense = x.shape[0] > max_sparse_tokens
    if _observer is not None:
        _observer(x, thresholds, dense)
    if dense:
        return dense_linear(x, weight, bias)
    return sparse_linear(
        x, weight, thresholds, u, v, correction, bias, shard_sizes, ranks, backend
    )


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    u: Tensor,
    v: Tensor,
    correction: Tensor | None,
    bias: Tensor | None,
    shard_sizes: list[int],
    ranks: list[int],
    max_sparse_tokens: int,
    backend: int,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# Own namespace: a name clash in `vllm` takes the server down. The Library object must
# outlive the op, hence the module global.
_LIBRARY = torch.library.Library("vllm_rsparse", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor thresholds, Tensor u, Tensor v,"
    " Tensor? correction, Tensor? bias, SymInt[] shard_sizes, SymInt[] ranks,"
    " SymInt max_sparse_tokens, SymInt backend) -> Tensor",
    # The weight is a [N, K] view of [K, N] storage; Inductor must hand it on as it is.
    tags=(torch.Tag.needs_exact_strides,),
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", _linear, _key)
torch.library.register_fake("vllm_rsparse::linear", _linear_fake, lib=_LIBRARY)

linear = torch.ops.vllm_rsparse.linear.default
