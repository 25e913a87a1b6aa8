# SPDX-License-Identifier: Apache-2.0
"""Sparse alone, a drafter alone, both: tokens per second of a single user.

    PYTHONPATH=. python benchmarks/drafters.py MODEL PREPARED OUT.json --together
    PYTHONPATH=. python benchmarks/drafters.py MODEL PREPARED OUT.json --draft SMALL

MODEL is the dense model, PREPARED what ``prepare`` made of it. Each engine answers the
same prompts greedily, one at a time, with vLLM's defaults: without a drafter, with
n-gram lookup in prompt and answer (``--k`` tokens a draft), and with a draft model if
``--draft`` names one. A sparse model with a drafter runs with its own switch point,
where verification is dense, and (``all-sparse``) with k + 1, where it is sparse. On a
GPU there is ``piecewise`` too, the first of these without whole CUDA graphs of decode
steps: vLLM may capture those in multiples of k + 1 tokens only, to which it then pads
steps without drafts.

Correctness: the tokens of the dense and the ``all-sparse`` engines must be those of the
same engine without a drafter. Where they are not, the first that differs must be a near
tie there: in bf16 the sums of k + 1 tokens differ from those of one. Exit status 1
otherwise. Ties of a sparse engine are wider (``--sparse-tie``): rounding moves channels
across their thresholds, which changes the gap between two tokens ten times as much as
in a dense model, by 0.9 nats (root mean square, docs/operations.md). For sparse engines
this check finds gross errors only; the kernels' tests find the others. With the model's
own switch point tokens are partly the dense and partly the sparse model's; the answers
that equal each are counted.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from serve_jobs import EngineJob, run_jobs

from vllm_rsparse.bench.provenance import provenance
from vllm_rsparse.text_table import align
from vllm_rsparse.texts.prompts import read_prompts
from vllm_rsparse.texts.tokens import load_tokenizer

PROMPTS = Path(__file__).parent / "real_model" / "prompts.jsonl"
ALTERNATIVES = 10  # most likely tokens that are kept to judge a difference
KV_CACHE = 1 << 30  # bytes; engines that start together cannot measure what is free
# Words that a draft must repeat: of 2 to 4 tokens, vLLM's usual setting for code.
NGRAM: dict[str, Any] = {
    "method": "ngram",
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}

Row = dict[str, Any]


def drafters(args: argparse.Namespace) -> list[dict[str, Any]]:
    """vLLM's ``speculative_config`` of each drafter."""
    models = [{"method": "draft_model", "model": str(draft)} for draft in args.draft]
    return [
        {**method, "num_speculative_tokens": k}
        for k in args.k
        for method in (NGRAM, *models)
    ]


