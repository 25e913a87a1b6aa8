# SPDX-License-Identifier: Apache-2.0
"""What ``best`` finds out by trying it on the calibration text."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_rsparse.prepare import search_trials
from vllm_rsparse.prepare.checkpoint import Checkpoint
from vllm_rsparse.prepare.journal import Journal
from vllm_rsparse.prepare.linears import Linear, find_linears
from vllm_rsparse.prepare.planned import Planned
from vllm_rsparse.prepare.recipe import LinearPlan, uniform
from vllm_rsparse.prepare.recipes import RECIPES, Recipe
from vllm_rsparse.prepare.search_trials import TRIED_WINDOWS, choose
from vllm_rsparse.prepare.snapshots import Snapshots
from vllm_rsparse.prepare.streaming import StreamedModel
from vllm_rsparse.prepare.texts import choose_windows, load_tokenizer, read_texts

SPARSITY, FIRST = 0.5, 8
TRIALS = ("a", "b", "half evenly", "corrected", "with factors")


def shares(linears: list[Linear], low: float) -> Mapping[str, LinearPlan]:
    """``low`` for the first half of the linears, as much more for the others."""
    half = len(linears) // 2
    return {
        one.name: LinearPlan(low if i < half else 2 * SPARSITY - low, 1.0)
        for i, one in enumerate(linears)
    }


@pytest.mark.parametrize(
    ("losses", "share", "corrected", "factors"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3], 0.3, False, False),
        ([2.0, 3.0, 2.1, 2.2, 2.3], 0.1, False, False),
        ([3.0, 2.0, 1.9, 2.0, 2.0], 0.4, False, False),
        ([3.0, 2.0, 1.9, 1.8, 1.9], 0.4, True, False),
        ([3.0, 2.0, 2.1, 1.8, 1.7], 0.3, True, True),
        # Less than the one before it is not enough.
        ([3.0, 2.0, 1.7, 1.9, 1.8], 0.4, False, False),
        ([3.0, 2.0, 1.9, float("inf"), 1.8], 0.4, False, True),
        # Equal losses: what was tried first, and nothing that costs bytes or a sum.
        ([2.0, 2.0, 2.0, 2.0, 2.0], 0.1, False, False),
    ],
)
def test_a_candidate_is_kept_if_it_loses_least(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    losses: list[float],
    share: float,
    corrected: bool,
    factors: bool,
) -> None:
    linears = [Linear(f"l{i}", i, "mlp.up_proj", (8, 16)) for i in range(4)]
    ways = {
        "a": lambda sparsity: shares(linears, 0.1),
        "b": lambda sparsity: shares(linears, 0.3),
    }
    # "half evenly" of 0.3 and 0.5 is 0.4.
    left = iter(losses)
    seen: list[tuple[str, int]] = []

    def run_sparse(*args: Any) -> None:
        seen.append((args[-1], len(args[3])))

    monkeypatch.setattr(search_trials, "run_sparse", run_sparse)
    monkeypatch.setattr(search_trials, "text_losses", lambda *args: [next(left)])
    asked: list[bool] = []

    def add_factors(*args: Any) -> dict[str, LinearPlan]:
        asked.append(args[-1])
        return {n: replace(p, rho=0.9) for n, p in args[4](args[5]).items()}

    monkeypatch.setattr(search_trials, "add_factors", add_factors)

    class Model:
        def embed(self, windows: Tensor) -> Tensor:
            return windows

    start = Planned(RECIPES["best"], {}, 1.0, {}, {"l0": torch.eye(8)}, FIRST)
    with Journal(tmp_path / "journal", {}) as journal:
        best = choose(
            Model(), linears, start, ways, {}, torch.zeros(20, 4), SPARSITY, 0,  # type: ignore[arg-type]
            journal, Snapshots(tmp_path / "search", {}),
        )  # fmt: skip
    assert seen == [(name, TRIED_WINDOWS) for name in TRIALS]
    assert best.trials == dict(zip(TRIALS, losses, strict=True))
    assert best.plans["l0"].sparsity == pytest.approx(share)
    assert best.plans["l0"].rho == (0.9 if factors else 1.0)
    assert best.recipe.correction is corrected
    assert best.recipe.linears == best.plans
    assert asked == [corrected]  # the factors' covariance depends on it


def test_on_the_reference_model(pyllama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(pyllama)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    linears = find_linears(checkpoint)[0]
    text = read_texts((Path(json.decoder.__file__),))
    windows = choose_windows(load_tokenizer(pyllama), text, 3, 80, 0, 4096).windows
    total = sum(n * k for n, k in (one.shape for one in linears))
    down = sum(n * k for n, k in (o.shape for o in linears if "down" in o.name))
    # down_proj bears sparsity best: to spare it costs the others dearly.
    without_down = {
        one.name: LinearPlan(
            0.0 if "down" in one.name else SPARSITY * total / (total - down), 1.0
        )
        for one in linears
    }
    ways = {
        "bad": lambda sparsity: without_down,
        "good": lambda sparsity: uniform(linears, sparsity, 1.0),
    }
    recipe = Recipe("two", "norm", "uniform", "sparse", True)
    start = Planned(recipe, {}, 1.0, {}, {}, FIRST)

    def chosen(members: list[Linear], journal: Journal) -> Planned:
        return choose(
            model, members, start, ways, {}, windows, SPARSITY, 0, journal,
            Snapshots(tmp_path / "search", {}),
        )  # fmt: skip

    path = tmp_path / "journal"
    with Journal(path, {}) as journal:
        best = chosen(linears, journal)
        assert best.plans == dict(uniform(linears, SPARSITY, 1.0))
        assert best.trials["bad"] > best.trials["good"] > 1
        # Known losses are not computed again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_trials, "run_sparse", None)
            assert chosen(linears, journal).trials == best.trials
    assert not path.exists()  # the run ended well
