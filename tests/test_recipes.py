# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a search finds, against independent computations of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from vllm_rsparse.artifact import ArtifactInfo, model_sparsity
from vllm_rsparse.evaluate.loading import PreparedModel, SwitchableModel
from vllm_rsparse.evaluate.measure import measure
from vllm_rsparse.prepare.checkpoint import Checkpoint
from vllm_rsparse.prepare.errors import PrepareError
from vllm_rsparse.prepare.linears import Linear, find_linears
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe import LinearPlan
from vllm_rsparse.prepare.recipes import RECIPES, Recipe, check_plans, load_recipe
from vllm_rsparse.prepare.search_greedy import LEVELS, allocate, share_in_layers
from vllm_rsparse.prepare.search_sensitivity import (
    Sensitivity,
    sensitivities,
    share_out,
)
from vllm_rsparse.prepare.search_trials import halved
from vllm_rsparse.prepare.snapshots import Snapshots
from vllm_rsparse.prepare.streaming import StreamedModel
from vllm_rsparse.prepare.texts import choose_windows, load_tokenizer, read_texts

SAMPLES, TOKENS = 3, 80
FIRST = 8  # int(0.1 * TOKENS)

Prepare = Callable[..., tuple[Path, ArtifactInfo]]


@pytest.fixture
def text() -> Path:
    return Path(json.decoder.__file__)


@pytest.fixture
def make(pyllama: Path, tmp_path: Path, text: Path) -> Prepare:
    """Prepare the reference model by a recipe; returns the directory and the info."""

    def make(
        recipe: str, name: str = "out", **options: Any
    ) -> tuple[Path, ArtifactInfo]:
        values: dict[str, Any] = {
            "sparsity": 0.5,
            "samples": SAMPLES,
            "tokens": TOKENS,
            "device": "cpu",
        }
        info = prepare(
            PrepareOptions(
                model=str(pyllama),
                output=tmp_path / name,
                calibration_data=(text,),
                recipe=recipe,
                **{**values, **options},
            )
        )
        return tmp_path / name, info

    return make


def windows_of(pyllama: Path, text: Path, samples: int = SAMPLES) -> Tensor:
    tokenizer = load_tokenizer(pyllama)
    return choose_windows(
        tokenizer, read_texts((text,)), samples, TOKENS, 0, 4096
    ).windows


def streamed(pyllama: Path) -> tuple[StreamedModel, list[Linear]]:
    checkpoint = Checkpoint(pyllama)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    return model, find_linears(checkpoint)[0]


def test_sensitivity_is_the_gradient_of_the_whole_model(
    pyllama: Path, text: Path, tmp_path: Path
) -> None:
    model, linears = streamed(pyllama)
    windows = windows_of(pyllama, text)
    snapshots = Snapshots(tmp_path / "search", {})
    found = sensitivities(model, linears, windows, FIRST, 5, snapshots)

    # The same by autograd through the complete model, all layers in memory.
    whole = AutoModelForCausalLM.from_pretrained(pyllama, dtype=torch.float32)
    outputs: dict[str, Tensor] = {}
    for linear in linears:
        whole.get_submodule(linear.name).register_forward_hook(
            lambda module, args, out, name=linear.name: outputs.update({name: out})
        )
    powers = {linear.name: torch.zeros(linear.shape[1]) for linear in linears}
    outer = {one.name: torch.zeros(one.shape[0], one.shape[0]) for one in linears}
    generator = torch.Generator().manual_seed(5)
    for window in windows:
        logs = whole(window[None]).logits[0, FIRST:].log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        grads = torch.autograd.grad(
            -logs.gather(-1, labels).sum(), [outputs[one.name] for one in linears]
        )
        for linear, grad in zip(linears, grads, strict=True):
            g = grad[0, FIRST:]
            d = g @ whole.get_submodule(linear.name).weight
            powers[linear.name] += d.abs().pow(1.5).sum(0)
            outer[linear.name] += g.T @ g
    tokens = len(windows) * (TOKENS - FIRST)
    for linear in linears:
        expected = (powers[linear.name] / tokens).pow(1 / 1.5)
        # float32 sums in another order, forward and backward through four layers.
        torch.testing.assert_close(
            found[linear.name].scale, expected, rtol=2e-3, atol=1e-6
        )
        assert int(found[linear.name].counts.sum()) == tokens * linear.shape[1]
        metric = found[linear.name].metric
        assert (metric is not None) == linear.name.endswith(("q_proj", "k_proj"))
        if metric is not None:
            expected = outer[linear.name] / tokens
            scale = expected.diagonal().mean().item()
            torch.testing.assert_close(metric, expected, rtol=2e-3, atol=1e-3 * scale)


