# SPDX-License-Identifier: Apache-2.0
"""KL divergence on answers against the bytes read: bases, recipes and sparsities.

    PYTHONPATH=. python benchmarks/real_model/frontier.py MODEL OUT.json --work DIR \\
        --bases bf16 fp8 int4 planes --sparsity 0.3 0.5 --bits 4.2 3.2

Every row compares with the answers and the logits of MODEL itself. ``fp8`` (a scale per
output channel), ``int4`` (symmetric, 128 input channels a group, or 64 with
``int4-g64``) and ``int3`` (as int4, dense only) are MODEL rounded to nearest, without
calibration; ``planes`` is MODEL quantized to int8-planes while it loads. Without
--calibration-data the model writes its own text, once for all rows. DIR keeps the
bases, that text and the answers. OUT.json is rewritten after every row; rows that it
has already are not measured again.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import torch
from bases import BASES

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.artifact.tensors import ARTIFACT_DIR
from vllm_rsparse.bench.provenance import commit
from vllm_rsparse.evaluate.chats import answers_of, by_domain
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.evaluate.measure import Loss, Passage, measure_passages
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare_all
from vllm_rsparse.prepare.text import CALIBRATION_NAME
from vllm_rsparse.text_table import align
from vllm_rsparse.texts.prompts import read_prompts
from vllm_rsparse.texts.tokens import load_tokenizer

PROMPTS = Path(__file__).with_name("prompts.jsonl")
DENSE = "dense"
# Prepared without data, for the text that the model writes.
OWN_TEXT = "own-text"

Row = dict[str, Any]


class Frontier:
    """Measures rows against one reference model.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.reference = self._load(args.model)
        prompts = read_prompts(args.prompts, load_tokenizer(args.model), "--prompts")
        args.work.mkdir(parents=True, exist_ok=True)
        answers = answers_of(
            self.reference, prompts, args.answer_tokens, args.work / "answers.json"
        )
        self.domains: dict[str, list[Passage]] = by_domain(answers)

    def _load(self, model: Path) -> SwitchableModel:
        return SwitchableModel(Checkpoint(model), self.device, torch.bfloat16)

    def rows(self, name: str, known: Sequence[Row]) -> Iterator[Row]:
        """The rows of a base that are not known yet."""
        done = {(row["base"], row["recipe"], row["target"]) for row in known}
        wanted = {
            recipe: [
                target
                for target in targets
                if (name, Path(recipe).stem, target) not in done
            ]
            for recipe, targets in self._wanted(name).items()
        }
        if not any(wanted.values()):
            return
        base = BASES[name]
        directory = base.directory(self.args.model, self.args.work / name)
        model = self.reference if directory == self.args.model else None
        for recipe, targets in wanted.items():
            if not targets:
                continue
            prepared: list[PreparedDirectory | None] = [None]
            started = time.monotonic()
            if recipe != DENSE:
                prepared = self._prepare(directory, name, recipe, targets)
            seconds = time.monotonic() - started
            model = model or self._load(directory)
            losses = {
                domain: measure_passages(model, prepared, passages, self.reference)
                for domain, passages in self.domains.items()
            }
            for index, (target, one) in enumerate(zip(targets, prepared, strict=True)):
                mine = {domain: each[index] for domain, each in losses.items()}
                share = seconds / len(targets)
                yield row_of(name, Path(recipe).stem, target, share, mine, one)

    def _wanted(self, name: str) -> dict[str, list[float]]:
        """The targets of each recipe, and of the base itself unless it is MODEL."""
        base = BASES[name]
        if base.in_planes:
            return dict.fromkeys(self.args.recipes, self.args.bits)
        if name == "bf16":
            return dict.fromkeys(self.args.recipes, self.args.sparsity)
        sparse = {} if base.integer_bits else self.args.recipes
        return {DENSE: [0.0]} | dict.fromkeys(sparse, self.args.sparsity)

    def _prepare(
        self, directory: Path, name: str, recipe: str, targets: Sequence[float]
    ) -> list[PreparedDirectory | None]:
        """One directory for each target; those of a sparsity are made in one run."""
        output = self.args.work / f"{name}-{Path(recipe).stem}"
        common = partial(
            PrepareOptions,
            model=str(directory),
            calibration_data=tuple(self.args.calibration_data) or self._own_text(),
            recipe=recipe,
            samples=self.args.samples,
            tokens=self.args.tokens,
            weights=BASES[name].weights,
            overwrite=True,
        )
        if BASES[name].in_planes:
            runs = [
                common(
                    output=output.with_name(f"{output.name}-{bits:g}"),
                    sparsity=None,
                    bits=bits,
                )
                for bits in targets
            ]
        else:
            runs = [common(output=output, sparsity=tuple(targets))]
        for options in runs:
            prepare_all(options)
        return [
            PreparedDirectory.open(output)
            for options in runs
            for output in options.outputs
        ]

    def _own_text(self) -> tuple[Path, ...]:
        """Text that MODEL wrote, made by the cheapest recipe if it is not there."""
        directory = self.args.work / OWN_TEXT
        if not directory.exists():
            prepare_all(
                PrepareOptions(
                    model=str(self.args.model),
                    output=directory,
                    sparsity=0.5,
                    recipe="teal",
                    samples=self.args.samples,
                    tokens=self.args.tokens,
                )
            )
        return (directory / ARTIFACT_DIR / CALIBRATION_NAME,)


