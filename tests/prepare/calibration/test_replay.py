# SPDX-License-Identifier: Apache-2.0
"""Settled linears are computed once for each batch of windows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.calibration import replay
from vllm_rsparse.prepare.calibration.layer import LayerCalibration
from vllm_rsparse.prepare.calibration.replay import replaying
from vllm_rsparse.prepare.recipe.plan import uniform
from vllm_rsparse.prepare.recipe.planned import Planned
from vllm_rsparse.prepare.recipe.recipes import RECIPES
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.store.run_store import RunStore

TOKENS = 8
LINEAR = Linear("layer.up", 0, "up", (4, 3))


class Model:
    def __init__(self) -> None:
        self.running = slice(0)
        self.device = torch.device("cpu")
        self.dtype = torch.float32


class Counted(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.fixture
def layer() -> nn.Module:
    return nn.ModuleDict({"up": Counted(3, 4)})


def test_a_batch_is_computed_once(layer: nn.Module) -> None:
    model, up = Model(), layer.get_submodule("up")
    batches = {0: torch.randn(1, 2, 3), 1: torch.randn(1, 2, 3)}
    with torch.no_grad(), replaying(model, layer, [LINEAR], TOKENS) as kept:  # type: ignore[arg-type]
        kept.settle(LINEAR)
        for start in (0, 1, 0, 1):
            model.running = slice(start, start + 1)
            expected = functional.linear(batches[start], up.weight, up.bias)
            assert torch.equal(up(batches[start]), expected)
        assert up.calls == 2
    assert "forward" not in up.__dict__
    up(batches[0])
    assert up.calls == 3


def test_an_output_that_the_model_changes_is_computed_again(layer: nn.Module) -> None:
    model, up, x = Model(), layer.get_submodule("up"), torch.randn(1, 2, 3)
    with torch.no_grad(), replaying(model, layer, [LINEAR], TOKENS) as kept:  # type: ignore[arg-type]
        kept.settle(LINEAR)
        expected = up(x).clone()
        up(x).view(2, 4)[0].mul_(2)
        assert torch.equal(up(x), expected)


def test_nothing_is_kept_where_memory_is_short(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = TOKENS * 4 * 4  # outputs of four bytes
    up = layer.get_submodule("up")
    for free, calls in ((4 * size - 1, 2), (4 * size, 1), (None, 1)):
        monkeypatch.setattr(replay, "free_memory", lambda device, free=free: free)
        up.calls = 0
        with replaying(Model(), layer, [LINEAR], TOKENS) as kept:  # type: ignore[arg-type]
            kept.settle(LINEAR)
            up(torch.ones(1, 2, 3))
            up(torch.ones(1, 2, 3))
        assert up.calls == calls


def test_a_calibration_is_the_same_with_and_without(
    pyllama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(pyllama)
    linears = tuple(x for x in find_linears(checkpoint)[0] if x.layer == 0)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    windows = torch.randint(0, 50, (2, TOKENS), generator=torch.manual_seed(0))
    recipe = replace(RECIPES["greedy"], linears=uniform(linears, 0.5, rho=1.0))
    results, products = [], []
    linear = functional.linear

    def counted(*args: Tensor) -> Tensor:
        products[-1] += 1
        return linear(*args)

    monkeypatch.setattr(functional, "linear", counted)
    for free in (0, None):
        monkeypatch.setattr(replay, "free_memory", lambda device, free=free: free)
        with RunStore(tmp_path / "search", {}) as store:
            run = Run(model, linears, windows, 1, 0, store)
            calibration = LayerCalibration(run, Planned(recipe), tqdm(disable=True))
            hidden = model.embed(windows)
            products.append(0)
            with model.layer(0) as module:
                calibration.on_sparse(run.layers[0], module, hidden)
        results.append({"hidden": hidden, **calibration.result.tensors})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    # Two windows, dense prefix and sparse rest: q, k, v, o, gate, up and down once.
    assert products[1] == 2 * 2 * 7 < products[0]