def counts_of(scores: Tensor) -> Tensor:
    return torch.bincount(scores.view(torch.int32) >> 16, minlength=1 << 16)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_sharing_out_uses_one_threshold_and_the_whole_budget(sparsity: float) -> None:
    shapes = {"a": (8, 16), "b": (32, 16), "c": (8, 64)}
    linears = [Linear(name, 0, name, shape) for name, shape in shapes.items()]
    scores = {name: 10 ** (i - 1) * torch.rand(4096) for i, name in enumerate(shapes)}
    found = {
        name: Sensitivity(torch.ones(shapes[name][1]), counts_of(scores[name]))
        for name in shapes
    }
    plans = share_out(linears, found, sparsity)
    sizes = {name: n * k for name, (n, k) in shapes.items()}
    total = sum(plans[name].sparsity * size for name, size in sizes.items())
    assert total / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-9)
    assert plans["a"].sparsity >= plans["b"].sparsity >= plans["c"].sparsity
    # Below a common threshold lies the planned fraction of each; a bin is 1% wide.
    if sparsity > 0:
        threshold = scores["c"].quantile(plans["c"].sparsity).item()
        for name in ("a", "b"):
            below = (scores[name] <= threshold).float().mean().item()
            assert plans[name].sparsity == pytest.approx(below, abs=0.05)


@pytest.mark.parametrize(
    "recipe",
    [
        # Neither would have corrections and factors for sure.
        replace(RECIPES["best"], allocation="sensitivity"),
        replace(RECIPES["greedy"], correction=True),
    ],
    ids=lambda recipe: recipe.name,
)
def test_thresholds_fit_the_sparse_model_itself(
    make: Prepare, pyllama: Path, text: Path, tmp_path: Path, recipe: Recipe
) -> None:
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json())
    directory, info = make(str(file))
    assert info.achieved_sparsity == pytest.approx(0.5, abs=1e-3)
    prepared = PreparedModel.open(directory)
    model = SwitchableModel(prepared, torch.device("cpu"), torch.float32)
    model.use(prepared.artifact)
    inputs: dict[str, Tensor] = {}
    for name, module in model.linears.items():
        module.register_forward_pre_hook(
            lambda m, args, name=name: inputs.update({name: args[0][:, FIRST:]})
        )
    windows = windows_of(pyllama, text)
    model.logits(windows, FIRST, sparse=True)
    tokens = len(windows) * (TOKENS - FIRST)
    tensors = load_file(directory / "rsparse" / "rsparse.safetensors")
    for name, module in model.linears.items():
        # Scores that nearly tie with the threshold may fall to either side.
        kept = module.kept / tokens / module.linear.weight.shape[1]
        assert kept == pytest.approx(info.linears[name].kept_fraction, abs=1e-3), name
        mask = inputs[name].abs() > tensors[f"{name}.thresholds"]
        dropped = inputs[name].masked_fill(mask, 0)
        lost = dropped @ module.linear.weight.T
        if info.linears[name].rank > 0:
            u, v = tensors[f"{name}.u"].float(), tensors[f"{name}.v"].float()
            lost = lost - dropped @ v.T @ u.T
        torch.testing.assert_close(
            tensors[f"{name}.bias"],
            lost.mean((0, 1)).detach(),
            rtol=0.02,
            atol=2e-3 * lost.std().item(),
        )


