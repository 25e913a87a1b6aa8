# SPDX-License-Identifier: Apache-2.0
"""Load on ``vllm serve``: a prepared model and its base, in one run.

    python benchmarks/load_serve.py PREPARED [--users 1 4 16 64] [--seconds 30]
                                    [--soak-minutes 20] [--json FILE]

For the base model (``max_sparse_tokens`` 0) and then for the sparse one: vLLM's own
client (``vllm bench serve``) with prompts of mixed lengths at each number of users,
then one request of every other kind, whose outcomes must be equal. Finally each server
is kept busy with all of them while resident memory is sampled. Prefix caching and
chunked prefill are on. Exit status 1 if the sparse server gives an error that the base
does not.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
from request_kinds import MAX_MODEL_LEN, Kinds

from vllm_rsparse.testing.server import ServerProcess, exit_on_signals

BIN = Path(sys.executable).parent
ENGINES = ("dense", "rsparse")


def serve(model: Path, log: Path, sparse: bool, options: list[str]) -> ServerProcess:
    argv = [BIN / "vllm", "serve", model, "--served-model-name", "m"]
    argv += ["--max-model-len", MAX_MODEL_LEN, "--max-num-seqs", 64]
    argv += ["--enable-prefix-caching", "--enable-chunked-prefill"]
    argv += ["--max-num-batched-tokens", 512, *options]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not sparse:
        env["VLLM_RSPARSE_MAX_SPARSE_TOKENS"] = "0"
    return ServerProcess([str(a) for a in argv], log, env=env)


def bench(
    server: ServerProcess, model: Path, users: int, seconds: int, folder: Path
) -> dict[str, Any]:
    """One run of ``vllm bench serve``: as many requests as fit the time, roughly."""
    requests = max(users * 2, users * seconds // 4)
    command = [BIN / "vllm", "bench", "serve", "--base-url", server.base_url]
    command += ["--model", "m", "--tokenizer", model, "--dataset-name", "random"]
    command += ["--random-input-len", "128", "--random-output-len", "64"]
    command += ["--random-range-ratio", "0.75", "--num-prompts", requests]
    command += ["--max-concurrency", users, "--ignore-eos", "--disable-tqdm"]
    command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,95"]
    command += ["--save-result", "--result-dir", folder, "--result-filename", "r.json"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"vllm bench serve failed:\n{done.stderr[-3000:]}")
    result = json.loads((folder / "r.json").read_text())
    return {
        "users": users,
        "requests": requests,
        "errors": requests - result["completed"],
        "tokens_per_s": result["output_throughput"],
        "ttft_ms": result["median_ttft_ms"],
        "ttft_p95_ms": result["p95_ttft_ms"],
        "tpot_ms": result["median_tpot_ms"],
    }


def resident_mib(server: ServerProcess) -> dict[str, float]:
    """Resident memory by title of the server's processes: engine, worker, ..."""
    parent = psutil.Process(server.pid)
    found: dict[str, float] = {}
    for process in [parent, *parent.children(recursive=True)]:
        try:
            size, title = process.memory_info().rss / 2**20, process.cmdline()[0]
        except (psutil.NoSuchProcess, IndexError):
            continue
        title = title.split()[0] if title.startswith("VLLM::") else "other"
        title = "API server" if process == parent else title
        found[title] = found.get(title, 0) + size
    return found


