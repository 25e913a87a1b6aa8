# SPDX-License-Identifier: Apache-2.0
"""``evaluate`` against an independent computation of the same protocol."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_rsparse.artifact.tensors import file_sha256
from vllm_rsparse.testing.cases import one_linear

from .prepared import constant, figures, mixed

WINDOW = 40
FIRST = 4  # int(0.1 * WINDOW)
Tensors = dict[str, dict[str, Tensor]]


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }


@pytest.fixture
def base(pyllama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(pyllama, dtype=torch.float32).eval()


def evaluate(directory: Path, text: Path, *options: str) -> dict[str, Any]:
    return figures(directory, "--data", text, "--window", str(WINDOW), *options)


class Independent:
    """The protocol once more, token by token of the formula, through the reference."""

    def __init__(self, base: Any, tensors: Tensors) -> None:
        self.base = base
        self.kept = dict.fromkeys(tensors, 0)
        self.sparse = False
        for name, module in linears_of(base).items():
            module.forward = self._forward(module, name, tensors[name])

    def _forward(
        self, module: nn.Linear, name: str, mine: dict[str, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = x @ module.weight.T
            if self.sparse:
                tail = x[0, FIRST:]
                y[0, FIRST:] = one_linear(tail, module.weight, mine)
                self.kept[name] += int((tail.abs() > mine["thresholds"]).sum())
            return y

        return forward

    @torch.inference_mode()
    def figures(self, windows: Tensor) -> dict[str, float]:
        nll = {False: 0.0, True: 0.0}
        kl = agree = 0.0
        for window in windows:
            logs = {}
            for self.sparse in (False, True):
                logits = self.base(window[None]).logits[0, FIRST:-1].double()
                logs[self.sparse] = logits.log_softmax(-1)
                rows = torch.arange(len(logits))
                picked = logs[self.sparse][rows, window[FIRST + 1 :]]
                nll[self.sparse] -= picked.sum().item()
            dense, sparse = logs[False], logs[True]
            kl += (dense.exp() * (dense - sparse)).sum().item()
            agree += (dense.argmax(-1) == sparse.argmax(-1)).sum().item()
        tokens = len(windows) * (WINDOW - FIRST - 1)
        return {
            "perplexity_dense": math.exp(nll[False] / tokens),
            "perplexity_sparse": math.exp(nll[True] / tokens),
            "kl_divergence": kl / tokens,
            "top1_agreement": agree / tokens,
            "tokens": tokens,
        }


@pytest.mark.parametrize("version", [1, 2])
def test_figures_agree_with_an_independent_computation(
    write_prepared: Any, base: Any, pyllama: Path, held_out: Path, version: int
) -> None:
    tensors: Tensors = {}

    def remember(name: str, n: int, k: int) -> dict[str, Tensor]:
        tensors[name] = mixed(name, n, k)
        return tensors[name]

    document = evaluate(write_prepared("mixed", remember, version), held_out)
    ids = AutoTokenizer.from_pretrained(pyllama)(
        held_out.read_text(), add_special_tokens=False
    )["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    independent = Independent(base, tensors)
    expected = independent.figures(windows)
    result = document["results"][0]
    # float32 sums in another order, through four layers.
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-4), name
    assert result["ratio"] > 1.01, "the artifact must hurt for this test to tell"

    read = dense = 0.0
    sparse_tokens = len(windows) * (WINDOW - FIRST)
    for name, module in linears_of(base).items():
        n, k = module.weight.shape
        rank = 3 if name.endswith("q_proj") else 0
        dense += n * k
        # A score at the threshold may fall to either side: 1e-4 below.
        read += independent.kept[name] / sparse_tokens * n + rank * (n + k)
    assert result["achieved_sparsity"] == pytest.approx(1 - read / dense, abs=1e-4)
    assert document["protocol"]["windows"] == len(windows)


def test_thresholds_that_keep_all_lose_nothing(
    write_prepared: Any, held_out: Path
) -> None:
    result = evaluate(write_prepared("all", constant(-1.0)), held_out)["results"][0]
    assert result["ratio"] == 1.0
    assert result["kl_divergence"] == 0.0
    assert result["top1_agreement"] == 1.0
    assert result["achieved_sparsity"] == 0.0


def test_thresholds_that_keep_nothing(write_prepared: Any, held_out: Path) -> None:
    directory = write_prepared("none", constant(math.inf))
    result = evaluate(directory, held_out)["results"][0]
    assert result["achieved_sparsity"] == 1.0
    assert set(result["by_kind"].values()) == {1.0}
    assert result["perplexity_sparse"] > 10 * result["perplexity_dense"]


def test_compare_gives_what_separate_runs_give(
    write_prepared: Any, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_prepared("one", mixed), write_prepared("two", constant(0.2))
    together = evaluate(one, held_out, "--compare", str(two))["results"]
    table = capsys.readouterr().out
    apart = [evaluate(path, held_out)["results"][0] for path in (one, two)]
    assert together == apart
    assert table.splitlines()[0].split() == ["one", "two"]


def test_windows_are_limited_and_spread(write_prepared: Any, held_out: Path) -> None:
    directory = write_prepared("few", constant(0.1))
    protocol = evaluate(directory, held_out, "--max-windows", "2")["protocol"]
    assert protocol["windows"] == 2
    assert protocol["windows_available"] > 2


def test_plot_of_loss_against_bytes(write_prepared: Any, held_out: Path) -> None:
    out = held_out.with_name("loss.png")
    other = write_prepared("other", constant(0.5))
    evaluate(
        write_prepared("one", constant(0.2)), held_out, "--compare", str(other),
        "--plot", str(out), "--max-windows", "1",
    )  # fmt: skip
    assert out.read_bytes().startswith(b"\x89PNG")


def test_provenance_of_the_figures(write_prepared: Any, held_out: Path) -> None:
    directory = write_prepared("few", constant(0.1))
    document = evaluate(directory, held_out, "--max-windows", "1")
    assert document["data"][0]["sha256"] == file_sha256(held_out)
    assert set(document["versions"]) == {"vllm_rsparse", "torch", "transformers"}
