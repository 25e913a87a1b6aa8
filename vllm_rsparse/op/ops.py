# SPDX-License-Identifier: Apache-2.0
"""The op ``vllm_rsparse::linear``, and the one place that picks a backend and a route.

Dynamo traces a model once and CUDA graphs capture each padded batch size, so the branch
on the number of tokens lives inside an opaque op: at capture it is taken for the size
captured, in eager mode for every call. Nothing here imports vLLM.
"""

import logging
import os
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from vllm_rsparse.errors import BuildError
from vllm_rsparse.op import cpu, cpu_torch, reference

logger = logging.getLogger(__name__)


class Backend(IntEnum):
    """Implementations of the sparse route. An int, because ops take no names."""

    REFERENCE = 0
    CPU = 1
    TRITON = 2
    CPU_TORCH = 3

    @property
    def label(self) -> str:
        """The name that users write."""
        return self.name.lower().replace("_", "-")


def resolve_backend(name: str, device_type: str, source: str = "backend") -> Backend:
    """Turn a requested backend into one that runs on the device.

    Args:
        name: ``auto``, or a backend by name. A named backend is used or refused.
        device_type: ``cuda`` or ``cpu``, where the model runs.
        source: the parameter that the name came from, for the messages.

    The ``cpu`` backend is compiled here, so that no request waits for it.

    Raises:
        ValueError: unknown name, or a named backend that cannot run here.
        BuildError: ``cpu`` by name, and its kernel cannot be compiled.
    """
    names = {backend.label: backend for backend in Backend}
    if name == "auto" and device_type == "cpu":
        return _best_on_cpu()
    if name == "auto":
        name = {"cuda": "triton"}.get(device_type, device_type)
        if name not in names:
            raise ValueError(
                f"vllm-rsparse has no kernels for device {device_type!r}; it runs on"
                " cuda and cpu. VLLM_RSPARSE_BACKEND=reference runs anywhere, slowly"
            )
    if name not in names:
        raise ValueError(f"{source} is {name!r}; allowed are auto, {', '.join(names)}")
    backend = names[name]
    if backend in (Backend.CPU, Backend.CPU_TORCH) and device_type != "cpu":
        raise ValueError(
            f"{source} is {name!r}, but the model runs on {device_type}; use auto or"
            " triton"
        )
    load_backend(backend)
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if backend is Backend.TRITON and device_type != "cuda" and not interpreted:
        raise ValueError(
            f"{source} is 'triton', but the model runs on {device_type}; use auto, or"
            " TRITON_INTERPRET=1 to interpret the kernels (tests only)"
        )
    return backend


def load_backend(backend: int) -> None:
    """Make a backend ready in this process, so that its first call is like any other.

    Raises:
        BuildError: the kernel of ``cpu`` cannot be compiled or loaded here.
    """
    if backend == Backend.CPU:
        cpu.build()


def _best_on_cpu() -> Backend:
    try:
        load_backend(Backend.CPU)
    except BuildError as error:
        logger.warning(
            "rsparse: backend cpu-torch, half as fast as cpu or less, because the"
            " kernel of cpu cannot be built: %s",
            error,
        )
        return Backend.CPU_TORCH
    return Backend.CPU


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
    if backend == Backend.CPU_TORCH:
        return cpu_torch.rsparse_linear(*args)
    return reference.rsparse_linear(*args)


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backend: int
) -> Tensor:
    """The dense route: x [M, K] times weight [N, K], as ``functional.linear``."""
    if backend == Backend.CPU and x.shape[0] <= cpu.MAX_DENSE_TOKENS:
        return cpu.dense_linear(x, weight, bias)
    if x.dtype == torch.float16 and _float16_is_emulated(x.device.type):
        # torch's own product of float16 on [K, N] storage: 11 s for 64 tokens on 2048 x
        # 16384 (AMD EPYC, Zen 5), this 0.07 s.
        bias = None if bias is None else bias.float()
        return torch_linear(x.float(), weight.float(), bias).half()
    return torch_linear(x, weight, bias)


@lru_cache(maxsize=2)
def _float16_is_emulated(device_type: str) -> bool:
    """Whether the device has no product of float16 that oneDNN knows."""
    return device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


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
        return dense_linear(x, weight, bias, backend)
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
