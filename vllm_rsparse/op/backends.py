# SPDX-License-Identifier: Apache-2.0
"""The table of backends: where each runs, and its routes per weight format."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from vllm_rsparse.errors import BuildError, RSparseError
from vllm_rsparse.formats.base import StoredWeight, WeightFormat
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.fp8_block import FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.formats.plain import FLOAT, store_float
from vllm_rsparse.formats.registry import FORMATS
from vllm_rsparse.op import cpu, cpu_torch, reference
from vllm_rsparse.op.operands import SparseOperands

logger = logging.getLogger(__name__)

SparseRoute = Callable[[Tensor, SparseOperands, Tensor | None], Tensor]
DenseRoute = Callable[[Tensor, StoredWeight, Tensor | None], Tensor]


class BackendError(RSparseError):
    """A backend that does not exist or cannot run here."""


class Backend(IntEnum):
    """A backend's number: ops take no strings, and pickles stay comparable."""

    REFERENCE = 0
    CPU = 1
    TRITON = 2
    CPU_TORCH = 3

    @property
    def label(self) -> str:
        """The name that users write."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class Routes:
    """How a backend multiplies with the weights of one format.

    Attributes:
        sparse: x [M, K], operands, bias -> [M, N]; ``reference`` defines it.
        dense: x [M, K], weight, bias -> [M, N]; ``reference.dense_linear`` if the
            weight is dequantised at every call.
        dense_quantised: the same where the base model's own layers round x to the
            format of the weight; None: ``dense`` serves those too.
    """

    sparse: SparseRoute
    dense: DenseRoute
    dense_quantised: DenseRoute | None = None


@dataclass(frozen=True)
class Implementation:
    """One line of the table.

    Attributes:
        refusal: why it cannot run on a device of this type, or None if it can.
        load: prepares it in this process; raises ``BuildError`` if it cannot.
        routes: by the name of the weight's format; a format that is absent is refused.
    """

    refusal: Callable[[str], str | None]
    load: Callable[[], None]
    routes: dict[str, Routes]


def library_linear(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """torch's own product with a weight of the format float."""
    if x.dtype == torch.float16 and _float16_is_emulated(x.device.type):
        # torch's own product of float16 on [K, N] storage: 11 s for 64 tokens on 2048 x
        # 16384 (AMD EPYC, Zen 5), this 0.07 s.
        bias = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.data.float(), bias).half()
    return functional.linear(x, weight.data, bias)


