# SPDX-License-Identifier: Apache-2.0
"""INT4 linears on a CPU: vLLM's own kernel against the sparse route, in turns.

    python benchmarks/cpu_int4.py --shape llama-3.2-1b --sparsity 0 0.4 0.5

Both read the same random codes with scales of groups of 128, each in its own layout,
and have passed the gate against the float32 definition. Calls rotate over more memory
than the caches hold. ``bench_serve.py --weights int4`` measures whole engines; this
leaves out what both share, and other programs disturb both sides alike.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops

from vllm_rsparse.bench.baselines import Calls
from vllm_rsparse.bench.gate import check, exact_dense
from vllm_rsparse.bench.inputs import Inputs, bytes_read, kept_fractions, rotation
from vllm_rsparse.bench.layers import SHAPES, Layer
from vllm_rsparse.bench.measure import sparse_calls
from vllm_rsparse.bench.provenance import provenance
from vllm_rsparse.bench.timing import time_rounds
from vllm_rsparse.formats.nibbles import PER_WORD
from vllm_rsparse.op.backends import Backend, resolve_backend

# vLLM stores 16 output channels of all input channels one after another.
_BLOCK_WORDS = 16 // PER_WORD


def vllm_calls(inputs: list[Inputs]) -> Calls:
    """vLLM's CPU kernel for weights of four bits, as its linear layers call it."""
    calls = [partial(_vllm_linear, one.x, *_vllm_layout(one)) for one in inputs]
    check(calls[0](), exact_dense(inputs[0]), "vLLM's kernel", 2**-6)
    return calls


def _vllm_linear(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    return vllm_ops.cpu_gemm_wna16(x, words, scales, None, None, PER_WORD, "vec")


def _vllm_layout(one: Inputs) -> tuple[Tensor, Tensor]:
    weight = one.operands.weight
    assert weight.scales is not None
    blocks = weight.data.view(weight.k, -1, _BLOCK_WORDS).permute(1, 0, 2)
    return blocks.reshape(-1, weight.k * _BLOCK_WORDS).contiguous(), weight.scales


def measure(layer: Layer, tokens: int, sparsities: list[float]) -> dict[str, Any]:
    """Milliseconds of one layer: vLLM's, then ours at each sparsity."""
    inputs = rotation(layer, tokens, torch.bfloat16, "cpu")
    groups = [vllm_calls(inputs)]
    kept = {}
    moved = {}
    for sparsity in sparsities:
        budget = layer.with_budget(sparsity, 1.0)
        made = [one.with_budget(budget) for one in inputs]
        groups.append(sparse_calls(made, Backend.CPU))
        fractions = kept_fractions(made)
        kept[sparsity] = round(fractions[0], 4)
        moved[sparsity] = bytes_read(made, fractions)
    vllm, *ours = time_rounds(groups, rounds=25)
    return {
        "layer": layer.name,
        "n": layer.n,
        "k": layer.k,
        "tokens": tokens,
        "vllm_us": round(vllm.median, 1),
        "vllm_gbps": round(inputs[0].operands.weight.nbytes / vllm.median / 1e3, 1),
        "sparse": {
            sparsity: {
                "us": round(timing.median, 1),
                "kept": kept[sparsity],
                "gbps": round(moved[sparsity] / timing.median / 1e3, 1),
            }
            for sparsity, timing in zip(sparsities, ours, strict=True)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.0, 0.4, 0.5])
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    if torch.cuda.is_available():
        sys.exit("cpu_int4.py times the kernels of a CPU; unset the CUDA devices")
    resolve_backend("cpu", "cpu")
    rows = []
    for tokens in args.tokens:
        of_layer = []
        for layer in SHAPES[args.shape]:
            stored = layer.stored_as("int4", 128)
            of_layer.append(measure(stored, tokens, args.sparsity))
            print(json.dumps(of_layer[-1]), flush=True)
        rows += of_layer
        vllm = sum(row["vllm_us"] for row in of_layer)
        for sparsity in args.sparsity:
            ours = sum(row["sparse"][sparsity]["us"] for row in of_layer)
            print(
                f"{tokens} tokens, sparsity {sparsity}: {vllm / 1e3:.2f} ms vLLM,"
                f" {ours / 1e3:.2f} sparse, {vllm / ours:.2f}x"
            )
    if args.output:
        document = {**provenance(), "shape": args.shape, "rows": rows}
        args.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
