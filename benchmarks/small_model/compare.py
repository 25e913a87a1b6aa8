# SPDX-License-Identifier: Apache-2.0
"""Prepare a model with every recipe at 30 to 70% and measure what each loses.

    PYTHONPATH=.:benchmarks python benchmarks/small_model/compare.py TEXT MODEL OUT.json
    ... TEXT tests/assets/pyllama-8m OUT.json --domains code --dtype float32 \\
        --samples 32 --tokens 512 --windows 32 --seconds 3600

TEXT has ``calibration-DOMAIN.txt`` and ``heldout-DOMAIN.txt`` for every domain. Worker
processes prepare, the most important jobs first; this process evaluates each result on
all held-out texts, and rewrites OUT.json after every row. When the time is up, the
table shows the finished rows, and OUT.json lists the missing ones. The second command
makes the table of the bundled model in docs/accuracy.md.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, here and in the workers

import torch
from limits import time_limit
from transformers import AutoTokenizer

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.bench.provenance import commit
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.evaluate.measure import dense_positions, measure
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.files import recipe_json
from vllm_rsparse.prepare.recipe.recipes import RECIPES
from vllm_rsparse.text_table import align
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.windows import spread_windows

START = time.monotonic()
DOMAINS = ("code", "english")
SPARSITIES = (0.5, 0.4, 0.6, 0.3, 0.7)  # most wanted first
# wina and teal overshoot their target. Calibrated on the sparse model's activations
# they meet it: those are the rows to compare with `best` at equal bytes.
SPARSE = {f"{name}-sparse": name for name in ("wina", "teal")}
NAMES = ("best", "wina-sparse", "wina", "teal-sparse", "teal", "uniform", "greedy")
WINDOW, DENSE_FRACTION = 512, 0.1  # of the evaluation
LEAVING = 5  # seconds kept for the last table


@dataclass(frozen=True)
class Job:
    """One preparation: which recipe, at what sparsity, calibrated on which domain."""

    recipe: str
    sparsity: float
    calibrated_on: str = "code"


@dataclass(frozen=True)
class Setting:
    """What all jobs have in common: folders (``work`` is temporary), windows."""

    text: Path
    model: Path
    work: Path
    samples: int
    tokens: int
    dtype: str

    def recipe(self, name: str) -> str:
        """What ``prepare --recipe`` takes: a name, or the file of a variant."""
        return str(self.work / f"{name}.json") if name in SPARSE else name

    def prepared(self, job: Job) -> Path:
        """The directory that a job writes."""
        return self.work / f"{job.recipe}-{job.sparsity}-{job.calibrated_on}"


def all_jobs(recipes: Sequence[str], domains: Sequence[str]) -> list[Job]:
    """50% first, then calibration on the other domains, then the other sparsities."""
    jobs = [Job(name, s, domains[0]) for s in SPARSITIES for name in recipes]
    first = len(recipes)
    other = [Job(name, 0.5, text) for text in domains[1:] for name in recipes[:2]]
    return jobs[:first] + other + jobs[first:]


def prepare_one(task: tuple[Job, Setting]) -> tuple[Job, float, str | None]:
    """Run a job in a worker: the job, its seconds, and what went wrong if it did."""
    job, setting = task
    started = time.monotonic()
    try:
        prepare(
            PrepareOptions(
                model=str(setting.model),
                output=setting.prepared(job),
                sparsity=job.sparsity,
                calibration_data=(
                    setting.text / f"calibration-{job.calibrated_on}.txt",
                ),
                recipe=setting.recipe(job.recipe),
                samples=setting.samples,
                tokens=setting.tokens,
                dtype=setting.dtype,
            )
        )
    except Exception as error:  # the other rows go on; this one says why it is missing
        return job, 0.0, f"{type(error).__name__}: {error}"
    return job, time.monotonic() - started, None


class Evaluator:
    """Dense against sparse on all held-out texts, with one copy of the model."""

    def __init__(
        self,
        setting: Setting,
        domains: Sequence[str],
        device: torch.device,
        windows: int,
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(setting.model)
        files = {domain: setting.text / f"heldout-{domain}.txt" for domain in domains}
        self.texts = {
            domain: spread_windows(
                tokenizer, read_sources([file], "--data"), WINDOW, windows
            )
            for domain, file in files.items()
        }
        self.device = device
        on_cuda = device.type == "cuda"
        default = torch.bfloat16 if on_cuda else torch.float32
        self.dtype = getattr(torch, setting.dtype, default)
        self.model: SwitchableModel | None = None

    def __call__(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Figures by domain."""
        prepared = PreparedDirectory.open(directory)
        if self.model is None:
            self.model = SwitchableModel(prepared.checkpoint, self.device, self.dtype)
        first = dense_positions(WINDOW, DENSE_FRACTION)
        figures = {}
        for domain, text in self.texts.items():
            (loss,) = measure(self.model, [prepared], text.windows, first)
            figures[domain] = {**asdict(loss), "directory": directory.name}
        return figures


