# SPDX-License-Identifier: Apache-2.0
"""Time of the sparse op against cuBLAS and the nearest peer, on real layer shapes.

    python benchmarks/bench_ops.py                       Llama-3-8B, 1 token, 50% kept
    python benchmarks/bench_ops.py --tokens 1 2 4 --rho 1 0.95 --output rows.json
    python benchmarks/bench_ops.py --tune                write the configurations

Every timing is a replayed CUDA graph of calls over rotating weights (600 MB), after a
correctness gate against the float32 definition. The dense baseline is cuBLAS on the
plain [N, K] layout. Kept fractions are counted. Needs a CUDA device.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from checkout import commit
from ops_cases import (
    LAYERS,
    Inputs,
    Layer,
    bytes_read,
    kept_fraction,
    rotation,
)
from ops_timing import Timing, read_bandwidth, time_calls
from peer import CONFIGS as PEER_CONFIGS
from peer import peer_linear
from torch.nn.functional import linear as dense_linear
from tune_ops import Tuner, candidates, rank_configs

from vllm_rsparse import reference, tuning
from vllm_rsparse.kernels.rsparse_linear import rsparse_linear

# The output is rounded once to a half type; see tests/ops/test_triton.py.
GATE = 4e-3


def check(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The gate: no timing of a wrong result."""
    error = (actual.float() - expected.float()).pow(2).mean().sqrt()
    ratio = (error / expected.float().pow(2).mean().sqrt()).item()
    if not ratio < GATE:
        sys.exit(f"{what}: relative error {ratio:.2e} is over {GATE:.0e}, not timed")


def time_dense(inputs: list[Inputs]) -> Timing:
    calls: list[Callable[[], object]] = [
        lambda one=one: dense_linear(one.x, one.dense_weight) for one in inputs
    ]
    return time_calls(calls)


def time_sparse(inputs: list[Inputs], config: tuning.LaunchConfig | None) -> Timing:
    one = inputs[0]
    expected = reference.rsparse_linear(*one.op_args())
    check(rsparse_linear(*one.op_args(), config), expected, "sparse")
    return time_calls(
        [lambda one=one: rsparse_linear(*one.op_args(), config) for one in inputs]
    )