def test_searched_recipes_lose_less_than_uniform_thresholds(
    make: Prepare, pyllama: Path, tmp_path: Path
) -> None:
    more = {"samples": 4, "tokens": 256}
    prepared = []
    for recipe in ("best", "greedy", "wina"):
        directory, _ = make(recipe, recipe, **more)
        prepared.append(PreparedModel.open(directory))
    model = SwitchableModel(prepared[0], torch.device("cpu"), torch.float32)
    held_out = Path(json.encoder.__file__)
    windows = windows_of(pyllama, held_out, samples=16)
    best, greedy, wina = measure(model, prepared, windows, FIRST)
    # Measured on 48 windows of 512: 0.25 nats against 0.45.
    assert best.kl_divergence < 0.8 * wina.kl_divergence
    assert greedy.kl_divergence < wina.kl_divergence


def test_magnitude_gives_one_threshold(make: Prepare) -> None:
    directory, info = make("teal")
    tensors = load_file(directory / "rsparse" / "rsparse.safetensors")
    for name, entry in info.linears.items():
        assert tensors[f"{name}.thresholds"].unique().numel() == 1
        assert (entry.rank, entry.bias) == (0, False)


def test_peers_spend_no_bytes_on_factors_unless_asked_to(make: Prepare) -> None:
    assert {e.rho for e in make("wina", "a")[1].linears.values()} == {1.0}
    assert {e.rho for e in make("uniform", "b")[1].linears.values()} == {0.95}
    assert {e.rho for e in make("wina", "c", rho=0.9)[1].linears.values()} == {0.9}


def test_a_saved_recipe_gives_the_same_artifact(make: Prepare, tmp_path: Path) -> None:
    saved = tmp_path / "recipe.json"
    _, first = make("best", "first", save_recipe=saved)
    _, again = make(str(saved), "again")
    assert again.tensors_sha256 == first.tensors_sha256
    assert load_recipe(str(saved)).linears == {
        name: LinearPlan(entry.sparsity, entry.rho)
        for name, entry in first.linears.items()
    }


def test_an_edited_recipe_is_obeyed(
    make: Prepare, tmp_path: Path, pyllama: Path
) -> None:
    linears = streamed(pyllama)[1]
    plans = {
        one.name: LinearPlan(0.8 if one.kind.startswith("mlp") else 0.2, 1.0)
        for one in linears
    }
    sparsity = 1 - sum(
        (1 - plans[one.name].sparsity) * one.shape[0] * one.shape[1] for one in linears
    ) / sum(one.shape[0] * one.shape[1] for one in linears)
    file = tmp_path / "mine.json"
    file.write_text(
        Recipe("mine", "norm", "uniform", "dense", False).with_plans(plans).to_json()
    )
    _, info = make(str(file), sparsity=round(sparsity, 3))
    for name, entry in info.linears.items():
        assert 1 - entry.kept_fraction == pytest.approx(plans[name].sparsity, abs=2e-3)
    assert model_sparsity(info.linears) == pytest.approx(sparsity, abs=2e-3)


def test_allocation_takes_the_cheapest_bytes_first() -> None:
    errors = {
        "cheap": [0.1 * level for level in LEVELS],
        "dear": [10.0 * level**2 for level in LEVELS],
    }
    shares = allocate(errors, {"cheap": 100, "dear": 300}, 0.225)
    assert shares == pytest.approx({"cheap": 0.9, "dear": 0.0})
    shares = allocate(errors, {"cheap": 100, "dear": 300}, 0.5)
    assert shares["cheap"] == pytest.approx(0.9)
    assert 100 * shares["cheap"] + 300 * shares["dear"] == pytest.approx(200)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_allocation_meets_the_budget(sparsity: float) -> None:
    # Not convex: a linear that is worse at 30% than at 40%, through noise.
    errors = {
        "a": [0, 1, 5, 4, 6, 9, 13, 20, 40],
        "b": [0, 2, 3, 5, 8, 13, 21, 34, 55],
    }
    sizes = {"a": 7, "b": 5}
    shares = allocate(errors, sizes, sparsity)
    total = sum(shares[name] * size for name, size in sizes.items())
    assert total == pytest.approx(sparsity * 12)
    assert all(0 <= share < 1 for share in shares.values())