def engines(args: argparse.Namespace) -> list[EngineJob]:
    """Those without a drafter first; labels are ``target`` or ``target+drafter``."""
    prompts = read_prompts(args.prompts, load_tokenizer(args.model), "--prompts")
    ids = [p.ids for p in prompts if p.domain in args.domains][: args.limit]
    if not ids:
        sys.exit(f"{args.prompts}: no prompt of the domains {args.domains}")
    shared = {
        "prompts": ids,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "dtype": args.dtype,
        "eager": args.eager,
        "alternatives": ALTERNATIVES,
        "max_model_len": max(map(len, ids)) + args.tokens + 16,
    }
    graphs = torch.cuda.is_available() and not args.eager
    targets = ["dense", "sparse", *(["piecewise"] if graphs else []), "all-sparse"]
    plan: list[tuple[str, dict[str, Any] | None]] = [("dense", None), ("sparse", None)]
    plan += [(target, one) for one in drafters(args) for target in targets]
    options: dict[str, Any] = {"kv_cache_memory_bytes": KV_CACHE}
    if args.together:
        options["gpu_memory_utilization"] = 0.9 / len(plan)
        shared["lock"] = str(args.out.with_suffix(".lock"))
    jobs = []
    for target, drafter in plan:
        label, k = target, 0
        if drafter is not None:
            k = drafter["num_speculative_tokens"]
            name = Path(drafter["model"]).name if "model" in drafter else "ngram"
            label = f"{target}+{name}-{k}"
        engine = dict(options)
        if target == "piecewise":
            engine["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
        model = args.model if target == "dense" else args.prepared
        job = {**shared, "model": str(model), "drafter": drafter, "engine": engine}
        limit = k + 1 if target == "all-sparse" else None
        jobs.append(
            EngineJob(
                label,
                job,
                args.out.with_suffix(f".{label}.log"),
                {"max_sparse_tokens": limit},
                script="drafter_worker.py",
            )
        )
    return jobs


def row_of(label: str, result: Row, known: dict[str, Row]) -> Row:
    """A row of the JSON file.

    Args:
        label: of the engine.
        result: its worker's.
        known: results of the engines without a drafter, by label.
    """
    target, _, drafter = label.partition("+")
    row: Row = {
        "engine": label,
        "tokens_per_s": statistics.median(result["rates"]),
        "rates": result["rates"],
        "relative": statistics.median(result["rates"])
        / statistics.median(known["dense"]["rates"]),
        "answers": len(result["tokens"]),
        "tokens": sum(map(len, result["tokens"])),
        "repeatable": result["repeatable"],
    }
    if not drafter:
        return row
    counts = result["counts"]
    # Each answer's first token is the prefill's.
    repeats, answers = len(result["rates"]), len(result["tokens"])
    steps = counts["steps"] - repeats * answers
    row |= {
        "acceptance_rate": counts["accepted"] / max(counts["proposed"], 1),
        # As vLLM's log has it: with the token that verification itself gives.
        "mean_accepted_length": 1 + counts["accepted"] / max(counts["drafts"], 1),
        "tokens_per_step": repeats * (row["tokens"] - answers) / steps,
        "steps_with_drafts": counts["drafts"] / steps,
        "equal_to": {
            name: agreement(result["tokens"], reference)
            for name, reference in known.items()
        },
    }
    row["must_equal"] = {"dense": "dense", "all-sparse": "sparse"}.get(target)
    return row


def agreement(tokens: list[list[int]], reference: Row) -> dict[str, Any]:
    """Answers that are the reference's, and how near to a tie the others left it.

    Returns:
        The number of equal answers, the tokens before the first difference, and for
        each other answer by how many nats the reference preferred its own token there
        (None: by more than its most likely tokens show).
    """
    equal, prefix, gaps = 0, 0, []
    rows = zip(tokens, reference["tokens"], reference["likely"], strict=True)
    for found, wanted, likely in rows:
        pairs = zip(found, wanted, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if at is None:
            equal += len(found) == len(wanted)
            prefix += min(len(found), len(wanted))
            continue
        prefix += at
        other = likely[at].get(str(found[at]))
        gaps.append(None if other is None else likely[at][str(wanted[at])] - other)
    return {"answers": equal, "tokens": prefix, "gaps": gaps}


def unexplained(row: Row, ties: Mapping[str, float]) -> int:
    """Answers that must be another engine's, are not, and left it at no near tie.

    Args:
        row: an engine's.
        ties: nats of a near tie of each engine that others must equal.
    """
    target = row.get("must_equal")
    if target is None:
        return 0
    found, tie = row["equal_to"][target], ties[target]
    apart = row["answers"] - found["answers"]
    return apart - sum(gap is not None and gap <= tie for gap in found["gaps"])


def table(rows: list[Row]) -> str:
    """A line for each row."""
    lines = [["engine", "tokens/s", "x dense", "accepted", "length", "per step"]]
    lines[0] += ["= dense", "= sparse"]
    for row in rows:
        line = [row["engine"], f"{row['tokens_per_s']:.1f}", f"{row['relative']:.2f}"]
        if "equal_to" in row:
            line += [
                f"{row['acceptance_rate']:.2f}",
                f"{row['mean_accepted_length']:.2f}",
                f"{row['tokens_per_step']:.2f}",
                *(
                    f"{row['equal_to'][name]['answers']}/{row['answers']}"
                    for name in ("dense", "sparse")
                ),
            ]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    return align(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("prepared", metavar="PREPARED", type=Path)
    parser.add_argument("out", metavar="OUT.json", type=Path)
    parser.add_argument("--k", type=int, nargs="+", default=[3, 5], help="draft tokens")
    parser.add_argument("--draft", type=Path, nargs="+", default=[], help="models")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--domains", nargs="+", default=["code"])
    parser.add_argument("--limit", type=int, help="the first N prompts only")
    parser.add_argument("--tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--together", action="store_true", help="start all engines at the same time"
    )
    parser.add_argument("--tie", type=float, default=0.5, help="nats of a near tie")
    parser.add_argument(
        "--sparse-tie", type=float, default=2.0, help="the same of the sparse engines"
    )
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ties = {"dense": args.tie, "sparse": args.sparse_tie}
    facts = {**provenance(), "vllm": version("vllm"), "ties": ties}
    rows: list[Row] = []
    known: dict[str, Row] = {}
    for job, result in run_jobs(engines(args), args.together):
        if job.job["drafter"] is None:
            known[job.label] = result
        row = row_of(job.label, result, known)
        row["unexplained"] = unexplained(row, ties)
        rows.append(row)
        # After every engine, so that an interrupted run keeps its rows.
        args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)
    print(table(rows))
    wrong = sum(row["unexplained"] for row in rows)
    if wrong:
        print(f"{wrong} answers differ where the reference was at no near tie")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
