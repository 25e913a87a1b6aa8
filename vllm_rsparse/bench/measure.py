# SPDX-License-Identifier: Apache-2.0
"""Measurements of the op and of the dense layer, after a correctness gate."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from vllm_rsparse.bench.inputs import Inputs, bytes_read, kept_fraction, rotation
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.bench.timing import Timing, time_calls, time_rounds
from vllm_rsparse.op import reference
from vllm_rsparse.op.backends import Backend, routes_of
from vllm_rsparse.testing.tolerances import tolerance

Calls = Sequence[Callable[[], Tensor]]


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    """The gate: a wrong result is not timed.

    Raises:
        RuntimeError: the relative error is larger than rounding explains.
    """
    error = (actual.float() - expected.float()).norm()
    ratio = (error / expected.float().norm()).item()
    # Both are rounded: together their errors stay below the worst of one rounding.
    limit = tolerance(expected.dtype)
    if not ratio < limit:
        raise RuntimeError(
            f"{what}: relative error {ratio:.2e} is over {limit:.0e}, not timed"
        )


def dense_calls(inputs: list[Inputs]) -> Calls:
    """What serves the layer without sparsity, one call per set of inputs.

    On a GPU torch's linear on the plain [N, K] weight: cuBLAS. On a CPU oneDNN on a
    weight that it has packed, which takes as long as vLLM's layer, within 4%
    (docs/cpu.md).
    """
    if inputs[0].x.is_cuda or not _onednn_packs(inputs[0].x.dtype):
        return [partial(dense_linear, one.x, one.dense_weight) for one in inputs]
    ops = torch.ops.mkldnn
    packed = [
        ops._reorder_linear_weight(one.dense_weight, one.x.shape[0]) for one in inputs
    ]
    return [
        partial(ops._linear_pointwise, one.x, weight, None, "none", [], "")
        for one, weight in zip(inputs, packed, strict=True)
    ]


def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether vLLM packs weights of this type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def time_dense(inputs: list[Inputs]) -> Timing:
    """The dense layer alone."""
    return time_calls(dense_calls(inputs))


def sparse_calls(inputs: list[Inputs], backend: Backend) -> Calls:
    """The op's sparse route on a backend, as it is served, after a check."""
    expected = inputs[0].call(reference.rsparse_linear)
    sparse = routes_of(backend, inputs[0].operands.weight.format).sparse
    calls = [partial(one.call, sparse) for one in inputs]
    check(calls[0](), expected, backend.name)
    return calls


def time_sparse(inputs: list[Inputs], backend: Backend) -> Timing:
    """The op's sparse route alone."""
    return time_calls(sparse_calls(inputs, backend))


def row(
    layer: Layer,
    tokens: int,
    method: str,
    timing: Timing,
    moved: float,
    bandwidth: float,
    **extra: Any,
) -> dict[str, Any]:
    """One line of results.

    Args:
        layer: what was timed.
        tokens: rows of the call.
        method: ``dense``, ``rsparse`` or a peer.
        timing: microseconds.
        moved: bytes that a call must read.
        bandwidth: bytes per second that the device reads.
        extra: further keys.
    """
    rate = moved / (timing.median * 1e-6)
    return {
        "layer": layer.name,
        "n": layer.n,
        "k": layer.k,
        "count": layer.count,
        "tokens": tokens,
        "method": method,
        "us": round(timing.median, 2),
        "p20": round(timing.p20, 2),
        "p80": round(timing.p80, 2),
        "gbps": round(rate / 1e9),
        "share": round(rate / bandwidth, 3),
        **extra,
    }


def measure_layer(
    budgets: Sequence[Layer],
    tokens: int,
    dtype: torch.dtype,
    device: str,
    backend: Backend,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """A row of the dense layer and one of the op per budget, on the same weights.

    Args:
        budgets: one layer, with the kept fractions and ranks to measure.
        tokens: rows of the call.
        dtype: of the weights.
        device: "cpu" or "cuda".
        backend: what runs the op.
        bandwidth: bytes per second that the device reads.
    """
    layer = budgets[0]
    inputs = rotation(layer, tokens, dtype, device)
    budgeted = [[one.with_budget(budget) for one in inputs] for budget in budgets]
    groups = [dense_calls(inputs), *(sparse_calls(o, backend) for o in budgeted)]
    if device == "cpu":
        timings = time_rounds(groups)
    else:
        timings = [time_calls(calls) for calls in groups]
    dense = timings[0]
    moved = layer.n * layer.k * dtype.itemsize
    facts = {"dtype": str(dtype).removeprefix("torch.")}
    rows = [row(layer, tokens, "dense", dense, moved, bandwidth, kept=1.0, **facts)]
    for budget, made, sparse in zip(budgets, budgeted, timings[1:], strict=True):
        kept = kept_fraction(made)
        rows.append(
            row(
                budget,
                tokens,
                "rsparse",
                sparse,
                bytes_read(made, kept),
                bandwidth,
                kept=round(kept, 4),
                ranks=list(made[0].operands.ranks),
                speedup=round(dense.median / sparse.median, 2),
                **facts,
            )
        )
    return rows