def time_peer(inputs: list[Inputs], kept: float) -> tuple[Timing, tuple[int, int, int]]:
    """The fastest of the peer's configurations, at the same fraction of kept channels.

    Its one threshold is the quantile of each input that keeps this fraction.
    """
    calls = []
    for one in inputs:
        threshold = one.x.float().abs().quantile(1 - kept).item()
        calls.append((one.x.half(), one.weight.half(), threshold))
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
    layer: Layer,
    tokens: int,
    dtype: torch.dtype,
    rhos: list[float],
    with_peer: bool,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Rows of one layer: dense, the op at each rho, and the peer."""
    rows = []

    def add(method: str, timing: Timing, moved: float, **extra: Any) -> None:
        gbps = moved / timing.median / 1e3
        row = {
            "layer": layer.name,
            "n": layer.n,
            "k": layer.k,
            "tokens": tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "method": method,
            "us": round(timing.median, 2),
            "p20": round(timing.p20, 2),
            "p80": round(timing.p80, 2),
            "gbps": round(gbps),
            "share": round(gbps * 1e9 / bandwidth, 3),
            "speedup": round(rows[0]["us"] / timing.median, 2) if rows else 1.0,
            **extra,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)

    for rho in rhos:
        inputs = rotation(layer, tokens, dtype, rho)
        if not rows:
            dense_bytes = layer.n * layer.k * dtype.itemsize
            add("dense", time_dense(inputs), dense_bytes, rho=1.0, kept=1.0, ranks=[])
        kept = kept_fraction(inputs)
        config = tuning.launch_config(
            torch.cuda.get_device_name(),
            layer.n,
            layer.k,
            str(dtype).removeprefix("torch."),
            tokens,
        )
        facts = {"rho": rho, "kept": round(kept, 4), "ranks": inputs[0].ranks}
        moved = bytes_read(layer, inputs, kept)
        timing = time_sparse(inputs, config)
        add("rsparse", timing, moved, **facts, config=asdict(config))
        if with_peer and tokens == 1 and rho == 1.0:
            timing, best = time_peer(inputs, kept)
            add("peer", timing, moved, **facts, config=best)
        del inputs
    return rows


def print_sums(rows: list[dict[str, Any]]) -> None:
    """Sums over the layers of a model, the figure the targets are stated in."""
    keys = sorted({(r["tokens"], r["method"], r["rho"]) for r in rows})
    for tokens, method, rho in keys:
        chosen = [
            r
            for r in rows
            if (r["tokens"], r["method"], r["rho"]) == (tokens, method, rho)
        ]
        total = sum(r["us"] for r in chosen)
        dense = sum(
            r["us"] for r in rows if r["tokens"] == tokens and r["method"] == "dense"
        )
        print(
            f"{tokens:3d} tokens {method:8s} rho {rho:4.2f}  sum {total:7.1f} us"
            f"  {dense / total:5.2f}x dense"
        )


def tune(models: list[str], tokens: list[int], dtype: torch.dtype, dump: Path) -> None:
    """Search every distinct shape and merge what was found into the device's table."""
    shapes = {(layer.n, layer.k): layer for m in models for layer in LAYERS[m]}
    work = [(layer, count) for layer in shapes.values() for count in tokens]
    with Tuner() as tuner:
        fitting = {
            job: tuner.compile(*job, dtype, 1.0, candidates(*job)) for job in work
        }
    device = torch.cuda.get_device_name()
    path = tuning.config_path(device)
    table = {
        (e.n, e.k, e.dtype, e.tokens): e
        for e in (tuning.read_table(path) if path.exists() else [])
    }
    rankings = []
    for layer, count in work:
        inputs = rotation(layer, count, dtype, 1.0)
        dense = time_dense(inputs)
        ranking = rank_configs(inputs, fitting[layer, count])
        best_us, best = ranking[0]
        expected = reference.rsparse_linear(*inputs[0].op_args())
        check(rsparse_linear(*inputs[0].op_args(), best), expected, str(best))
        entry = tuning.TunedEntry(
            layer.n,
            layer.k,
            str(dtype).removeprefix("torch."),
            count,
            best,
            round(best_us, 2),
            round(dense.median, 2),
        )
        table[layer.n, layer.k, entry.dtype, count] = entry
        print(f"{layer.name} {entry}", flush=True)
        rankings.append(
            {
                "layer": asdict(layer),
                "tokens": count,
                "dense_us": dense.median,
                "configs": [{"us": us, **asdict(c)} for us, c in ranking],
            }
        )
        del inputs
    tuning.write_table(path, list(table.values()), provenance())
    print(f"wrote {path}")
    if dump:
        dump.write_text(json.dumps(rankings))


def provenance() -> dict[str, Any]:
    """What ran where: device, versions, commit, command."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "command": "python " + " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=LAYERS, default=["llama-3-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--rho", nargs="+", type=float, default=[1.0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    parser.add_argument("--tune", action="store_true", help="search configurations")
    parser.add_argument(
        "--dump", type=Path, help="with --tune: write every timing as JSON"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_ops.py times CUDA kernels and found no CUDA device")
    dtype = getattr(torch, args.dtype)
    if args.tune:
        tune(args.model, args.tokens, dtype, args.dump)
        return
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads at {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for model in args.model:
        of_model = []
        for tokens in args.tokens:
            for layer in LAYERS[model]:
                of_model += bench_layer(
                    layer, tokens, dtype, args.rho, not args.no_peer, bandwidth
                )
        print(model)
        print_sums(of_model)
        rows += [{"model": model, **row} for row in of_model]
    if args.output:
        document = {**provenance(), "read_gbps": round(bandwidth / 1e9), "rows": rows}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
