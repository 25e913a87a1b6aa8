# SPDX-License-Identifier: Apache-2.0
"""``evaluate --chat``: the dense model's answers, prompt dense and answer sparse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_rsparse.cli import main
from vllm_rsparse.evaluate.measure import Passage, measure_passages
from vllm_rsparse.testing.cases import one_linear
from vllm_rsparse.testing.quantized import write_plain, write_quantized

from .prepared import constant, figures, mixed

PROMPTS = [
    {"domain": "code", "prompt": "def add(a, b):\n"},
    {"domain": "code", "prompt": "import os\nimport sys\n\n\nclass Parser:\n"},
    {"domain": "prose", "messages": [{"role": "user", "content": "The module gives"}]},
]
TOKENS = 12


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n")
    return file


def evaluate(directory: Path, chat: Path, *options: str) -> dict[str, Any]:
    answers = ("--answer-tokens", str(TOKENS))
    return figures(directory, "--chat", chat, *answers, *options)


def make_sparse(
    base: nn.Module, tensors: dict[str, dict[str, Tensor]], first: int
) -> None:
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name in tensors:

            def forward(
                x: Tensor, module: nn.Linear = module, mine: Any = tensors[name]
            ) -> Tensor:
                y = x @ module.weight.T
                y[0, first:] = one_linear(x[0, first:], module.weight, mine)
                return y

            module.forward = forward  # type: ignore[method-assign]


def test_figures_agree_with_an_independent_computation(
    write_prepared: Any, pyllama: Path, chat: Path
) -> None:
    tensors: dict[str, dict[str, Tensor]] = {}

    def remember(name: str, n: int, k: int) -> dict[str, Tensor]:
        tensors[name] = mixed(name, n, k)
        return tensors[name]

    document = evaluate(write_prepared("mixed", remember), chat)
    tokenizer = AutoTokenizer.from_pretrained(pyllama)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(pyllama, dtype=torch.float32).eval()

    sums: dict[str, list[tuple[float, float, int]]] = {}
    for line in PROMPTS:
        text = line.get("prompt") or line["messages"][0]["content"]  # type: ignore[index]
        ids = torch.tensor(tokenizer(text)["input_ids"])
        first, dense, sparse = len(ids), load(), load()
        for _ in range(TOKENS):
            with torch.inference_mode():
                ids = torch.cat([ids, dense(ids[None]).logits[0, -1:].argmax(-1)])
        make_sparse(sparse, tensors, first)
        with torch.inference_mode():
            exact, logs = (
                model(ids[None]).logits[0, first:-1].double().log_softmax(-1)
                for model in (dense, sparse)
            )
        kl = (exact.exp() * (exact - logs)).sum().item()
        agree = (exact.argmax(-1) == logs.argmax(-1)).sum().item()
        sums.setdefault(str(line["domain"]), []).append((kl, agree, len(logs)))
    results = {result["domain"]: result for result in document["results"]}
    assert results.keys() == sums.keys()
    for domain, found in sums.items():
        kl, agree, tokens = (sum(column) for column in zip(*found, strict=True))
        result = results[domain]
        # float32 sums in another order, through four layers.
        assert result["kl_divergence"] == pytest.approx(kl / tokens, rel=1e-4)
        assert result["top1_agreement"] == pytest.approx(agree / tokens)
        assert result["tokens"] == tokens
        assert kl / tokens > 0.01, "the artifact must hurt for this test to tell"
    assert results["prose"]["kl_standard_error"] is None
    assert results["code"]["kl_standard_error"] > 0


def test_passages_do_not_depend_on_those_they_run_with(
    write_prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_rsparse.artifact.prepared import PreparedDirectory
    from vllm_rsparse.evaluate import measure
    from vllm_rsparse.evaluate.loading import SwitchableModel

    prepared = PreparedDirectory.open(write_prepared("mixed", mixed))
    cpu = torch.device("cpu")
    model = SwitchableModel(prepared.checkpoint, cpu, torch.float32)
    sizes = ((20, 3), (31, 12), (25, 20))
    passages = [Passage(torch.randint(0, 4096, (n,)), first) for n, first in sizes]
    (together,) = measure_passages(model, [prepared], passages)
    monkeypatch.setattr(measure, "_BATCH_BYTES", 1)
    (alone,) = measure_passages(model, [prepared], passages)
    assert alone.kl_divergence == pytest.approx(together.kl_divergence, rel=1e-4)
    assert alone.achieved_sparsity == pytest.approx(
        together.achieved_sparsity, abs=1e-4
    )
    assert alone.tokens == together.tokens == sum(n - first - 1 for n, first in sizes)


def test_a_quantized_base_is_compared_with_the_model_it_was_made_from(
    write_prepared: Any,
    pyllama: Path,
    tmp_path: Path,
    chat: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its weights are the reference's, rounded: thresholds that keep all lose that."""
    directory = write_prepared("all", constant(-1.0))
    meant = write_quantized(pyllama, tmp_path / "q", "w4a16-g128")
    write_plain(pyllama, tmp_path / "plain", {k: v.float() for k, v in meant.items()})
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(tmp_path / "plain/model.safetensors")
    own = evaluate(directory, chat)
    assert {result["kl_divergence"] for result in own["results"]} == {0.0}
    other = evaluate(directory, chat, "--reference", str(pyllama))
    rows = [r for r in other["results"] if r["domain"] == "code"]
    assert [row["artifact_sha256"] is None for row in rows] == [True, False]
    assert rows[0]["kl_divergence"] == rows[1]["kl_divergence"] > 0
    head = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["all", "(dense)", "all"] for line in head)
    assert other["protocol"]["reference"] == str(pyllama)


