# SPDX-License-Identifier: Apache-2.0
"""What CATS (arXiv 2404.08763) loses, under the protocol of `vllm-rsparse evaluate`.

CATS leaves attention and gate_proj dense and skips the neurons whose activated gate is
small: rows of up_proj and columns of down_proj. The artifact has thresholds on inputs
and cannot express skipped output rows, so CATS is this script and not a recipe of
`prepare`. Sparsity is counted in the same way: bytes of all seven linears.

    python benchmarks/peer_cats.py MODEL --sparsity 0.3 0.4 \\
        --calibration-data TEXT... --data HELDOUT...
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_rsparse.evaluate.measure import dense_positions
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.windows import spread_windows


class CatsMLP(nn.Module):
    """A gated MLP that drops neurons below a threshold from position ``first`` on."""

    def __init__(self, mlp: Any, first: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.first = first
        self.threshold = 0.0
        self.gates: list[Tensor] | None = None
        self.kept = self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp.act_fn(self.mlp.gate_proj(x))
        size = gate[:, self.first :].abs()
        if self.gates is not None:
            self.gates.append(size.flatten())
        elif self.threshold > 0:
            mask = size > self.threshold
            self.kept += int(mask.sum())
            self.seen += mask.numel()
            gate = gate.clone()
            gate[:, self.first :] *= mask
        return self.mlp.down_proj(gate * self.mlp.up_proj(x))


@torch.inference_mode()
def nll(model: nn.Module, windows: Tensor, first: int) -> float:
    """Mean negative log likelihood of the positions after ``first``, nats."""
    total = 0.0
    for window in windows.split(4):
        logs = (
            model(window, use_cache=False).logits[:, first:-1].float().log_softmax(-1)
        )
        labels = window[:, first + 1 :, None]
        total -= logs.gather(-1, labels).sum(dtype=torch.float64).item()
    return total / (len(windows) * (windows.shape[1] - first - 1))


def main() -> None:
    """Print one line per sparsity."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--sparsity", type=float, nargs="+", required=True)
    parser.add_argument("--calibration-data", type=Path, nargs="+", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration, held_out = (
        spread_windows(tokenizer, sources, args.window, args.windows).windows
        for sources in (
            read_sources(args.calibration_data, "--calibration-data"),
            read_sources(args.data, "--data"),
        )
    )
    first = dense_positions(args.window, 0.1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    ]
    total = sum(linear.weight.numel() for linear in linears)
    wrapped = []
    for layer in model.model.layers:
        layer.mlp = CatsMLP(layer.mlp, first)
        wrapped.append(layer.mlp)
    part = sum(
        mlp.mlp.up_proj.weight.numel() + mlp.mlp.down_proj.weight.numel()
        for mlp in wrapped
    )
    for mlp in wrapped:
        mlp.gates = []
    nll(model, calibration, first)
    gates = [torch.cat(mlp.gates or []).sort().values for mlp in wrapped]
    for mlp in wrapped:
        mlp.gates = None
    dense = nll(model, held_out, first)
    print(
        f"perplexity, dense {math.exp(dense):.3f}; up and down are {part / total:.3f}"
    )
    for sparsity in args.sparsity:
        drop = sparsity * total / part
        if drop >= 1:
            print(f"{sparsity:.2f}: more than all of up and down")
            continue
        for mlp, scores in zip(wrapped, gates, strict=True):
            mlp.threshold = scores[int(drop * (len(scores) - 1))].item()
            mlp.kept = mlp.seen = 0
        ratio = math.exp(nll(model, held_out, first) - dense)
        kept = sum(mlp.kept for mlp in wrapped) / sum(mlp.seen for mlp in wrapped)
        achieved = (1 - kept) * part / total
        print(
            f"{sparsity:.2f}: perplexity over dense {ratio:.3f}, achieved"
            f" {achieved:.3f}"
        )


if __name__ == "__main__":
    main()
