# SPDX-License-Identifier: Apache-2.0
"""Measurements of the op and of the dense layer, after a correctness gate."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from vllm_rsparse.bench.inputs import Inputs, bytes_read, kept_fraction, rotation
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.bench.timing import Timing, time_calls
from vllm_rsparse.op import reference
from vllm_rsparse.op.backends import Backend, routes_of
from vllm_rsparse.testing.tolerances import tolerance


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


def time_dense(inputs: list[Inputs]) -> Timing:
    """torch's linear on the plain [N, K] weight: cuBLAS on a GPU."""
    calls = [partial(dense_linear, one.x, one.dense_weight) for one in inputs]
    return time_calls(calls)


def time_sparse(inputs: list[Inputs], backend: Backend) -> Timing:
    """The op's sparse route on a backend, as it is served."""
    expected = inputs[0].call(reference.rsparse_linear)
    sparse = routes_of(backend, inputs[0].operands.weight.format).sparse
    calls = [partial(one.call, sparse) for one in inputs]
    check(calls[0](), expected, backend.name)
    return time_calls(calls)


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
    layer: Layer,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    backend: Backend,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """A row of the dense layer and one of the op, on the same inputs."""
    inputs = rotation(layer, tokens, dtype, device)
    kept = kept_fraction(inputs)
    dense_bytes = layer.n * layer.k * dtype.itemsize
    facts = {"dtype": str(dtype).removeprefix("torch.")}
    dense = time_dense(inputs)
    sparse = time_sparse(inputs, backend)
    return [
        row(layer, tokens, "dense", dense, dense_bytes, bandwidth, kept=1.0, **facts),
        row(
            layer,
            tokens,
            "rsparse",
            sparse,
            bytes_read(inputs, kept),
            bandwidth,
            kept=round(kept, 4),
            ranks=list(inputs[0].operands.ranks),
            speedup=round(dense.median / sparse.median, 2),
            **facts,
        ),
    ]
