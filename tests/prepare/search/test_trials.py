# SPDX-License-Identifier: Apache-2.0
"""What ``best`` finds out by trying it on the calibration text."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.model.texts import choose_windows, load_tokenizer, read_texts
from vllm_rsparse.prepare.recipe.plan import LinearPlan, uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import RECIPES, Recipe
from vllm_rsparse.prepare.search import trials as search_trials
from vllm_rsparse.prepare.search.sensitivity import sensitivities
from vllm_rsparse.prepare.search.trials import TRIED_TOKENS, choose
from vllm_rsparse.prepare.store.journal import Journal
from vllm_rsparse.prepare.store.snapshots import Snapshots

SPARSITY, FIRST, INF = 0.5, 8, float("inf")
TRIED = ("a", "a, corrected", "b", "b, corrected", "half evenly", "without factors")
RANK, N, K = 3, 64, 128


def shares(
    linears: list[Linear], low: float, sparsity: float
) -> Mapping[str, LinearPlan]:
    """At ``SPARSITY``, ``low`` for the first half and more for the others."""
    half = len(linears) // 2
    first = low + sparsity - SPARSITY
    return {
        one.name: LinearPlan(first if i < half else 2 * sparsity - first, 1.0)
        for i, one in enumerate(linears)
    }


@pytest.mark.parametrize(
    ("divergences", "share", "corrected", "factors"),
    [
        ([3.0, 4.0, 2.0, 4.0, 2.1, 2.2], 0.3, False, True),
        ([2.0, 4.0, 3.0, 4.0, 2.1, 2.2], 0.1, False, True),
        ([3.0, 2.0, 3.0, 4.0, 2.1, 2.2], 0.1, True, True),
        ([3.0, 4.0, 3.0, 2.0, 1.9, 2.2], 0.4, True, True),
        ([3.0, 4.0, 3.0, 2.0, 1.9, 1.8], 0.4, True, False),
        ([3.0, 4.0, 3.0, 2.0, 2.1, 1.8], 0.3, True, False),
        # Less than the one before it is not enough.
        ([3.0, 1.0, 3.0, 2.0, 1.9, 1.8], 0.1, True, True),
        ([3.0, INF, 3.0, 2.0, INF, 1.8], 0.3, True, False),
        ([INF] * 6, 0.1, False, True),
        # Equal ones: what was tried first.
        ([2.0] * 6, 0.1, False, True),
    ],
)
def test_the_candidate_nearest_to_the_dense_model_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    divergences: list[float],
    share: float,
    corrected: bool,
    factors: bool,
) -> None:
    linears = [Linear(f"l{i}", i, "self_attn.q_proj", (N, K)) for i in range(4)]
    ways = {
        "a": partial(shares, linears, 0.1),
        "b": partial(shares, linears, 0.3),
    }
    # "half evenly" of 0.3 and 0.5 is 0.4.
    left = iter(divergences)
    seen: list[tuple[str, int, bool]] = []

    def run_sparse(*args: Any) -> None:
        seen.append((args[-1], len(args[3]), args[2].recipe.correction))

    monkeypatch.setattr(search_trials, "run_sparse", run_sparse)
    monkeypatch.setattr(search_trials, "divergence", lambda *args: next(left))
    asked: list[bool] = []

    def find_ranks(*args: Any) -> dict[str, int]:
        asked.append(args[-1])
        return {"l0": RANK}

    monkeypatch.setattr(search_trials, "find_ranks", find_ranks)

    class Model:
        device = torch.device("cpu")

        def embed(self, windows: Tensor) -> Tensor:
            return windows

    start = Planned(RECIPES["best"], {}, 1.0, {}, {"l0": torch.eye(8)}, FIRST)
    windows = torch.zeros(20, TRIED_TOKENS // 3)
    snapshots = Snapshots(tmp_path / "search", {})
    snapshots.put("entering.4", {"hidden": windows})
    with Journal(tmp_path / "journal", {}) as journal:
        best = choose(
            Model(), linears, start, ways, {}, windows, SPARSITY, 0,  # type: ignore[arg-type]
            journal, snapshots,
        )  # fmt: skip
    assert asked == [False, True]  # the factors' covariance depends on it
    assert [(name, tried) for name, tried, _ in seen] == [(name, 4) for name in TRIED]
    assert [correction for _, _, correction in seen[:4]] == [False, True] * 2
    assert seen[5][2] == best.recipe.correction == corrected
    assert best.trials == dict(zip(TRIED, divergences, strict=True))
    # The channels of all four linears pay for the factors of one.
    paid = RANK * (N + K) / (N * K) if factors else 0.0
    assert best.plans["l0"].rank((N, K)) == (RANK if factors else 0)
    assert best.plans["l0"].keep == pytest.approx(1 - share - paid / 4)
    mean = sum(plan.sparsity for plan in best.plans.values()) / 4
    # `with_rank` books half a rank more.
    assert mean == pytest.approx(SPARSITY, abs=0.6 * paid / RANK / 4 + 1e-9)
    assert best.recipe.linears == best.plans


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
    snapshots = Snapshots(tmp_path / "search", {})
    sensitivities(model, linears, windows, FIRST, 0, snapshots)
    recipe = Recipe("two", "norm", "uniform", "sparse", True)
    start = Planned(recipe, {}, 1.0, {}, {}, FIRST)

    def chosen(members: list[Linear], journal: Journal) -> Planned:
        return choose(
            model, members, start, ways, {}, windows, SPARSITY, 0, journal, snapshots
        )  # fmt: skip

    path = tmp_path / "journal"
    with Journal(path, {}) as journal:
        best = chosen(linears, journal)
        assert best.plans == dict(uniform(linears, SPARSITY, 1.0))
        assert best.trials["bad"] > best.trials["good"] > 0
        # Known losses are not computed again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_trials, "run_sparse", None)
            assert chosen(linears, journal).trials == best.trials
    assert not path.exists()  # the run ended well
