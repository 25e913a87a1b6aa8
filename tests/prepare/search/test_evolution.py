# SPDX-License-Identifier: Apache-2.0
"""The searches: budgets, losses against whole-model ones, seeds, and going on."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.run import Run
from vllm_rsparse.prepare.search import evolution
from vllm_rsparse.prepare.search.allocators import ALLOCATORS
from vllm_rsparse.prepare.search.candidates import Candidates
from vllm_rsparse.prepare.search.evolution import MIN_RHO, Breeder, Evolution
from vllm_rsparse.prepare.store.run_store import RESULTS, Key, RunStore
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.tokens import load_tokenizer
from vllm_rsparse.texts.windows import choose_windows

TEXT = Path(json.decoder.__file__)


def options(model: Path, output: Path, recipe: str, seed: int = 0) -> PrepareOptions:
    return PrepareOptions(
        str(model),
        output,
        0.5,
        (TEXT,),
        samples=2,
        tokens=40,
        device="cpu",
        recipe=recipe,
        seed=seed,
    )


@pytest.fixture
def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, joint in (("evolutionary", False), ("evolutionary-joint", True)):
        monkeypatch.setitem(ALLOCATORS, name, Evolution(joint, 4, 2))


def test_losses_are_those_of_the_whole_model(pyllama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(pyllama)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    linears = find_linears(checkpoint)[0]
    prefix = 4
    sources = read_sources((TEXT,), "--calibration-data")
    text = choose_windows(load_tokenizer(pyllama), sources, 2, 40, 0, 4096).windows
    run = Run(model, tuple(linears), text, prefix, 0, RunStore(tmp_path / "s", {}))
    candidates = Candidates(run, LinearPlan(0.0, MIN_RHO))
    plans = {linear.name: LinearPlan(0.4, 0.9) for linear in linears}
    dense = {linear.name: LinearPlan(0.0, 1.0) for linear in linears}
    sparse_loss, dense_loss = candidates.losses([plans, dense])

    whole = AutoModelForCausalLM.from_pretrained(pyllama, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    for linear in linears:
        whole.get_submodule(linear.name).register_forward_pre_hook(
            lambda module, args, name=linear.name: inputs.update({name: args[0]})
        )
    labels = text[:, prefix + 1 :, None]

    def loss() -> float:
        logs = whole(text).logits[:, prefix:-1].log_softmax(-1)
        return -logs.gather(-1, labels).mean().item()

    # float32 through four layers, one window at a time or both together.
    assert dense_loss == pytest.approx(loss(), rel=1e-5)
    scores = {}
    for linear in linears:
        norms = whole.get_submodule(linear.name).weight.norm(dim=0)
        scores[linear.name] = (inputs[linear.name].abs() * norms).flatten()
    for linear in linears:
        module = whole.get_submodule(linear.name)
        w = module.weight.detach()
        rank = plans[linear.name].rank(linear.shape)
        u, s, vh = torch.linalg.svd(w)
        # In the checkpoint's dtype, as the artifact stores them.
        u, vh = (
            (u[:, :rank] * s[:rank]).bfloat16().float(),
            vh[:rank].bfloat16().float(),
        )
        low = u @ vh
        # Midway between two scores, as in the package.
        count = len(scores[linear.name])
        dropped = count - round(plans[linear.name].keep * count)
        limit = scores[linear.name].sort().values[dropped - 1 : dropped + 1].mean()
        norms = w.norm(dim=0)

        def forward(
            x: Tensor, w: Tensor = w, low: Tensor = low, t: Tensor = limit / norms
        ) -> Tensor:
            kept = x * (x.abs() > t)
            y = kept @ w.T + (x - kept) @ low.T
            return torch.cat([x[:, :prefix] @ w.T, y[:, prefix:]], 1)

        module.forward = forward
    expected = loss()
    # A channel near its threshold turns with the last bit of a sum; others follow.
    assert sparse_loss == pytest.approx(expected, abs=0.1 * (expected - dense_loss))
    assert expected > 1.05 * dense_loss


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_plans_keep_to_the_budget_and_differ(joint: bool, sparsity: float) -> None:
    linears = [Linear(str(i), 0, str(i), (8 * (i + 1), 16)) for i in range(6)]
    low = max(0.0, 2 * sparsity - 1) if joint else sparsity
    breeder = Breeder(linears, sparsity, low, joint, random.Random(3))
    plans = breeder.start(5)
    plans += [breeder.child(plans) for _ in range(5)]
    sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in linears}
    for one in plans:
        skipped = sum(plan.sparsity * sizes[name] for name, plan in one.items())
        assert skipped / sum(sizes.values()) == pytest.approx(sparsity, abs=1e-6)
        assert all(MIN_RHO <= plan.rho <= 1 for plan in one.values())
        assert all(low <= plan.sparsity <= 0.95 for plan in one.values())
    assert len({tuple(p.rho for p in one.values()) for one in plans}) == len(plans)
    varied = {p.sparsity for one in plans for p in one.values()}
    assert (len(varied) > 1) == joint


@pytest.mark.usefixtures("small_search")
@pytest.mark.parametrize("recipe", ["evolutionary", "evolutionary-joint", "greedy"])
def test_an_interrupted_search_goes_on(
    tiny_llama: Path, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(options(tiny_llama, tmp_path / "whole", recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]

    # What the search, not the calibration after it, has found.
    searched: list[Key] = []
    record = RunStore.record

    def interrupted(self: RunStore, results: Mapping[Key, Any]) -> None:
        record(self, results)
        searched.extend(results)
        if len(searched) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "record", interrupted)
        # One candidate at a time, however fast this machine is.
        patch.setattr(evolution, "NOTE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(tiny_llama, tmp_path / "out", recipe))
    # The staging directory is gone.
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"whole", "out.search"}
    # As if it had been killed in the middle of a line.
    results = tmp_path / "out.search" / RESULTS
    results.write_text(results.read_text() + '{"stage": "ev')

    def counting(self: RunStore, results: Mapping[Key, Any]) -> None:
        record(self, results)
        searched.extend(results)

    monkeypatch.setattr(RunStore, "record", counting)
    again = prepare(options(tiny_llama, tmp_path / "out", recipe))
    assert again.tensors_sha256 == whole.tensors_sha256
    assert len(searched) == (4 if recipe == "greedy" else 4 + 2 * 2)
    assert len(set(searched)) == len(searched)
    assert not results.parent.exists()


@pytest.mark.usefixtures("small_search")
def test_seeds(tiny_llama: Path, tmp_path: Path) -> None:
    digests = [
        prepare(
            options(tiny_llama, tmp_path / str(i), "evolutionary-joint", seed)
        ).tensors_sha256
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]
