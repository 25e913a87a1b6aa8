# SPDX-License-Identifier: Apache-2.0
"""Measurements of the op and of dense products, after a correctness gate."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from vllm_rsparse.bench.baselines import Calls, baselines, dense_baseline
from vllm_rsparse.bench.gate import allowed, check
from vllm_rsparse.bench.inputs import Inputs, bytes_read, kept_fractions, rotation
from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.bench.timing import Timing, time_calls, time_rounds
from vllm_rsparse.op import reference
from vllm_rsparse.op.backends import Backend, routes_of


def time_dense(inputs: list[Inputs], backend: Backend) -> Timing:
    """The dense product of the inputs' format alone, after a check."""
    return time_calls(dense_baseline(inputs, backend).calls)


def sparse_calls(inputs: list[Inputs], backend: Backend) -> Calls:
    """The op's sparse route on a backend, as it is served, after a check."""
    expected = inputs[0].call(reference.rsparse_linear)
    sparse = routes_of(backend, inputs[0].operands.weight.format).sparse
    calls = [partial(one.call, sparse) for one in inputs]
    check(calls[0](), expected, backend.label, allowed(backend, inputs[0].x))
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
        method: ``dense``, ``unquantized``, ``rsparse`` or a peer.
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
    """A row per dense product and one of the op per budget, on the same weights.

    Args:
        budgets: one layer, with the kept fractions and ranks to measure.
        tokens: rows of the call.
        dtype: of activations, factors, and weights of the format float.
        device: "cpu" or "cuda".
        backend: what runs the op.
        bandwidth: bytes per second that the device reads.
    """
    layer = budgets[0]
    inputs = rotation(layer, tokens, dtype, device)
    budgeted = [[one.with_budget(budget) for one in inputs] for budget in budgets]
    dense = baselines(inputs, backend)
    groups = [
        *(one.calls for one in dense),
        *(sparse_calls(one, backend) for one in budgeted),
    ]
    if device == "cpu":
        timings = time_rounds(groups)
    else:
        timings = [time_calls(calls) for calls in groups]
    facts = {
        "dtype": str(dtype).removeprefix("torch."),
        "format": layer.format,
        "group": layer.group,
    }
    rows = [
        row(
            layer,
            tokens,
            one.method,
            timing,
            one.nbytes,
            bandwidth,
            kept=1.0,
            baseline=one.name,
            **facts,
        )
        for one, timing in zip(dense, timings, strict=False)
    ]
    for budget, made, sparse in zip(
        budgets, budgeted, timings[len(dense) :], strict=True
    ):
        kept = kept_fractions(made)
        rows.append(
            row(
                budget,
                tokens,
                "rsparse",
                sparse,
                bytes_read(made, kept),
                bandwidth,
                kept=round(kept[0], 4),
                **({"full": round(kept[1], 4)} if len(kept) > 1 else {}),
                ranks=list(made[0].operands.ranks),
                speedup=round(timings[0].median / sparse.median, 2),
                **facts,
            )
        )
    return rows
