# SPDX-License-Identifier: Apache-2.0
"""The whole path on a machine without a GPU: prepare, evaluate, serve, query, time.

`make demo` runs it. Every figure that it prints is measured in that run. It writes its
files, including the servers' logs and `summary.json`, to `.demo/`.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_rsparse.testing.server import ServerError, ServerProcess, exit_on_signals

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests/assets/pyllama-8m"
BIN = Path(sys.executable).parent
PROMPT = "def read_lines(path):\n    with open(path"
COMPLETION_TOKENS = 48
# A quarter of what `prepare` takes by default, to keep the demo short: 28 s of
# processor time with all imports (AMD EPYC).
CALIBRATION = ("--calibration-samples", 16, "--calibration-tokens", 512)
# Of 512 tokens each; all the held-out text has three times as many.
EVALUATED_WINDOWS = 64
TIMED_TOKENS = 128
TIMED_RUNS = 5
# A model this small has too little work to repay the barriers between threads, least of
# all when other programs use the cores: on two busy cores, one thread took 9-18 ms per
# token and two took 25-112 ms.
THREADS = 1
# Eager: compiling needs a C++ compiler and a minute, and does not speed up a model this
# small. Both servers get the same flags.
SERVE_FLAGS = ("--max-model-len", "512", "--enforce-eager")
SERVE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; a fraction of a shared machine otherwise
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(THREADS),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> int:
    """Run the demo; the exit status says whether all of it worked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".demo")
    parser.add_argument("--sparsity", type=float, default=0.5)
    args = parser.parse_args()
    exit_on_signals()
    try:
        summary = run(args.output, args.sparsity)
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


def run(output: Path, sparsity: float) -> dict[str, Any]:
    """Run every step; returns what was measured, for `summary.json`.

    Raises:
        subprocess.CalledProcessError: a `vllm-rsparse` command failed and printed why.
        ServerError: a server did not start, or stopped answering.
    """
    started = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    prepared = output / f"{MODEL.name}-rs{round(100 * sparsity)}"
    report = output / "evaluate.json"
    calibration, held_out = stdlib_texts()

    step(f"Prepare {MODEL.name} at {sparsity:.0%} sparsity")
    vllm_rsparse(
        *("prepare", MODEL, prepared, "--sparsity", sparsity, "--overwrite"),
        *CALIBRATION,
        *("--calibration-data", *calibration),
    )
    step("Evaluate it on text that the calibration did not see")
    vllm_rsparse(
        *("evaluate", prepared, "--max-windows", EVALUATED_WINDOWS, "--json", report),
        *("--data", *held_out),
    )
    (evaluation,) = json.loads(report.read_text())["results"]

    step("Serve the sparse model, ask it, time it")
    text, sparse_ms = serve(
        prepared, output / "serve-sparse.log", "--quantization", "rsparse"
    )
    print(f"{PROMPT}{text}")
    step("Serve the dense model, time it")
    _, dense_ms = serve(MODEL, output / "serve-dense.log")
    return {
        "prompt": PROMPT,
        "completion": text,
        "achieved_sparsity": evaluation["achieved_sparsity"],
        "perplexity_dense": evaluation["perplexity_dense"],
        "perplexity_sparse": evaluation["perplexity_sparse"],
        "decode_ms_per_token_dense": dense_ms,
        "decode_ms_per_token_sparse": sparse_ms,
        "prepared": str(prepared),
        "hardware": f"{cpu_name()}, {THREADS} thread for each model",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("vllm-rsparse", "vllm", "torch")},
        },
        "seconds": round(time.monotonic() - started),
    }


def stdlib_texts() -> tuple[list[Path], list[Path]]:
    """Modules of this Python's standard library: for calibration, and held out.

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
    return calibration[:32], held_out[:8]


def vllm_rsparse(*arguments: object) -> None:
    """Run the `vllm-rsparse` command as a user would, with its output on ours."""
    process = subprocess.Popen([BIN / "vllm-rsparse", *map(str, arguments)])
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        command = f"vllm-rsparse {arguments[0]}"
        raise subprocess.CalledProcessError(status, command)


def serve(model: Path, log: Path, *flags: str) -> tuple[str, float]:
    """Serve a model; returns its completion of PROMPT and its ms per output token."""
    argv = [str(BIN / "vllm"), "serve", str(model), *flags, *SERVE_FLAGS]
    print("$", shlex.join(argv), flush=True)
    with ServerProcess(argv, log, env=SERVE_ENV) as server:
        try:
            reply = post(server.base_url, model, max_tokens=COMPLETION_TOKENS)
            text = json.load(reply)["choices"][0]["text"]
            decode_ms(server.base_url, model)  # warm-up
            runs = [decode_ms(server.base_url, model) for _ in range(TIMED_RUNS)]
        except OSError as error:
            raise ServerError(f"{error}\n{server.log_tail()}") from error
    return text, statistics.median(runs)


def decode_ms(base_url: str, model: Path) -> float:
    """Milliseconds per token between the first and the last of one streamed reply.

    Raises:
        ServerError: the reply does not have the requested number of tokens.
    """
    reply = post(
        base_url,
        model,
        max_tokens=TIMED_TOKENS,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    tokens, arrivals = 0, []
    for event in events(reply):
        if event["choices"]:
            arrivals.append(time.perf_counter())
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    if tokens != TIMED_TOKENS or len(arrivals) < 2:
        raise ServerError(f"requested {TIMED_TOKENS} streamed tokens, got {tokens}")
    return 1000 * (arrivals[-1] - arrivals[0]) / (tokens - 1)


def post(base_url: str, model: Path, **options: object) -> Any:
    """POST a greedy completion of PROMPT; returns the open reply."""
    body = {"model": str(model), "prompt": PROMPT, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{base_url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    return _opener.open(request, timeout=120)


def events(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in lines:
        field, _, value = line.partition(b":")
        if field == b"data" and value.strip() != b"[DONE]":
            yield json.loads(value)


def cpu_name() -> str:
    """The processor's name as the kernel tells it, or else the architecture."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def step(title: str) -> None:
    """Announce the next step."""
    print(f"\n== {title}", flush=True)


def print_summary(summary: dict[str, Any]) -> None:
    """The figures of this run, and their limits."""
    perplexity, decode_time = (
        [summary[f"{name}_{kind}"] for kind in ("dense", "sparse")]
        for name in ("perplexity", "decode_ms_per_token")
    )
    rows = [
        ("model-level sparsity", ".3f", 0.0, summary["achieved_sparsity"]),
        ("perplexity, held-out text", ".2f", *perplexity),
        ("decode, ms per token", ".2f", *decode_time),
    ]
    step(f"Measured in this run ({summary['seconds']} s)")
    print(f"{'':28}{'dense':>8}{'sparse':>10}")
    for name, style, dense, sparse in rows:
        print(f"{name:28}{dense:8{style}}{sparse:10{style}}")
    print()
    print(summary["hardware"])
    print(", ".join(f"{name} {v}" for name, v in summary["versions"].items()))
    times = decode_time[1] / decode_time[0]
    print(f"""
Sparsity saves reading weights. This model has 8 million of them, which fit in cache, so
there is little to save, while selecting channels takes time: a sparse token took
{times:.1f}x as long as a dense one. It also loses more accuracy than a large model.

Serve it yourself: {BIN}/vllm serve {summary["prepared"]} --quantization rsparse""")


if __name__ == "__main__":
    sys.exit(main())
