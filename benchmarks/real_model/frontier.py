# SPDX-License-Identifier: Apache-2.0
"""KL divergence on answers against the bytes read: bases, recipes and sparsities.

    PYTHONPATH=. python benchmarks/real_model/frontier.py MODEL OUT.json --work DIR \\
        --calibration-data TEXT --bases bf16 fp8 int4 --sparsity 0.3 0.5

Every row compares with the answers and the logits of MODEL itself. ``fp8`` (a scale per
output channel) and ``int4`` (symmetric, 128 input channels a group, or 64 with
``int4-g64``) are MODEL rounded to nearest, without calibration. DIR keeps the bases and
the answers. OUT.json is rewritten after every row; rows that it has already are not
measured again.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import torch

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.bench.provenance import commit
from vllm_rsparse.evaluate.chats import answers_of, by_domain
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.evaluate.measure import Loss, Passage, measure_passages
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare_all
from vllm_rsparse.testing.quantized import write_quantized
from vllm_rsparse.text_table import align
from vllm_rsparse.texts.prompts import read_prompts
from vllm_rsparse.texts.tokens import load_tokenizer

PROMPTS = Path(__file__).with_name("prompts.jsonl")
LAYOUTS = {
    "bf16": None,
    "fp8": "fp8-channel",
    "int4": "w4a16-g128",
    "int4-g64": "w4a16-g64",
}
DENSE = "dense"

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

    def rows(self, base: str, known: Sequence[Row]) -> Iterator[Row]:
        """The rows of a base that are not known yet."""
        done = {(row["base"], row["recipe"], row["sparsity"]) for row in known}
        wanted = {
            recipe: [
                sparsity
                for sparsity in sparsities
                if (base, Path(recipe).stem, sparsity) not in done
            ]
            for recipe, sparsities in self._wanted(base).items()
        }
        if not any(wanted.values()):
            return
        directory = self._base(base)
        model = self.reference if directory == self.args.model else None
        for recipe, sparsities in wanted.items():
            if not sparsities:
                continue
            prepared: list[PreparedDirectory | None] = [None]
            started = time.monotonic()
            if recipe != DENSE:
                prepared = self._prepare(directory, base, recipe, sparsities)
            seconds = time.monotonic() - started
            model = model or self._load(directory)
            losses = {
                domain: measure_passages(model, prepared, passages, self.reference)
                for domain, passages in self.domains.items()
            }
            for index, (sparsity, one) in enumerate(
                zip(sparsities, prepared, strict=True)
            ):
                mine = {domain: each[index] for domain, each in losses.items()}
                share = seconds / len(sparsities)
                yield row_of(base, Path(recipe).stem, sparsity, share, mine, one)

    def _wanted(self, base: str) -> dict[str, list[float]]:
        """The sparsities of each recipe, and of the base itself unless it is MODEL."""
        dense = {DENSE: [0.0]} if LAYOUTS[base] is not None else {}
        return dense | dict.fromkeys(self.args.recipes, self.args.sparsity)

    def _base(self, base: str) -> Path:
        """The directory of a base model, written unless it is there."""
        layout = LAYOUTS[base]
        if layout is None:
            return self.args.model
        target = self.args.work / base
        if not target.exists():
            write_quantized(self.args.model, target, layout)
        return target

    def _prepare(
        self, directory: Path, base: str, recipe: str, sparsities: Sequence[float]
    ) -> list[PreparedDirectory | None]:
        """One directory for each sparsity, all of one run."""
        options = PrepareOptions(
            model=str(directory),
            output=self.args.work / f"{base}-{Path(recipe).stem}",
            sparsity=tuple(sparsities),
            calibration_data=tuple(self.args.calibration_data),
            recipe=recipe,
            samples=self.args.samples,
            tokens=self.args.tokens,
            overwrite=True,
        )
        prepare_all(options)
        return [PreparedDirectory.open(output) for output in options.outputs]


def row_of(
    base: str,
    recipe: str,
    sparsity: float,
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
        "sparsity": sparsity,
        "achieved": achieved,
        "kl_mean": sum(kl.values()) / len(kl),
        "kl_worst": max(kl.values()),
        "prepare_seconds": round(seconds, 1),
        "method": method,
        "domains": {domain: asdict(loss) for domain, loss in losses.items()},
    }


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    domains = list(rows[0]["domains"]) if rows else []
    lines = [["base", "recipe", "sparsity", "achieved", "KL", *domains, "top-1", "s"]]
    for row in rows:
        losses = row["domains"].values()
        top = sum(loss["top1_agreement"] for loss in losses) / len(losses)
        lines.append(
            [
                row["base"],
                row["recipe"],
                f"{row['sparsity']:.2f}",
                f"{row['achieved']:.3f}",
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
    parser.add_argument("--calibration-data", type=Path, nargs="+", required=True)
    parser.add_argument("--bases", nargs="+", choices=LAYOUTS, default=["bf16"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument(
        "--recipes", nargs="+", default=["best", "wina"], help="names or files"
    )
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of those")
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