def _cpu_dense(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    if x.shape[0] <= cpu.MAX_DENSE_TOKENS:
        return cpu.dense_linear(x, weight, bias)
    return library_linear(x, weight, bias)


def _cpu_dense_quantized(
    x: Tensor, weight: StoredWeight, bias: Tensor | None
) -> Tensor:
    if x.shape[0] <= cpu.MAX_DENSE_TOKENS:
        return cpu.dense_by_rows(x, weight, bias)
    return library_linear(x, store_float(weight.dequantise().to(x.dtype)), bias)


@cache
def _triton() -> ModuleType:
    """The module, imported only where its kernels run: it needs Triton."""
    from vllm_rsparse.op import triton_backend

    return triton_backend


def _triton_sparse(x: Tensor, operands: SparseOperands, bias: Tensor | None) -> Tensor:
    return _triton().rsparse_linear(x, operands, bias)


def _triton_dense(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    return _triton().dense_linear(x, weight, bias)


def _triton_dense_quantised(
    x: Tensor, weight: StoredWeight, bias: Tensor | None
) -> Tensor:
    return _triton().dense_quantised_linear(x, weight, bias)


@lru_cache(maxsize=2)
def _float16_is_emulated(device_type: str) -> bool:
    """Whether the device has no product of float16 that oneDNN knows."""
    return device_type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _needs_cpu(device_type: str) -> str | None:
    if device_type == "cpu":
        return None
    return f"the model runs on {device_type}; use auto or triton"


def _needs_cuda(device_type: str) -> str | None:
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET", "0") == "1":
        return None
    return (
        f"the model runs on {device_type}; use auto, or TRITON_INTERPRET=1 to interpret"
        " the kernels (tests only)"
    )


BACKENDS: dict[int, Implementation] = {
    Backend.REFERENCE: Implementation(
        refusal=lambda device_type: None,
        load=lambda: None,
        routes={
            one.name: Routes(reference.rsparse_linear, reference.dense_linear)
            for one in FORMATS
        },
    ),
    Backend.CPU: Implementation(
        refusal=_needs_cpu,
        load=cpu.build,
        routes={
            FLOAT.name: Routes(cpu.rsparse_linear, _cpu_dense),
            **{
                one.name: Routes(cpu.rsparse_linear, _cpu_dense_quantized)
                for one in (FP8, FP8_BLOCK, INT4, INT8_PLANES)
            },
        },
    ),
    Backend.TRITON: Implementation(
        refusal=_needs_cuda,
        load=lambda: None,
        routes={
            one.name: Routes(
                _triton_sparse,
                library_linear if one is FLOAT else _triton_dense,
                _triton_dense_quantised if one is FP8 else None,
            )
            for one in FORMATS
        },
    ),
    Backend.CPU_TORCH: Implementation(
        refusal=_needs_cpu,
        load=lambda: None,
        routes={FLOAT.name: Routes(cpu_torch.rsparse_linear, library_linear)},
    ),
}


def routes_of(backend: int, weight_format: WeightFormat) -> Routes:
    """How a backend multiplies with the weights of a format.

    Raises:
        BackendError: it does not; names those that do.
    """
    routes = BACKENDS[backend].routes.get(weight_format.name)
    if routes is None:
        able = [
            Backend(code).label
            for code, one in BACKENDS.items()
            if weight_format.name in one.routes
        ]
        raise BackendError(
            f"backend {Backend(backend).label} cannot read weights of the format"
            f" {weight_format.name}; {', '.join(able)} can"
        )
    return routes


def resolve_backend(name: str, device_type: str, source: str = "backend") -> Backend:
    """Turn a requested backend into one that runs on the device.

    Args:
        name: ``auto``, or a backend by name. A named backend is used or refused.
        device_type: ``cuda`` or ``cpu``, where the model runs.
        source: the parameter that the name came from, for the messages.

    The backend is loaded here, so that no request waits for a compiler.

    Raises:
        BackendError: unknown name, or a named backend that cannot run here.
        BuildError: ``cpu`` by name, and its kernel cannot be compiled.
    """
    names = {backend.label: backend for backend in Backend}
    if name == "auto" and device_type == "cpu":
        return _best_on_cpu()
    if name == "auto":
        name = {"cuda": "triton"}.get(device_type, device_type)
        if name not in names:
            raise BackendError(
                f"vllm-rsparse has no kernels for device {device_type!r}; it runs on"
                " cuda and cpu. VLLM_RSPARSE_BACKEND=reference runs anywhere, slowly"
            )
    if name not in names:
        raise BackendError(
            f"{source} is {name!r}; allowed are auto, {', '.join(names)}"
        )
    backend = names[name]
    refusal = BACKENDS[backend].refusal(device_type)
    if refusal is not None:
        raise BackendError(f"{source} is {name!r}, but {refusal}")
    load_backend(backend)
    return backend


def load_backend(backend: int) -> None:
    """Prepare a backend in this process, so that its first call is like any other.

    Raises:
        BuildError: the kernel of ``cpu`` cannot be compiled or loaded here.
    """
    BACKENDS[Backend(backend)].load()


def _best_on_cpu() -> Backend:
    try:
        load_backend(Backend.CPU)
    except BuildError as error:
        logger.warning(
            "rsparse: using backend cpu-torch, at most half as fast as cpu, because the"
            " kernel of cpu cannot be built: %s",
            error,
        )
        return Backend.CPU_TORCH
    return Backend.CPU
