# SPDX-License-Identifier: Apache-2.0
"""What a sparse linear is compared with: dense products of the same layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear as library_linear

from vllm_rsparse.bench.gate import allowed, check, exact_dense
from vllm_rsparse.bench.inputs import ROTATED_BYTES, Inputs
from vllm_rsparse.formats.fp8 import FP8
from vllm_rsparse.formats.plain import FLOAT
from vllm_rsparse.kernels.launch_config import Rounding
from vllm_rsparse.op.backends import Backend, routes_of

Calls = Sequence[Callable[[], Tensor]]

# Rounding activations to FP8, three bits of mantissa, errs by 2.6% (uniform within a
# step: 2^-4 / sqrt(3) of the element at worst, less at the top of a binade).
_FP8_ACTIVATIONS = 0.04


@dataclass(frozen=True)
class Baseline:
    """A dense product of a layer.

    Attributes:
        method: ``dense``, the one of the weight's own format; ``unquantized``, the
            library's product with weights of the activations' type.
        name: what it is, for people.
        calls: one per set of rotating inputs.
        nbytes: of the weight, which every call reads.
    """

    method: str
    name: str
    calls: Calls
    nbytes: int


def baselines(inputs: list[Inputs], backend: Backend) -> list[Baseline]:
    """The dense product of the inputs' format, and the unquantized one next to it.

    Each has passed the gate.
    """
    if inputs[0].operands.weight.format is FLOAT:
        return [_library("dense", inputs, [_plain(one) for one in inputs])]
    return [dense_baseline(inputs, backend), _unquantized(inputs)]


def dense_baseline(inputs: list[Inputs], backend: Backend) -> Baseline:
    """The dense product of the inputs' format.

    For floats the library's: on a GPU cuBLAS, on a CPU oneDNN on a weight that it has
    packed, which takes as long as vLLM's layer, within 4% (docs/cpu.md). For fp8 on a
    GPU the library's FP8 product, which rounds the activations too. For other formats
    no library that torch comes with has one: this project's dense route.
    """
    weight = inputs[0].operands.weight
    if weight.format is FLOAT:
        return _library("dense", inputs, [_plain(one) for one in inputs])
    expected = exact_dense(inputs[0], _rounding(inputs[0], backend))
    if weight.format is FP8 and _has_scaled_mm(inputs[0]):
        name = "torch._scaled_mm, activations rounded to FP8 per token"
        calls = [_scaled_call(one) for one in inputs]
        check(calls[0](), expected, name, _FP8_ACTIVATIONS)
    else:
        name = f"vllm-rsparse's dense route, backend {backend.label}"
        dense = routes_of(backend, weight.format).dense
        calls = [partial(dense, one.x, one.operands.weight, None) for one in inputs]
        check(calls[0](), expected, name, allowed(backend, inputs[0].x))
    return Baseline("dense", name, calls, weight.nbytes)


def _rounding(inputs: Inputs, backend: Backend) -> Rounding | None:
    """How this project's dense route rounds the activations."""
    if backend is not Backend.TRITON:
        return None
    # Imported here, so that Triton is needed only where its kernels run.
    from vllm_rsparse.op.triton_backend import dense_rounding

    return dense_rounding(inputs.x, inputs.operands.weight)


def _unquantized(inputs: list[Inputs]) -> Baseline:
    """The library's product with other random weights, in the activations' type."""
    x, (n, k) = inputs[0].x, inputs[0].operands.weight.shape
    generator = torch.Generator(x.device).manual_seed(0)
    copies = max(2, round(ROTATED_BYTES[x.device.type] / (n * k * x.element_size())))
    weights = [
        torch.randn(n, k, generator=generator, device=x.device, dtype=x.dtype) * k**-0.5
        for _ in range(copies)
    ]
    return _library("unquantized", inputs, weights)


def _library(method: str, inputs: list[Inputs], weights: list[Tensor]) -> Baseline:
    """torch's linear on plain [N, K] weights; inputs are reused where they are few."""
    xs = [inputs[index % len(inputs)].x for index in range(len(weights))]
    dtype = str(xs[0].dtype).removeprefix("torch.")
    calls: Calls
    if xs[0].is_cuda or not _onednn_packs(xs[0].dtype):
        library = "cuBLAS" if xs[0].is_cuda else "torch's linear"
        name = f"{library} on {dtype} weights"
        calls = [
            partial(library_linear, x, weight)
            for x, weight in zip(xs, weights, strict=True)
        ]
    else:
        name = f"oneDNN on packed {dtype} weights"
        ops = torch.ops.mkldnn
        calls = [
            partial(
                ops._linear_pointwise,
                x,
                ops._reorder_linear_weight(weight, x.shape[0]),
                None,
                "none",
                [],
                "",
            )
            for x, weight in zip(xs, weights, strict=True)
        ]
    expected = (xs[0].float() @ weights[0].float().t()).to(xs[0].dtype)
    check(calls[0](), expected, name)
    return Baseline(method, name, calls, weights[0].nbytes)


def _scaled_call(inputs: Inputs) -> Callable[[], Tensor]:
    """The library's FP8 product, with a scale per token that is found first."""
    # Imported here, so that a CPU can be measured without Triton.
    from vllm_rsparse.kernels.fp8_product import round_rows

    x, rows, scales = inputs.x, _plain(inputs), inputs.operands.weight.scales
    assert scales is not None

    def call() -> Tensor:
        rounded, token_scales = round_rows(x)
        return torch._scaled_mm(
            rounded,
            rows.t(),
            scale_a=token_scales,
            scale_b=scales[None],
            out_dtype=x.dtype,
        )

    return call


def _has_scaled_mm(inputs: Inputs) -> bool:
    """Whether the library has a product of fp8 for this call."""
    if not inputs.x.is_cuda:
        return False
    from vllm_rsparse.op.triton_backend import multiplies_fp8

    return multiplies_fp8(inputs.x, inputs.operands.weight)


def _plain(inputs: Inputs) -> Tensor:
    """The stored elements, [N, K] contiguous."""
    return inputs.operands.weight.data.contiguous()


def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether vLLM packs weights of this type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