def row_of(
    base: str,
    recipe: str,
    target: float,
    seconds: float,
    losses: dict[str, Loss],
    prepared: PreparedDirectory | None,
) -> Row:
    """A row of the JSON file."""
    kl = {domain: loss.kl_divergence or 0.0 for domain, loss in losses.items()}
    tokens = sum(loss.tokens for loss in losses.values())
    achieved = sum(x.achieved_sparsity * x.tokens for x in losses.values()) / tokens
    method = None
    if prepared is not None:
        method = prepared.artifact.info.provenance["method"]
    return {
        "base": base,
        "recipe": recipe,
        "target": target,
        "achieved": achieved,
        "bits": BASES[base].bits * (1 - achieved),
        "kl_mean": sum(kl.values()) / len(kl),
        "kl_worst": max(kl.values()),
        "prepare_seconds": round(seconds, 1),
        "method": method,
        "domains": {domain: asdict(loss) for domain, loss in losses.items()},
    }


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    domains = list(rows[0]["domains"]) if rows else []
    lines = [["base", "recipe", "target", "bits", "KL", *domains, "top-1", "s"]]
    for row in rows:
        losses = row["domains"].values()
        top = sum(loss["top1_agreement"] for loss in losses) / len(losses)
        lines.append(
            [
                row["base"],
                row["recipe"],
                f"{row['target']:.2f}",
                f"{row['bits']:.2f}",
                f"{row['kl_mean']:.4f}",
                *(f"{loss['kl_divergence']:.4f}" for loss in losses),
                f"{top:.3f}",
                f"{row['prepare_seconds']:.0f}",
            ]
        )
    return align(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", type=Path, help="made by fetch.py")
    parser.add_argument("out", metavar="OUT.json", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--calibration-data", type=Path, nargs="+", default=[])
    parser.add_argument("--bases", nargs="+", choices=BASES, default=["bf16"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument(
        "--bits", type=float, nargs="+", default=[4.2, 3.2], help="of planes"
    )
    parser.add_argument(
        "--recipes", nargs="+", default=["best", "wina"], help="names or files"
    )
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=2048, help="of each of those")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--answer-tokens", type=int, default=256)
    args = parser.parse_args()
    document: dict[str, Any] = {"rows": []}
    if args.out.exists():
        document = json.loads(args.out.read_text())
    frontier = Frontier(args)
    on_cuda = frontier.device.type == "cuda"
    document["machine"] = {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": commit(),
    }
    document["calibration"] = {
        "files": [file.name for file in args.calibration_data],
        "windows": args.samples,
        "window": args.tokens,
    }
    for base in args.bases:
        for row in frontier.rows(base, document["rows"]):
            document["rows"].append(row)
            args.out.write_text(json.dumps(document, indent=1) + "\n")
            print(table([row]), flush=True)
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
