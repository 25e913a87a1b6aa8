# SPDX-License-Identifier: Apache-2.0
"""How much a small error changes a model's predictions, sparse and dense.

    python benchmarks/rounding.py PREPARED --data heldout/*.txt

The same text is scored again with every weight of the linears multiplied by
1 + e N(0, 1), and in bfloat16. It prints the mean change of a token's log probability,
and the loss. A threshold is a step: a channel whose input crosses it shifts the output
by t |W_j|, however small the error was.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.windows import spread_windows

ERRORS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


class Scorer:
    """Log probabilities of one text by one model.

    Args:
        prepared: the model.
        windows: int64 [windows, positions].
        first: positions before it are dense, as a prompt is.
    """

    def __init__(
        self, prepared: PreparedDirectory, windows: Tensor, first: int
    ) -> None:
        self.prepared, self.windows, self.first = prepared, windows, first

    def score(self, dtype: torch.dtype, error: float, sparse: bool) -> Tensor:
        """[windows * (positions - first - 1)] of each token after ``first``."""
        model = SwitchableModel(self.prepared.checkpoint, torch.device("cpu"), dtype)
        model.use(self.prepared.artifact)
        generator = torch.Generator().manual_seed(0)
        for linear in model.linears.values():
            weight = linear.linear.weight.data
            noise = torch.randn(weight.shape, generator=generator)
            weight.mul_((1 + error * noise).to(dtype))
        found = []
        for window in self.windows.split(1):
            logits = model.logits(window, self.first, sparse)[:, :-1].float()
            targets = window[:, self.first + 1 :].unsqueeze(-1)
            found.append(logits.log_softmax(-1).gather(-1, targets).flatten())
        return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="directory written by prepare")
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=256, help="tokens of each")
    args = parser.parse_args()
    prepared = PreparedDirectory.open(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = read_sources(args.data, "--data")
    text = spread_windows(tokenizer, sources, args.window, args.windows)
    scorer = Scorer(prepared, text.windows, args.window // 2)
    print("| error | dense: change (loss) | sparse: change (loss) |")
    print("|---|---|---|")
    exact = [scorer.score(torch.float32, 0, sparse) for sparse in (False, True)]
    losses = [-scores.mean().item() for scores in exact]
    print(f"| none | 0 ({losses[0]:.4f}) | 0 ({losses[1]:.4f}) |")
    cases = [(f"weights * (1 + {e:g} N(0, 1))", torch.float32, e) for e in ERRORS]
    for name, dtype, error in [*cases, ("bfloat16", torch.bfloat16, 0.0)]:
        cells = []
        for sparse, reference in zip((False, True), exact, strict=True):
            scores = scorer.score(dtype, error, sparse)
            change = (scores - reference).abs().mean().item()
            cells.append(f"{change:.2g} ({-scores.mean().item():.4f})")
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)
    change = (exact[0] - exact[1]).abs().mean().item()
    print(f"\nsparse against dense: {change:.2g}")


if __name__ == "__main__":
    main()