def test_greedy_shares_out_in_layers_and_halved_is_the_mean() -> None:
    linears = [
        Linear(f"model.layers.{layer}.{kind}", layer, kind, (8, 16))
        for layer in range(2)
        for kind in ("self_attn.o_proj", "mlp.up_proj")
    ]
    # Errors that grow with the level, the second linear's of a layer ten times faster.
    errors = {
        one.name: [(1 + 9 * (i % 2)) * level**2 for level in LEVELS]
        for i, one in enumerate(linears)
    }

    def first_layer_pays(sparsity: float) -> dict[str, LinearPlan]:
        return {
            one.name: LinearPlan(2 * sparsity * (one.layer == 0), 1.0)
            for one in linears
        }

    in_layers = partial(share_in_layers, linears, errors)
    plans = in_layers(0.4)
    for layer in range(2):
        o, up = (plans[one.name].sparsity for one in linears if one.layer == layer)
        assert o > up
        assert (o + up) / 2 == pytest.approx(0.4)
    mean = halved(in_layers, first_layer_pays, 0.4)
    for one in linears:
        other = 0.8 * (one.layer == 0)
        expected = (plans[one.name].sparsity + other) / 2
        assert mean[one.name].sparsity == pytest.approx(expected)
    assert sum(plan.sparsity for plan in mean.values()) / 4 == pytest.approx(0.4)


def test_recipes_survive_json(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    for recipe in RECIPES.values():
        fixed = recipe.with_plans({"model.layers.0.mlp.up_proj": LinearPlan(0.4, 0.9)})
        for one in (recipe, fixed):
            path.write_text(one.to_json())
            assert load_recipe(str(path)) == one


PLAN = {"sparsity": 0.5, "rho": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": "l1"},
            "score must be one of magnitude, norm, sensitivity, got 'l1'",
        ),
        ({"allocation": "sensitivity"}, "needs score 'sensitivity', got 'norm'"),
        ({"factors": "regressed"}, "needs score 'sensitivity', got 'norm'"),
        ({"factors": "qr"}, "factors must be one of svd, regressed, got 'qr'"),
        ({"activations": None}, "activations must be one of dense, sparse, got None"),
        ({"correction": 1}, "correction must be true or false"),
        ({"extra": 1}, "unknown key 'extra'; known are name, score"),
        ({"linears": []}, "`linears` must be an object"),
        ({"linears": {"x": 0.5}}, r"linears\['x'\]: expected an object"),
        ({"linears": {"x": {"sparsity": 0.5}}}, "key 'rho' is missing"),
        ({"linears": {"x": PLAN | {"sparsity": 1.5}}}, "sparsity is out of range"),
        ({"linears": {"x": PLAN | {"rho": 0}}}, "rho is out of range"),
    ],
    ids=str,
)
def test_bad_recipe_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(json.loads(RECIPES["wina"].to_json()) | change))
    with pytest.raises(PrepareError, match=message):
        load_recipe(str(path))


def test_bad_recipe_names(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="neither one of uniform, teal, wina"):
        load_recipe("besst")
    path = tmp_path / "recipe.json"
    path.write_text("{")
    with pytest.raises(PrepareError, match="cannot be read as JSON"):
        load_recipe(str(path))
    path.write_text("[]")
    with pytest.raises(PrepareError, match="expected a JSON object"):
        load_recipe(str(path))
    path.write_text('{"name": "x"}')
    with pytest.raises(PrepareError, match="key 'score' is missing"):
        load_recipe(str(path))


def test_recipe_of_another_model_or_budget() -> None:
    linears = [Linear("a", 0, "a", (4, 4)), Linear("b", 0, "b", (4, 4))]
    plan = LinearPlan(0.5, 1.0)
    with pytest.raises(PrepareError, match="lacks b"):
        check_plans(RECIPES["wina"].with_plans({"a": plan}), linears, 0.5)
    three = {"a": plan, "b": plan, "c": plan}
    with pytest.raises(PrepareError, match="lists c"):
        check_plans(RECIPES["wina"].with_plans(three), linears, 0.5)
    two = RECIPES["wina"].with_plans({"a": plan, "b": plan})
    check_plans(two, linears, 0.5)
    with pytest.raises(PrepareError, match=r"adds up to a sparsity of 0\.5000"):
        check_plans(two, linears, 0.4)


def test_factors_are_refused_where_the_search_gives_none(make: Prepare) -> None:
    with pytest.raises(PrepareError, match="'best' chooses the factors itself"):
        make("best", rho=0.9)