def table(
    rows: Sequence[dict[str, Any]], jobs: Sequence[Job], domains: Sequence[str]
) -> str:
    """Perplexity over dense (achieved sparsity), a part for each held-out domain."""
    cells = {
        (row["recipe"], row["calibrated_on"], row["sparsity"]): row for row in rows
    }
    labels = list(dict.fromkeys((job.recipe, job.calibrated_on) for job in jobs))
    columns = sorted(SPARSITIES)
    parts = []
    for domain in domains:
        dense = f"{rows[0][domain]['perplexity_dense']:.3f}" if rows else "-"
        lines = [
            [f"{domain}, dense {dense}", "calibrated on"]
            + [f"{sparsity:.0%}" for sparsity in columns]
        ]
        for recipe, text in labels:
            found = [cells.get((recipe, text, sparsity)) for sparsity in columns]
            lines.append([recipe, text, *(_cell(row, domain) for row in found)])
        parts.append(align(lines))
    return "\n\n".join(parts)


def _cell(row: dict[str, Any] | None, domain: str) -> str:
    if row is None:
        return "-"
    return f"{row[domain]['ratio']:.3f} ({row[domain]['achieved_sparsity']:.3f})"


def compare(
    setting: Setting,
    evaluate: Evaluator,
    jobs: Sequence[Job],
    workers: int,
    result: dict[str, Any],
    out: Path,
) -> None:
    """Fill ``result`` row by row and write it to ``out`` after each."""
    for name, base in SPARSE.items():
        recipe = replace(RECIPES[base], name=name, activations="sparse")
        Path(setting.recipe(name)).write_text(recipe_json(recipe))
    tasks = [(job, setting) for job in jobs]
    # Leaving the block ends the workers, also when the time is over.
    with get_context("spawn").Pool(workers) as pool:
        for job, seconds, error in pool.imap_unordered(prepare_one, tasks):
            if error is not None:
                result["failed"].append({**asdict(job), "error": error})
                print(f"{job}: {error}", flush=True)
            else:
                directory = setting.prepared(job)
                figures = evaluate(directory)
                took = round(seconds, 2)
                provenance = PreparedDirectory.open(directory).artifact.info.provenance
                result["rows"].append(
                    {
                        **asdict(job),
                        "prepare_seconds": took,
                        "method": provenance["method"],
                        **figures,
                    }
                )
                shown = ", ".join(
                    f"{d} {_cell(result['rows'][-1], d)}" for d in figures
                )
                print(f"{_now():6.1f} s  {job}: {shown}, {took} s", flush=True)
            result["missing"].remove(asdict(job))
            _write(result, out)


def _write(result: dict[str, Any], out: Path) -> None:
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)


def _read_json(file: Path) -> Any:
    """Its content; None where a model or a text was not made by these scripts."""
    return json.loads(file.read_text()) if file.exists() else None


def _now() -> float:
    return time.monotonic() - START


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", type=Path, help="made by text.py")
    parser.add_argument("model", metavar="MODEL", type=Path, help="made by train.py")
    parser.add_argument("out", metavar="OUT.json", type=Path)
    parser.add_argument("--seconds", type=float, default=180, help="after imports")
    parser.add_argument(
        "--workers", type=int, default=4, help="preparations at once; 1 to time them"
    )
    parser.add_argument(
        "--windows", type=int, default=96, help="of 512 tokens, of each held-out text"
    )
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of those")
    parser.add_argument(
        "--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 on CPU"
    )
    parser.add_argument(
        "--domains", nargs="+", default=DOMAINS, help="calibrate on the first"
    )
    parser.add_argument(
        "--recipes", nargs="+", default=NAMES, help="names, most wanted first"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    jobs = all_jobs(args.recipes, args.domains)
    result: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "commit": commit(),
        },
        "workers": args.workers,
        "calibration": {"windows": args.samples, "window": args.tokens},
        "dtype": args.dtype,
        "evaluation": {"windows": args.windows, "window": WINDOW},
        "training": _read_json(args.model / "training.json"),
        "text": _read_json(args.text / "text.json"),
        "rows": [],
        "failed": [],
        "missing": [asdict(job) for job in jobs],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        setting = Setting(
            args.text, args.model, Path(work), args.samples, args.tokens, args.dtype
        )
        try:
            with time_limit(args.seconds - LEAVING - _now()):
                evaluate = Evaluator(setting, args.domains, device, args.windows)
                compare(setting, evaluate, jobs, args.workers, result, args.out)
        except TimeoutError as error:
            print(f"{error}; {len(result['missing'])} rows are missing")
    _write(result, args.out)
    print(table(result["rows"], jobs, args.domains))
    return 1 if result["failed"] or result["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
