# SPDX-License-Identifier: Apache-2.0
"""Load on ``vllm serve``: a prepared model beside its base, in one run.

    python benchmarks/load_serve.py PREPARED [--users 1 4 16 64] [--seconds 30]
                                    [--soak-minutes 20] [--json FILE]

For the base model (``max_sparse_tokens`` 0) and then for the sparse one: vLLM's own
client (``vllm bench serve``) with prompts of mixed lengths at each number of users,
then one request of every other kind; their outcomes must be alike. Last the sparse
server alone is kept busy with all of it, resident memory sampled. Prefix caching and
chunked prefill are on. Exit status 1 when the sparse server gives an error that the
base does not.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from vllm_rsparse.serving import ServerProcess, exit_on_signals

BIN = Path(sys.executable).parent
MAX_MODEL_LEN = 512
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
    },
    "required": ["name", "age"],
}
PROMPTS = ["def read_lines(path):\n", "import os\n\n\nclass Walker:\n", "for key in "]


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
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
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


class Kinds:
    """One request of every kind that is not a plain completion; each says how it went.

    An outcome is "ok", an HTTP status, or what was wrong with an answer.
    """

    def __init__(self, server: ServerProcess) -> None:
        self.url = f"{server.base_url}/v1"
        self.client = openai.OpenAI(
            base_url=self.url, api_key="none", max_retries=0, timeout=300
        )
        self.all: dict[str, Callable[[], str]] = {
            "streamed": self.streamed,
            "cancelled": self.cancelled,
            "logprobs": self.logprobs,
            "n = 3": self.several,
            "stop string": self.stop_string,
            "structured output": self.structured,
            "unknown model": lambda: self.invalid(model="other"),
            "negative max_tokens": lambda: self.invalid(max_tokens=-1),
            "prompt too long": lambda: self.invalid(prompt=[5] * (MAX_MODEL_LEN + 1)),
            "temperature below 0": lambda: self.invalid(temperature=-1),
            "LoRA that is not loaded": lambda: self.invalid(model="some-lora"),
            "not JSON": self.not_json,
        }

    def complete(self, **options: Any) -> Any:
        arguments = {"model": "m", "prompt": random.choice(PROMPTS), "max_tokens": 32}
        return self.client.completions.create(**{**arguments, **options})

    def streamed(self) -> str:
        chunks = list(self.complete(stream=True, extra_body={"ignore_eos": True}))
        return "ok" if chunks[-1].choices[0].finish_reason == "length" else "cut off"

    def cancelled(self) -> str:
        stream = self.complete(stream=True, max_tokens=300)
        for _ in itertools.islice(stream, 3):
            pass
        stream.close()
        return "ok"

    def logprobs(self) -> str:
        # Keyed by token: two tokens that are parts of characters decode to the same
        # text, and would leave four entries of five.
        body = {"return_tokens_as_token_ids": True}
        choice = self.complete(logprobs=5, extra_body=body).choices[0]
        top = choice.logprobs.top_logprobs
        bad = [t for t in top if len(t) < 5 or max(t.values()) > 0]
        return "ok" if top and not bad else f"bad log probabilities: {bad[:1]}"

    def several(self) -> str:
        choices = self.complete(n=3, temperature=1).choices
        return "ok" if [c.index for c in choices] == [0, 1, 2] else "bad choices"

    def stop_string(self) -> str:
        choice = self.complete(stop=["\n"], max_tokens=64).choices[0]
        return "ok" if "\n" not in choice.text else "stop string in the text"

    def structured(self) -> str:
        body = {"structured_outputs": {"json": SCHEMA}}
        choice = self.complete(max_tokens=200, extra_body=body).choices[0]
        if choice.finish_reason == "length":
            return "ok"  # valid so far; a small model may fill it with spaces
        try:
            return (
                "ok" if set(json.loads(choice.text)) == {"name", "age"} else "bad JSON"
            )
        except ValueError as error:
            return f"bad JSON: {error}"

    def invalid(self, **options: Any) -> str:
        try:
            self.complete(**options)
        except openai.APIStatusError as error:
            return str(error.status_code)
        return "accepted"

    def not_json(self) -> str:
        return str(httpx.post(f"{self.url}/completions", content=b"{").status_code)

    def run(self, name: str) -> str:
        try:
            return self.all[name]()
        except openai.APIStatusError as error:
            return str(error.status_code)
        except (openai.APIError, httpx.HTTPError) as error:
            return type(error).__name__


def resident_mib(server: ServerProcess) -> float:
    """Resident memory of the server and its children."""
    parent = psutil.Process(server.pid)
    total = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


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
    samples = []
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
    }


def running(server: ServerProcess) -> float:
    """Requests that the engine still holds, after a moment to let cancelled ones go."""
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
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=int, default=30, help="per run, roughly")
    parser.add_argument("--soak-minutes", type=float, default=0)
    parser.add_argument("--soak-users", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-options", default="", help="passed to vllm serve")
    arguments = parser.parse_args()
    exit_on_signals()
    model, options = arguments.model.resolve(), arguments.serve_options.split()
    result: dict[str, Any] = {"rows": [], "kinds": {}}
    print(
        "| engine | users | requests | errors | tok/s | TTFT ms (p95) | TPOT ms | RSS |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for engine in ("dense", "rsparse"):
            log = folder / f"{engine}.log"
            with serve(model, log, engine == "rsparse", options) as server:
                bench(server, model, 4, 4, folder)  # warm
                for users in arguments.users:
                    before = resident_mib(server)
                    row = bench(server, model, users, arguments.seconds, folder)
                    row |= {"engine": engine, "rss_mib": [before, resident_mib(server)]}
                    result["rows"].append(row)
                    print(
                        f"| {engine} | {users} | {row['requests']} | {row['errors']} |"
                        f" {row['tokens_per_s']:.0f} | {row['ttft_ms']:.0f}"
                        f" ({row['ttft_p95_ms']:.0f}) | {row['tpot_ms']:.1f} |"
                        f" {before:.0f} to {row['rss_mib'][1]:.0f} MiB |",
                        flush=True,
                    )
                kinds = Kinds(server)
                outcome = {name: kinds.run(name) for name in kinds.all}
                outcome["left running"] = str(running(server))
                outcome["health"] = str(
                    httpx.get(f"{server.base_url}/health").status_code
                )
                result["kinds"][engine] = outcome
                if engine == "rsparse" and arguments.soak_minutes:
                    result["soak"] = soak(
                        server, arguments.soak_minutes, arguments.soak_users
                    )
                    result["soak"]["left running"] = running(server)
    dense, sparse = result["kinds"]["dense"], result["kinds"]["rsparse"]
    print("\n| request | dense | rsparse |\n|---|---|---|")
    for name in dense:
        print(f"| {name} | {dense[name]} | {sparse[name]} |")
    if "soak" in result:
        samples = result["soak"]["rss_mib"]
        print(f"\nsoak: {len(samples)} samples of RSS, first {samples[0]:.0f} MiB,")
        print(f"after a minute {samples[min(12, len(samples) - 1)]:.0f}, last")
        print(f"{samples[-1]:.0f}, largest {max(samples):.0f}")
        for name, count in sorted(result["soak"]["outcomes"].items()):
            print(f"{count:6} {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    errors = {row["engine"]: row["errors"] for row in result["rows"] if row["errors"]}
    return int(dense != sparse or errors.get("rsparse", 0) > errors.get("dense", 0))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