def test_answers_are_kept_and_taken_from_the_file(
    write_prepared: Any,
    chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory, kept = write_prepared("mixed", mixed), tmp_path / "answers"
    first = evaluate(directory, chat, "--answers", str(kept))
    document = json.loads(kept.read_text())
    assert [len(one["answer"]) for one in document["answers"]] == [TOKENS] * 3
    document["answers"].pop()
    kept.write_text(json.dumps(document))
    second = evaluate(directory, chat, "--answers", str(kept))
    assert len(first["results"]) == 2
    assert second["results"] == first["results"][:1]
    arguments = ["--chat", str(chat), "--answers", str(kept), "--device", "cpu"]
    length = ("--answer-tokens", str(TOKENS))
    for edited, fault in (
        (document | {"answers": [{"domain": "a"}]}, "answers[0]: key 'prompt' is miss"),
        ({"asked": document["asked"]}, "key 'answers' is missing; remove it, or give"),
    ):
        kept.write_text(json.dumps(edited))
        assert main(["evaluate", str(directory), *arguments, *length]) == 1
        assert f"--answers {kept}: {fault}" in capsys.readouterr().err
    kept.write_text(json.dumps(document))
    chat.write_text(json.dumps(PROMPTS[0]))
    assert main(["evaluate", str(directory), *arguments]) == 1
    assert "holds the answers of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n{", "line 2"),
        ("[]", 'line 1: expected an object with "prompt"'),
        ('{"text": "a"}', 'line 1: expected an object with "prompt"'),
        ('{"prompt": 3}', "line 1: prompt must be a string, got 3"),
        ('{"prompt": ""}', "line 1: is an empty prompt; leave it out"),
        ('{"prompt": "a", "messages": []}', 'line 1: has "prompt" and "messages"'),
        ('{"messages": [{"role": "user"}]}', "messages[0].content must be a string"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}]}',
            "the last message must be the user's, got the role 'assistant'",
        ),
        (json.dumps({"prompt": "word " * 3000}), "leaves no room for an answer"),
    ],
)
def test_bad_prompts(
    write_prepared: Any,
    chat: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    chat.write_text(content)
    directory = write_prepared("mixed", mixed)
    assert main(["evaluate", str(directory), "--chat", str(chat)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x", "--answers", "y"], "--answers goes with --chat"),
        (["--data", "x", "--reference", "y"], "--reference goes with --chat"),
        (["--data", "x", "--answer-tokens", "8"], "--answer-tokens goes with --chat"),
        (["--chat", "x", "--window", "8"], "--window goes with --data; leave it out"),
        (["--chat", "x", "--max-windows", "8"], "--max-windows goes with --data"),
        (["--chat", "x", "--engine", "vllm"], "--chat goes with --engine torch"),
        (["--chat", "x", "--answer-tokens", "0"], "--answer-tokens must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err
