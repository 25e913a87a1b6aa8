# SPDX-License-Identifier: Apache-2.0
"""``vllm-rsparse bench``: time of every distinct layer, dense and sparse."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_rsparse.arguments import output_file
from vllm_rsparse.artifact.prepared import open_artifact
from vllm_rsparse.bench.bandwidth import read_bandwidth
from vllm_rsparse.bench.layers import SHAPES, Layer, layers_of
from vllm_rsparse.bench.measure import measure_layer
from vllm_rsparse.bench.provenance import device_name, provenance
from vllm_rsparse.errors import SettingError
from vllm_rsparse.op import tuning
from vllm_rsparse.op.backends import resolve_backend
from vllm_rsparse.text_table import align


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "directory", nargs="?", type=Path, help="prepared model whose layers to measure"
    )
    what.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        help="well-known models to measure by shape, without a checkpoint",
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[1, 2], help="tokens per call"
    )
    parser.add_argument(
        "--sparsity",
        nargs="+",
        type=float,
        default=[0.5],
        help="with --shapes; several are timed on the same weights (default: 0.5)",
    )
    parser.add_argument(
        "--rho",
        type=float,
        default=1.0,
        help="with --shapes: share of the budget for exact channels (default: 1)",
    )
    parser.add_argument(
        "--tensor-parallel-size", "-tp", type=int, default=1, help="of DIRECTORY"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--output", type=output_file, help="write the rows as JSON")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search the launch configurations of these shapes for this GPU first",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the rows if requested."""
    measured = _layers(args)
    dtype = getattr(torch, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = resolve_backend("auto", device)
    if args.tune:
        if device == "cpu":
            raise SettingError("--tune needs a CUDA device, and there is none")
        from vllm_rsparse.bench.tuner import tune

        path = tune(
            [budgets[0] for budgets in measured], args.tokens, dtype, provenance()
        )
        print(f"wrote {path}", file=sys.stderr)
        tuning.forget_tables()
    bandwidth = read_bandwidth(device)
    print(f"{device_name()}: reads {bandwidth / 1e12:.2f} TB/s", file=sys.stderr)
    rows = [
        row
        for tokens in args.tokens
        for budgets in measured
        for row in measure_layer(budgets, tokens, dtype, device, backend, bandwidth)
    ]
    print(table(rows))
    if args.output:
        document = {**provenance(), "read_gbps": round(bandwidth / 1e9), "rows": rows}
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _layers(args: argparse.Namespace) -> list[list[Layer]]:
    """Every layer to measure, with its budgets."""
    if min(args.tokens) < 1:
        raise SettingError(f"--tokens must be at least 1, got {min(args.tokens)}")
    if args.directory is not None:
        artifact = open_artifact(args.directory)
        return [
            [layer] for layer in layers_of(artifact.info, args.tensor_parallel_size)
        ]
    if not all(0.0 <= s < 1.0 for s in args.sparsity) or not 0.0 < args.rho <= 1.0:
        raise SettingError(
            "--sparsity must lie in [0, 1) and --rho in (0, 1], got"
            f" {' '.join(map(str, args.sparsity))} and {args.rho}"
        )
    layers = dict.fromkeys(layer for name in args.shapes for layer in SHAPES[name])
    return [
        [layer.with_budget(sparsity, args.rho) for sparsity in args.sparsity]
        for layer in layers
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The printed table: for each budget every layer, then the sum over the model's."""
    lines = [["tokens", "layer", "N x K", "read", "dense us", "sparse us", "", "GB/s"]]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        layers: list[list[dict[str, Any]]] = []
        for row in rows:
            if row["tokens"] == tokens:
                if row["method"] == "dense":
                    layers.append([])
                layers[-1].append(row)
        for budget in range(1, len(layers[0])):
            pairs = [(group[0], group[budget]) for group in layers]
            lines.extend(_lines(tokens, pairs))
    return align(lines)


def _lines(
    tokens: int, pairs: list[tuple[dict[str, Any], dict[str, Any]]]
) -> list[list[str]]:
    """A line per layer of one budget, and their sum."""
    lines = [
        [
            str(tokens),
            f"{dense['count']} x {dense['layer']}",
            f"{dense['n']} x {dense['k']}",
            f"{sparse['kept']:.3f}",
            f"{dense['us']:.1f}",
            f"{sparse['us']:.1f}",
            f"{dense['us'] / sparse['us']:.2f}x",
            f"{sparse['gbps']} ({sparse['share']:.0%})",
        ]
        for dense, sparse in pairs
    ]
    dense_us, sparse_us = (
        sum(row["us"] * row["count"] for row in side)
        for side in zip(*pairs, strict=True)
    )
    ratio = f"{dense_us / sparse_us:.2f}x"
    totals = [f"{dense_us:.1f}", f"{sparse_us:.1f}", ratio, ""]
    return [*lines, [str(tokens), "all", "", "", *totals]]
