# SPDX-License-Identifier: Apache-2.0
"""The searches: budgets, losses against whole-model ones, seeds, and going on."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.linears import Linear, find_linears
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.model.texts import choose_windows, load_tokenizer, read_texts
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.plan import LinearPlan
from vllm_rsparse.prepare.search import evolution as search_evolution
from vllm_rsparse.prepare.search.candidates import Candidates
from vllm_rsparse.prepare.search.evolution import MIN_RHO, Breeder
from vllm_rsparse.prepare.store.journal import Journal

TEXT = Path(json.decoder.__file__)


def options(model: Path, output: Path, recipe: str, seed: int = 0) -> PrepareOptions:
    return PrepareOptions(
        str(model), output, 0.5, (TEXT,), samples=2, tokens=40, device="cpu",
        recipe=recipe, seed=seed,
    )  # fmt: skip


@pytest.fixture
def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_evolution, "POPULATION", 4)
    monkeypatch.setattr(search_evolution, "GENERATIONS", 2)


def test_losses_are_those_of_the_whole_model(pyllama: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(pyllama)
    model = StreamedModel(checkpoint, torch.device("cpu"), torch.float32)
    linears = find_linears(checkpoint)[0]
    first = 4
    text = choose_windows(
        load_tokenizer(pyllama), read_texts((TEXT,)), 2, 40, 0, 4096
    ).windows
    widest = LinearPlan(0.0, MIN_RHO)
    candidates = Candidates(model, linears, text, first, widest, seed=0)
    plans = {one.name: LinearPlan(0.4, 0.9) for one in linears}
    dense = {one.name: LinearPlan(0.0, 1.0) for one in linears}
    sparse_loss, dense_loss = candidates.losses([plans, dense])

    whole = AutoModelForCausalLM.from_pretrained(pyllama, dtype=torch.float32)
    inputs: dict[str, Tensor] = {}
    for one in linears:
        whole.get_submodule(one.name).register_forward_pre_hook(
            lambda module, args, name=one.name: inputs.update({name: args[0]})
        )
    labels = text[:, first + 1 :, None]

    def loss() -> float:
        logs = whole(text).logits[:, first:-1].log_softmax(-1)
        return -logs.gather(-1, labels).mean().item()

    # float32 through four layers, one window at a time or both together.
    assert dense_loss == pytest.approx(loss(), rel=1e-5)
    scores = {}
    for one in linears:
        norms = whole.get_submodule(one.name).weight.norm(dim=0)
        scores[one.name] = (inputs[one.name].abs() * norms).flatten()
    for one in linears:
        linear = whole.get_submodule(one.name)
        w = linear.weight.detach()
        rank = plans[one.name].rank(one.shape)
        u, s, vh = torch.linalg.svd(w)
        # In the checkpoint's dtype, as the artifact stores them.
        u, vh = (
            (u[:, :rank] * s[:rank]).bfloat16().float(),
            vh[:rank].bfloat16().float(),
        )
        low = u @ vh
        # Midway between two scores, as in the package.
        count = len(scores[one.name])
        dropped = count - round(plans[one.name].keep * count)
        limit = scores[one.name].sort().values[dropped - 1 : dropped + 1].mean()
        norms = w.norm(dim=0)

        def forward(
            x: Tensor, w: Tensor = w, low: Tensor = low, t: Tensor = limit / norms
        ) -> Tensor:
            kept = x * (x.abs() > t)
            y = kept @ w.T + (x - kept) @ low.T
            return torch.cat([x[:, :first] @ w.T, y[:, first:]], 1)

        linear.forward = forward
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
    sizes = {one.name: one.shape[0] * one.shape[1] for one in linears}
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
    pyllama: Path, tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(options(pyllama, tmp_path / "whole", recipe))
    assert not list(tmp_path.glob("*.jsonl"))

    calls = 0
    note = Journal.note

    def interrupted(self: Journal, results: dict[str, float]) -> None:
        nonlocal calls
        calls += 1
        note(self, results)
        if calls == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note", interrupted)
        # One candidate at a time, however fast this machine is.
        patch.setattr(search_evolution, "NOTE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            prepare(options(pyllama, tmp_path / "out", recipe))
    # The staging directory is gone.
    (journal,) = [path for path in tmp_path.iterdir() if path.name != "whole"]
    assert journal.name == "out.search.jsonl"
    # As if it had been killed in the middle of a line.
    journal.write_text(journal.read_text() + '{"key": "ab')

    counted: list[str] = []

    def counting(self: Journal, results: dict[str, float]) -> None:
        counted.extend(results)
        note(self, results)

    monkeypatch.setattr(Journal, "note", counting)
    again = prepare(options(pyllama, tmp_path / "out", recipe))
    assert again.tensors_sha256 == whole.tensors_sha256
    total = 4 if recipe == "greedy" else 4 + 2 * 2
    assert len(counted) == total - 2
    assert not journal.exists()


@pytest.mark.usefixtures("small_search")
def test_seeds(pyllama: Path, tmp_path: Path) -> None:
    digests = [
        prepare(
            options(pyllama, tmp_path / str(i), "evolutionary-joint", seed)
        ).tensors_sha256
        for i, seed in enumerate((0, 0, 1))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_journal_of_another_search_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "j"
    one = Journal(path, {"seed": 0})
    one.note({"a": 1.0})
    assert Journal(path, {"seed": 0}).get("a") == 1.0
    assert Journal(path, {"seed": 1}).get("a") is None
    assert not path.exists()