def soak(server: ServerProcess, minutes: float, users: int) -> dict[str, Any]:
    """Keep the server busy with every kind of request; sample its memory."""
    kinds, outcomes = Kinds(server), Counter[str]()
    end = time.monotonic() + 60 * minutes

    def user(seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < end:
            name = choose.choice(["streamed"] * 4 + list(kinds.all))
            outcomes[f"{name}: {kinds.run(name)}"] += 1

    threads = [threading.Thread(target=user, args=(seed,)) for seed in range(users)]
    for thread in threads:
        thread.start()
    samples: list[dict[str, float]] = []
    while time.monotonic() < end:
        samples.append(resident_mib(server))
        time.sleep(5)
    for thread in threads:
        thread.join()
    return {
        "minutes": minutes,
        "users": users,
        "rss_mib": samples,
        "outcomes": outcomes,
        "left running": running(server),
    }


def print_soak(engine: str, result: dict[str, Any]) -> None:
    """Memory over time, process by process, and the outcome of every request."""
    samples = result["rss_mib"]
    marks = [0, 12, *(len(samples) * i // 4 for i in (1, 2, 3)), -1]
    print(f"\n{engine}, {result['minutes']} minutes: MiB resident at the start, after")
    print("a minute, at each quarter and at the end")
    for title in samples[-1]:
        values = [samples[min(mark, len(samples) - 1)].get(title, 0) for mark in marks]
        print(f"  {title:20}" + "".join(f"{value:8.0f}" for value in values))
    for name, count in sorted(result["outcomes"].items()):
        print(f"{count:6} {name}")


def running(server: ServerProcess) -> float:
    """Requests still in the engine, after a moment for cancelled ones to end."""
    value = 0.0
    for _ in range(20):
        text = httpx.get(f"{server.base_url}/metrics").text
        value = sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(("vllm:num_requests_running", "vllm:num_requests_wai"))
        )
        if not value:
            break
        time.sleep(0.5)
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory written by prepare")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="which"
    )
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=int, default=30, help="per run, roughly")
    parser.add_argument("--soak-minutes", type=float, default=0)
    parser.add_argument("--soak-users", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-options", default="", help="passed to vllm serve")
    arguments = parser.parse_args()
    exit_on_signals()
    model, options = arguments.model.resolve(), arguments.serve_options.split()
    engines: list[str] = arguments.engines
    result: dict[str, Any] = {"rows": [], "kinds": {}, "soak": {}}
    print(
        "| engine | users | requests | errors | tok/s | TTFT ms (p95) | TPOT ms | RSS |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for engine in engines:
            log = folder / f"{engine}.log"
            with serve(model, log, engine == "rsparse", options) as server:
                bench(server, model, 4, 4, folder)  # warm
                for users in arguments.users:
                    before = sum(resident_mib(server).values())
                    row = bench(server, model, users, arguments.seconds, folder)
                    after = sum(resident_mib(server).values())
                    row |= {"engine": engine, "rss_mib": [before, after]}
                    result["rows"].append(row)
                    print(
                        f"| {engine} | {users} | {row['requests']} | {row['errors']} |"
                        f" {row['tokens_per_s']:.0f} | {row['ttft_ms']:.0f}"
                        f" ({row['ttft_p95_ms']:.0f}) | {row['tpot_ms']:.1f} |"
                        f" {before:.0f} to {after:.0f} MiB |",
                        flush=True,
                    )
                kinds = Kinds(server)
                outcome = {name: kinds.run(name) for name in kinds.all}
                outcome["left running"] = str(running(server))
                outcome["health"] = str(
                    httpx.get(f"{server.base_url}/health").status_code
                )
                result["kinds"][engine] = outcome
                if arguments.soak_minutes:
                    result["soak"][engine] = soak(
                        server, arguments.soak_minutes, arguments.soak_users
                    )
    print("\n| request | " + " | ".join(engines) + " |")
    print("|---" * (1 + len(engines)) + "|")
    for name in result["kinds"][engines[0]]:
        outcomes = (result["kinds"][engine][name] for engine in engines)
        print(f"| {name} | " + " | ".join(outcomes) + " |")
    for engine, soaked in result["soak"].items():
        print_soak(engine, soaked)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    errors = {row["engine"]: row["errors"] for row in result["rows"] if row["errors"]}
    alike = all(
        kinds == result["kinds"][engines[0]] for kinds in result["kinds"].values()
    )
    return int(not alike or errors.get("rsparse", 0) > errors.get("dense", 0))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
