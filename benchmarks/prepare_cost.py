# SPDX-License-Identifier: Apache-2.0
"""What a recipe of ``prepare`` costs per decoder layer.

    PYTHONPATH=. python benchmarks/prepare_cost.py --shape llama-3-8b --data TEXT.txt
    PYTHONPATH=. python benchmarks/prepare_cost.py --shape llama-1b --tokens 512 \\
        --data TEXT.txt                                                        (CPU)

Prepares models of the shape with few layers (random weights, the bundled tokenizer and
therefore a small vocabulary) and takes the difference between the depths. This removes
the cost of reading the text and of the embedding, and leaves a layer's share of the
rest. ``evolutionary`` grows with the layers as the others do: it tries 112 candidates
at any depth. Random weights cost what trained ones cost: no recipe stops early.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, Shape
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_rsparse.bench.provenance import commit
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.recipes import RECIPES

TOKENIZER = Path(__file__).resolve().parents[1] / "tests/assets/pyllama-8m"


def write_model(directory: Path, shape: Shape, layers: int, device: str) -> None:
    """A bf16 checkpoint of ``layers`` decoder layers and the bundled tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def seconds(model: Path, recipe: str, args: argparse.Namespace) -> float:
    """Wall time of one preparation in this process."""
    output = model.parent / "prepared"
    shutil.rmtree(output, ignore_errors=True)
    options = PrepareOptions(
        model=str(model),
        output=output,
        sparsity=args.sparsity,
        calibration_data=(args.data,),
        recipe=recipe,
        samples=args.samples,
        tokens=args.tokens,
    )
    started = time.perf_counter()
    prepare(options)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--data", type=Path, required=True, help="calibration text")
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": commit(),
        "shape": args.shape,
        "windows": args.samples,
        "window": args.tokens,
        "rows": [],
    }
    fewer, more = sorted(args.layers)
    print(f"{result['device']}, {args.shape}, {args.samples} x {args.tokens} tokens")
    print("| recipe | " + " | ".join(f"{n} layers, s" for n in (fewer, more)), end="")
    print(
        " | s per layer | peak GiB on the device |\n|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        models = {n: Path(folder) / f"{n}" / "model" for n in (fewer, more)}
        for layers, path in models.items():
            device = "cuda" if cuda else "cpu"
            write_model(path, SHAPES[args.shape], layers, device)
        for recipe in args.recipes:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            # A recipe's first run includes loading and compiling on first use.
            seconds(models[fewer], recipe, args)
            took = [seconds(models[n], recipe, args) for n in (fewer, more)]
            row = {
                "recipe": recipe,
                "seconds": took,
                "seconds_per_layer": (took[1] - took[0]) / (more - fewer),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            }
            result["rows"].append(row)
            peak = f"{row['peak_gib']:.1f}" if cuda else "-"
            print(
                f"| `{recipe}` | {took[0]:.1f} | {took[1]:.1f} |"
                f" {row['seconds_per_layer']:.1f} | {peak} |",
                flush=True,
            )
            if args.json:  # after every row, so that an interrupted run keeps them
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
