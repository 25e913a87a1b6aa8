# SPDX-License-Identifier: Apache-2.0
"""vLLM decode and prefill: bf16, FP8, INT4, and rsparse on each, in one run.

    python benchmarks/bench_serve.py --shape llama-3-8b --weights bf16 fp8 int4 \\
        --batches 1 2 4 8 16 --sparsity 0.35 0.5 --prefill 2048 \\
        --dense-weights shared separate
    python benchmarks/bench_serve.py --shape llama-1b --batches 1        (CPU)

Weights are random (``random_weights.py``, one seed per parameter for all engines).
Thresholds are set on the sparse model's own decode steps and the kept fraction is
counted there, not assumed. Each engine runs in its own process, one after another, with
vLLM's defaults (CUDA graphs on a GPU). With ``--together`` they start at the same time
and are still timed one after another, while no other starts. Correctness of the kernels
is the gate of ``bench_ops.py`` and of the test suite; here the engine must produce
every token that was asked for. VLLM_DISABLED_KERNELS passes through: a second run
without MacheteLinearKernel has Marlin as the INT4 baseline.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from random_model import (
    PLANES,
    SHAPES,
    WEIGHTS,
    Variant,
    write_config,
    write_sparse_model,
)
from serve_jobs import EngineJob, run_jobs

from vllm_rsparse.bench.provenance import commit, device_name
from vllm_rsparse.formats.names import AS_STORED, HEAD_FORMATS

# For each engine of a run that starts them together, which share the GPU.
_TOGETHER = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument(
        "--layers", type=int, help="number of decoder layers (default: the shape's)"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5])
    parser.add_argument(
        "--weights",
        nargs="+",
        choices=WEIGHTS,
        default=["bf16"],
        help="formats of the base model: fp8 has a scale per output channel, fp8-block"
        " per 128x128 block, int4 per group of 128 input channels; int8-planes has no"
        " dense engine",
    )
    parser.add_argument(
        "--planes",
        nargs="+",
        default=["0.85:0.15", "0.7:0.05"],
        metavar="A:B",
        help="for int8-planes instead of --sparsity: shares of the channels that are"
        " read with at least 4 bits and with 8",
    )
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0])
    parser.add_argument(
        "--head",
        nargs="+",
        choices=[AS_STORED, *HEAD_FORMATS],
        default=[AS_STORED],
        help="formats of the output layer of rsparse, each in its own engine",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=["dense", "rsparse", "fp8"],
        default=["dense", "rsparse"],
        help="which, for each of --weights; dense is vLLM's own layer, fp8 is vLLM's"
        " own FP8 of bf16 weights, quantized while loading",
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--max-sparse-tokens",
        type=int,
        help="switch point of the route (default: the plug-in's)",
    )
    parser.add_argument(
        "--dense-weights",
        nargs="+",
        choices=["shared", "separate"],
        default=["shared"],
        help="how rsparse serves dense steps, each in its own engine",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="start the engines at the same time; a GPU must hold all of them",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")
    parser.add_argument("--out", type=Path, default=Path(".bench/serve"))
    return parser.parse_args()


class Benchmark:
    """The engines of one command line and their rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._shape = SHAPES[args.shape]
        if args.layers is not None:
            self._shape = replace(self._shape, layers=args.layers)
        self._rows: list[dict[str, Any]] = []
        engine: dict[str, Any] = dict(_TOGETHER) if args.together else {}
        self._job = {
            "task": "measure",
            "load_format": "rsparse_random",
            "shape": args.shape,
            "batches": args.batches,
            "new_tokens": args.new_tokens,
            "prefill": args.prefill,
            "repeats": args.repeats,
            "max_num_seqs": max([16, *args.batches]),
            "max_model_len": max(512, args.prefill + 64, args.new_tokens + 64),
            "engine": engine,
        }
        if args.together:
            self._job["lock"] = str(args.out / "lock")
        self._facts = {
            "device": device_name(),
            "torch": torch.__version__,
            "vllm": version("vllm"),
            "vllm_rsparse": version("vllm-rsparse"),
            "commit": commit(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "shape": args.shape,
            "layers": self._shape.layers,
        }
        if disabled := os.environ.get("VLLM_DISABLED_KERNELS"):
            self._facts["disabled_kernels"] = disabled
        if args.tensor_parallel > 1:
            self._facts["tensor_parallel"] = args.tensor_parallel
            engine["tensor_parallel_size"] = args.tensor_parallel
            # The random format is registered in this process alone.
            self._job["load_format"] = "dummy"

    def run(self) -> list[dict[str, Any]]:
        """All engines; sparse ones are timed after their calibration. Returns rows."""
        first: list[EngineJob] = []
        sparse: list[EngineJob] = []
        for weights in self._args.weights:
            for engine in self._args.engines:
                if engine != "rsparse":
                    if weights == PLANES:
                        continue
                    first.append(self._dense(weights, engine == "fp8"))
                    continue
                for rho, head in product(self._args.rho, self._args.head):
                    variant = Variant(weights, rho, head)
                    for targets in self._groups(weights, rho):
                        first.append(self._calibration(variant, targets))
                        sparse += self._sparse(variant, targets)
        for job, result in run_jobs(first + sparse, self._args.together):
            self._record(job.label, result)
        return self._rows

    def _groups(self, weights: str, rho: float) -> list[dict[str, list[float]]]:
        """Targets that one engine serves: all of them if there are no factors.

        A target has a name and the shares of channels to keep, for each plane.
        """
        if weights == PLANES:
            pairs = [[float(x) for x in pair.split(":")] for pair in self._args.planes]
            return [{f"-{a:g}:{b:g}": [a, b] for a, b in pairs}]
        targets = {f"-s{s:g}": [rho * (1 - s)] for s in self._args.sparsity}
        if rho == 1:
            return [targets]
        return [{name: shares} for name, shares in targets.items()]

    def _dense(self, weights: str, online: bool) -> EngineJob:
        model = self._args.out / weights
        write_config(model, self._shape, WEIGHTS[weights])
        label = "fp8-online" if online else weights
        job = {**self._job, "model": str(model)}
        if online:
            # vLLM quantizes while it makes its dummy weights.
            job["load_format"] = "dummy"
            job["engine"] = {**self._job["engine"], "quantization": "fp8"}
        return EngineJob(label + "{s}", job, self._args.out / f"{label}.log")

    def _calibration(
        self, variant: Variant, targets: dict[str, list[float]]
    ) -> EngineJob:
        name, job = self._sparse_job(variant, targets)
        # The sparsest: the route must be sparse for it.
        shares = min(targets.values(), key=sum)
        write_sparse_model(Path(job["model"]), self._shape, shares, variant)
        job |= {"task": "calibrate", "targets": targets}
        log = self._args.out / f"{name}-calibrate.log"
        # Calibration decodes four prompts at a time, all of them sparse.
        return EngineJob("", job, log, {"max_sparse_tokens": 4})

    def _sparse(
        self, variant: Variant, targets: dict[str, list[float]]
    ) -> list[EngineJob]:
        name, job = self._sparse_job(variant, targets)
        return [
            EngineJob(
                f"{variant.weights}{{s}}{variant.suffix}-{dense_weights}",
                job,
                self._args.out / f"{name}-{dense_weights}.log",
                {
                    "max_sparse_tokens": self._args.max_sparse_tokens,
                    "dense_weights": dense_weights,
                },
            )
            for dense_weights in self._args.dense_weights
        ]

    def _sparse_job(
        self, variant: Variant, targets: dict[str, list[float]]
    ) -> tuple[str, dict[str, Any]]:
        name = variant.weights + next(iter(targets)) + variant.suffix
        name = name.replace(":", "-")
        model = self._args.out / name
        found = self._args.out / f"{name}-thresholds.json"
        return name, {
            **self._job,
            "model": str(model),
            "found": str(found),
        }

    def _record(self, label: str, result: dict[str, Any]) -> None:
        for target, values in result.pop("runs", {}).items():
            name = label.format(s="" if target == "dense" else target)
            self._rows.append({**self._facts, "engine": name, **result, **values})
            print(f"{name}: {json.dumps({**result, **values})}", flush=True)
        # Written after every engine, so that an interrupted run keeps its rows.
        lines = [json.dumps(row) + "\n" for row in self._rows]
        (self._args.out / "rows.jsonl").write_text("".join(lines))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Milliseconds per step, and the speed-up over the dense engine of the format."""
    print(f"\n{rows[0]['device']}, {rows[0]['shape']}, decode ms per step")
    batches = rows[0]["decode_ms"]
    print(f"{'engine':24}" + "".join(f"{'batch ' + b:>18}" for b in batches))
    bases = {row["engine"]: row for row in rows}
    for row in rows:
        base = row["engine"].partition("-s0")[0].partition(f"{PLANES}-")[0]
        dense = bases.get(base, rows[0])
        cells = ""
        for batch, value in row["decode_ms"].items():
            ratio = dense["decode_ms"][batch]["median"] / value["median"]
            cells += f"{value['median']:10.2f} ({ratio:.2f}x)"
        line = f"{row['engine']:24}{cells}"
        if "prefill_ms" in row:
            ratio = dense["prefill_ms"]["median"] / row["prefill_ms"]["median"]
            line += f"   prefill {row['prefill_ms']['median']:.1f} ms ({ratio:.2f}x)"
        print(line)


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    print_table(Benchmark(args).run())


if __name__ == "__main__":
    main()
