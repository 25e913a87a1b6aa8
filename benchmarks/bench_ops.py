# SPDX-License-Identifier: Apache-2.0
"""Time of the sparse op against cuBLAS and the nearest peer, on real layer shapes.

    python benchmarks/bench_ops.py                       Llama-3-8B, 1 token, 50% kept
    python benchmarks/bench_ops.py --tokens 1 2 4 --rho 1 0.95 --output rows.json

Every timing is a replayed CUDA graph of calls over rotating weights (600 MB), after a
correctness gate against the float32 definition. The dense baseline is cuBLAS on the
plain [N, K] layout. Kept fractions are counted. ``vllm-rsparse bench`` measures a
prepared model the same way and tunes launch configurations. Needs a CUDA device.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peer import CONFIGS as PEER_CONFIGS
from peer import peer_linear
from torch.nn.functional import linear as dense_linear

from vllm_rsparse.bench.bandwidth import read_bandwidth
from vllm_rsparse.bench.gate import check
from vllm_rsparse.bench.inputs import Inputs, bytes_read, kept_fractions, rotation
from vllm_rsparse.bench.layers import SHAPES, Layer
from vllm_rsparse.bench.measure import row, time_dense, time_sparse
from vllm_rsparse.bench.provenance import provenance
from vllm_rsparse.bench.timing import Timing, time_calls
from vllm_rsparse.op import tuning
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.op.tables import Problem


def time_peer(inputs: list[Inputs], kept: float) -> tuple[Timing, tuple[int, int, int]]:
    """The fastest of the peer's configurations, at the same fraction of kept channels.

    Its one threshold is the quantile of each input that keeps this fraction.
    """
    calls = []
    for one in inputs:
        threshold = one.x.float().abs().quantile(1 - kept).item()
        calls.append((one.x.half(), one.operands.weight.data.half(), threshold))
    x, weight, threshold = calls[0]
    expected = dense_linear((x * (x.float().abs() > threshold)).float(), weight.float())

    def measure(config: tuple[int, int, int], count: int, replays: int) -> Timing:
        timed: list[Callable[[], object]] = [
            lambda call=call: peer_linear(*call, config) for call in calls
        ]
        return time_calls(timed, count, replays)

    best = min(PEER_CONFIGS, key=lambda config: measure(config, 32, 4).median)
    check(peer_linear(x, weight, threshold, best), expected, "peer")
    return measure(best, 120, 15), best


def bench_layer(
    shape: Layer, tokens: int, dtype: torch.dtype, args: argparse.Namespace, read: float
) -> list[dict[str, Any]]:
    """Rows of one layer: dense, the op at each rho, and the peer."""
    rows: list[dict[str, Any]] = []

    def add(method: str, timing: Timing, moved: float, **extra: Any) -> None:
        made = row(layer, tokens, method, timing, moved, read, dtype=name, **extra)
        made["speedup"] = round(rows[0]["us"] / timing.median, 2) if rows else 1.0
        rows.append(made)
        print(json.dumps(made), flush=True)

    name = str(dtype).removeprefix("torch.")
    for rho in args.rho:
        layer = shape.with_budget(args.sparsity, rho)
        inputs = rotation(layer, tokens, dtype, "cuda")
        if not rows:
            dense_bytes = layer.n * layer.k * dtype.itemsize
            timing = time_dense(inputs, Backend.TRITON)
            add("dense", timing, dense_bytes, rho=1.0, kept=1.0, ranks=[])
        kept = kept_fractions(inputs)
        config = tuning.launch_config(
            tuning.device_of(inputs[0].x.device),
            Problem.of(inputs[0].operands.weight),
            tokens,
        )
        ranks = list(inputs[0].operands.ranks)
        facts = {"rho": rho, "kept": round(kept[0], 4), "ranks": ranks}
        moved = bytes_read(inputs, kept)
        timing = time_sparse(inputs, Backend.TRITON)
        add("rsparse", timing, moved, **facts, config=asdict(config))
        if not args.no_peer and tokens == 1 and rho == 1.0:
            timing, best = time_peer(inputs, kept[0])
            add("peer", timing, moved, **facts, config=best)
        del inputs
    return rows


def print_sums(rows: list[dict[str, Any]]) -> None:
    """Sums over the layers of a model, the figure the targets are stated in."""
    sums: dict[tuple[int, str, float], float] = {}
    for one in rows:
        key = (one["tokens"], one["method"], one["rho"])
        sums[key] = sums.get(key, 0.0) + one["us"]
    for (tokens, method, rho), total in sorted(sums.items()):
        dense = sums[tokens, "dense", 1.0]
        print(
            f"{tokens:3d} tokens {method:8s} rho {rho:4.2f}  sum {total:7.1f} us"
            f"  {dense / total:5.2f}x dense"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["llama-3-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_ops.py times CUDA kernels and found no CUDA device")
    read = read_bandwidth("cuda")
    print(f"{torch.cuda.get_device_name()}: reads at {read / 1e12:.2f} TB/s")
    rows = []
    for model in args.model:
        of_model = []
        for tokens in args.tokens:
            for layer in SHAPES[model]:
                dtype = getattr(torch, args.dtype)
                of_model += bench_layer(layer, tokens, dtype, args, read)
        print(model)
        print_sums(of_model)
        rows += [{"model": model, "sparsity": args.sparsity, **r} for r in of_model]
    if args.output:
        facts = {**provenance(), "read_gbps": round(read / 1e9)}
        args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
