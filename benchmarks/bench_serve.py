# SPDX-License-Identifier: Apache-2.0
"""vLLM decode and prefill: bf16, FP8, INT4, and rsparse on each, in one run.

    python benchmarks/bench_serve.py --shape llama-3-8b --weights bf16 fp8 int4 \\
        --batches 1 2 4 8 16 --sparsity 0.35 0.5 --prefill 2048
    python benchmarks/bench_serve.py --shape llama-1b --batches 1        (CPU)

Weights are random (``random_weights.py``, one seed per parameter for all engines).
Thresholds are set on the sparse model's own decode steps and the kept fraction is
counted there, not assumed. Each engine runs in its own process, one after another, with
vLLM's defaults (CUDA graphs on a GPU). Correctness of the kernels is the gate of
``bench_ops.py`` and of the test suite; here the engine must produce every token that
was asked for.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, WEIGHTS, write_config, write_sparse_model

from vllm_rsparse.bench.provenance import commit, device_name

HERE = Path(__file__).resolve().parent


def run_worker(
    job: dict[str, Any], log: Path, max_sparse_tokens: int | None = None
) -> dict[str, Any]:
    """Run one engine; its output goes to ``log``, the result is its last line."""
    command = [sys.executable, str(HERE / "serve_worker.py"), json.dumps(job)]
    env = dict(os.environ)
    if max_sparse_tokens is not None:
        env["VLLM_RSPARSE_MAX_SPARSE_TOKENS"] = str(max_sparse_tokens)
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
    text = log.read_text()
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nfailed; the end of {log}:\n{text[-3000:]}")
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    sys.exit(f"no result in {log}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        default=["bf16"],
        help="formats of the base model: fp8 has a scale per output channel, fp8-block"
        " per 128x128 block, int4 per group of 128 input channels",
    )
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0])
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=["dense", "rsparse", "fp8"],
        default=["dense", "rsparse"],
        help="which, in this order, for each of --weights; dense is vLLM's own layer,"
        " fp8 is vLLM's own FP8 of bf16 weights, quantized while loading",
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--max-sparse-tokens",
        type=int,
        help="switch point of the route (default: the plug-in's)",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")
    parser.add_argument("--out", type=Path, default=Path(".bench/serve"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.shape]
    job = {
        "task": "measure",
        "load_format": "rsparse_random",
        "shape": args.shape,
        "batches": args.batches,
        "new_tokens": args.new_tokens,
        "prefill": args.prefill,
        "repeats": args.repeats,
        "max_num_seqs": max([16, *args.batches]),
        "max_model_len": max(512, args.prefill + 64, args.new_tokens + 64),
    }
    facts = {
        "device": device_name(),
        "torch": torch.__version__,
        "vllm": version("vllm"),
        "vllm_rsparse": version("vllm-rsparse"),
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "shape": args.shape,
    }
    if args.tensor_parallel > 1:
        facts["tensor_parallel"] = args.tensor_parallel
        job["engine"] = {"tensor_parallel_size": args.tensor_parallel}
        # The random format is registered in this process alone.
        job["load_format"] = "dummy"
    rows: list[dict[str, Any]] = []

    def record(label: str, values: dict[str, Any]) -> None:
        rows.append({**facts, "engine": label, **values})
        print(f"{label}: {json.dumps(values)}", flush=True)
        # Written after every engine, so that an interrupted run keeps its rows.
        lines = [json.dumps(row) + "\n" for row in rows]
        (args.out / "rows.jsonl").write_text("".join(lines))

    def run_sparse(weights: str, sparsity: float, rho: float) -> None:
        label = f"{weights}-s{sparsity:g}" + (f"-rho{rho:g}" if rho < 1 else "")
        model = args.out / label
        write_sparse_model(model, shape, sparsity, rho, weights=weights)
        sparse = {**job, "model": str(model), "sparsity": sparsity, "rho": rho}
        sparse["weights"] = weights
        # Calibration decodes four prompts at a time, all of them sparse.
        kept = run_worker(
            {**sparse, "task": "calibrate"}, args.out / f"{label}-calibrate.log", 4
        )
        values = run_worker(sparse, args.out / f"{label}.log", args.max_sparse_tokens)
        record(label, {**kept, **values})

    def run_dense(weights: str, online: bool) -> None:
        model = args.out / weights
        write_config(model, shape, WEIGHTS[weights])
        label = "fp8-online" if online else weights
        dense = {**job, "model": str(model)}
        if online:
            # vLLM quantizes while it makes its dummy weights.
            dense["load_format"] = "dummy"
            dense["engine"] = {**job.get("engine", {}), "quantization": "fp8"}
        record(label, run_worker(dense, args.out / f"{label}.log"))

    for weights in args.weights:
        for engine in args.engines:
            if engine != "rsparse":
                run_dense(weights, engine == "fp8")
                continue
            for sparsity in args.sparsity:
                for rho in args.rho:
                    run_sparse(weights, sparsity, rho)
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds per step, and the speed-up over the first engine of the run."""
    dense = rows[0]
    base = dense["decode_ms"]
    print(
        f"\n{dense['device']}, {dense['shape']}, decode ms per step"
        f" (speed-up over {dense['engine']})"
    )
    print(f"{'engine':24}" + "".join(f"{'batch ' + b:>18}" for b in base))
    for row in rows:
        cells = ""
        for batch, value in row["decode_ms"].items():
            ratio = base[batch]["median"] / value["median"]
            cells += f"{value['median']:10.2f} ({ratio:.2f}x)"
        line = f"{row['engine']:24}{cells}"
        if "prefill_ms" in row:
            ratio = dense["prefill_ms"]["median"] / row["prefill_ms"]["median"]
            line += f"   prefill {row['prefill_ms']['median']:.1f} ms ({ratio:.2f}x)"
        print(line)


if __name__ == "__main__":
    main()
