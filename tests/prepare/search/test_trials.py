# SPDX-License-Identifier: Apache-2.0
"""What ``best`` finds out by trying it on the calibration text."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.recipe.plan import LinearPlan, uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import RECIPES, TRY, Recipe
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search import trials
from vllm_rsparse.prepare.search.scores import Scored
from vllm_rsparse.prepare.search.sensitivity import SensitivityPass, sensitivities
from vllm_rsparse.prepare.search.states import LayerStates
from vllm_rsparse.prepare.search.trials import TRIED_TOKENS, Candidates, choose
from vllm_rsparse.prepare.store.run_store import RunStore
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.tokens import load_tokenizer
from vllm_rsparse.texts.windows import choose_windows

SPARSITY, DENSE_PREFIX, INF = 0.5, 8, float("inf")
TRIED = ("a", "a, corrected", "b", "b, corrected", "half evenly", "without factors")
RANK, N, K = 3, 64, 128


def allocation(
    linears: list[Linear], low: float, sparsity: float
) -> Mapping[str, LinearPlan]:
    """At ``SPARSITY``, ``low`` for the first half and more for the others."""
    half = len(linears) // 2
    first = low + sparsity - SPARSITY
    return {
        linear.name: LinearPlan(first if i < half else 2 * sparsity - first, 1.0)
        for i, linear in enumerate(linears)
    }


class States(LayerStates):
    """Of a model whose layers change nothing."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden

    def leaving(self) -> Tensor:
        return self._hidden


class Model:
    """As much of a streamed model as trials that are replaced need."""

    device = torch.device("cpu")


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
    linears = tuple(Linear(f"l{i}", i, "self_attn.q_proj", (N, K)) for i in range(4))
    allocations = {
        "a": partial(allocation, linears, 0.1),
        "b": partial(allocation, linears, 0.3),
    }
    # "half evenly" of 0.3 and 0.5 is 0.4.
    left = iter(divergences)
    tried: list[tuple[str, int, bool]] = []
    asked: list[list[bool]] = []

    def run_sparse(run: Run, planned: Planned, label: str) -> Tensor:
        tried.append((label, len(run.windows), planned.corrected))
        return run.windows

    def find_ranks(
        run: Run,
        scored: Scored,
        plans: Mapping[str, LinearPlan],
        corrections: Sequence[bool],
    ) -> dict[bool, dict[str, int]]:
        asked.append(list(corrections))
        return {corrected: {"l0": RANK} for corrected in corrections}

    monkeypatch.setattr(trials, "run_sparse", run_sparse)
    monkeypatch.setattr(trials, "divergence", lambda *args: next(left))
    monkeypatch.setattr(trials, "find_ranks", find_ranks)
    windows = torch.zeros(20, TRIED_TOKENS // 3)
    scored = Scored(
        RECIPES["best"],
        metrics={"l0": torch.eye(8)},
        sensitivity=SensitivityPass({}, States(windows)),
    )
    with RunStore(tmp_path / "search", {}) as store:
        run = Run(Model(), linears, windows, DENSE_PREFIX, 0, store)  # type: ignore[arg-type]
        candidates = Candidates(run, scored, allocations, allocations["b"], SPARSITY)
        best = choose(candidates)
    assert asked == [[False, True]]  # the factors' covariance depends on it
    assert [(label, windows) for label, windows, _ in tried] == [(x, 4) for x in TRIED]
    assert [correction for _, _, correction in tried[:4]] == [False, True] * 2
    assert tried[5][2] == best.corrected == corrected
    assert best.trials == dict(zip(TRIED, divergences, strict=True))
    # The channels of all four linears pay for the factors of one.
    paid = RANK * (N + K) / (N * K) if factors else 0.0
    assert best.plans["l0"].rank((N, K)) == (RANK if factors else 0)
    assert best.plans["l0"].keep == pytest.approx(1 - share - paid / 4)
    mean = sum(plan.sparsity for plan in best.plans.values()) / 4
    # `with_rank` books half a rank more.
    assert mean == pytest.approx(SPARSITY, abs=0.6 * paid / RANK / 4 + 1e-9)
    # What was chosen gives the same plans without trials.
    assert best.choice is not None
    repeated = Candidates(run, scored, allocations, allocations["b"], SPARSITY)
    again = repeated.planned(best.choice)
    assert (again.recipe, again.trials) == (best.recipe, {})


def test_on_the_reference_model(pyllama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(pyllama)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    linears = tuple(find_linears(checkpoint)[0])
    text = read_sources((Path(json.decoder.__file__),), "--calibration-data")
    windows = choose_windows(load_tokenizer(pyllama), text, 3, 80, 0, 4096).windows
    sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in linears}
    total = sum(sizes.values())
    down = sum(size for name, size in sizes.items() if "down" in name)
    # down_proj bears sparsity best: to spare it costs the others dearly.
    without_down = {
        name: LinearPlan(
            0.0 if "down" in name else SPARSITY * total / (total - down), 1.0
        )
        for name in sizes
    }
    even = partial(uniform, linears, rho=1.0)
    allocations = {"bad": lambda sparsity: without_down, "good": even}
    recipe = Recipe(
        name="two",
        score="norm",
        allocation="mixed",
        activations="sparse",
        correction=TRY,
    )
    directory = tmp_path / "search"
    with RunStore(directory, {}) as store:
        run = Run(model, linears, windows, DENSE_PREFIX, 0, store)
        scored = Scored(recipe, sensitivity=sensitivities(run))
        candidates = Candidates(run, scored, allocations, even, SPARSITY)
        best = choose(candidates)
        assert best.plans == uniform(linears, SPARSITY, 1.0)
        assert best.trials["bad"] > best.trials["good"] > 0
        # Known divergences are not computed again.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trials, "run_sparse", None)
            again = choose(candidates)
        assert again.trials == best.trials
    assert not directory.exists()  # the run ended well


@pytest.mark.parametrize(
    ("correction", "tried"),
    [("never", ["a", "half evenly"]), ("always", ["a, corrected", "half evenly"])],
)
def test_a_correction_that_is_fixed_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, correction: str, tried: list[str]
) -> None:
    linears = (Linear("l0", 0, "self_attn.q_proj", (N, K)),)
    monkeypatch.setattr(trials, "run_sparse", lambda run, *args: run.windows)
    monkeypatch.setattr(trials, "divergence", lambda *args: 1.0)
    recipe = Recipe(
        name="one",
        score="sensitivity",
        allocation="mixed",
        activations="sparse",
        correction=correction,
    )
    windows = torch.zeros(1, 16)
    scored = Scored(recipe, sensitivity=SensitivityPass({}, States(windows)))
    run = Run(Model(), linears, windows, 1, 0, RunStore(tmp_path / "s", {}))  # type: ignore[arg-type]
    even = partial(uniform, linears, rho=1.0)
    best = choose(Candidates(run, scored, {"a": even}, even, SPARSITY))
    assert list(best.trials) == tried
    assert best.recipe.correction == correction
