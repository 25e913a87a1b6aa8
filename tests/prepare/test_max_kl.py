# SPDX-License-Identifier: Apache-2.0
"""``prepare --max-kl``: the sparsity that a loss allows."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_rsparse.artifact.card import card_line, held_out_loss
from vllm_rsparse.artifact.inspect import describe
from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.errors import CheckpointError, PrepareError
from vllm_rsparse.evaluate.loading import SwitchableModel
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.prepare.calibration.held_out import HeldOut
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.texts.documents import read_sources
from vllm_rsparse.texts.tokens import load_tokenizer
from vllm_rsparse.texts.windows import choose_windows

TEXT = Path(json.decoder.__file__)
SAMPLES, TOKENS, HELD_OUT = 3, 40, 2
MAX_KL = 0.05  # of the random model: somewhere between 5 and 95%
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def options(model: Path, output: Path, **changes: Any) -> PrepareOptions:
    settings: dict[str, Any] = {
        "sparsity": None,
        "max_kl": MAX_KL,
        "calibration_data": (TEXT,),
        "samples": SAMPLES,
        "tokens": TOKENS,
        "device": "cpu",
        "recipe": "wina",
    }
    return PrepareOptions(str(model), output, **(settings | changes))


def tensors(output: Path) -> bytes:
    return (output / "rsparse" / "rsparse.safetensors").read_bytes()


def test_the_artifact_and_its_figure(tiny_llama: Path, tmp_path: Path) -> None:
    """Those of the sparsity found, measured here through evaluation's own model."""
    info = prepare(options(tiny_llama, tmp_path / "out"))
    loss = held_out_loss(info)
    assert loss is not None
    assert 0 < loss.kl_divergence <= loss.max_kl == MAX_KL
    assert loss.tried[f"{info.sparsity:g}"] == loss.kl_divergence
    assert loss.tried[f"{info.sparsity + 0.01:g}"] > MAX_KL
    prepare(options(tiny_llama, tmp_path / "one", max_kl=None, sparsity=info.sparsity))
    assert tensors(tmp_path / "out") == tensors(tmp_path / "one")

    text = read_sources((TEXT,), "--calibration-data")
    chosen = choose_windows(
        load_tokenizer(tiny_llama), text, SAMPLES, TOKENS, 0, 4096, HELD_OUT
    )
    assert chosen.held_out is not None
    windows = chosen.held_out.ids
    assert len(windows) == HELD_OUT
    calibrated = {tuple(window) for window in chosen.windows.tolist()}
    assert calibrated.isdisjoint(map(tuple, windows.tolist()))
    prepared = PreparedDirectory.open(tmp_path / "out")
    first = TOKENS // 10
    model = SwitchableModel(Checkpoint(tiny_llama), torch.device("cpu"), torch.float32)
    model.use(prepared.artifact)
    dense, sparse = (
        model.logits(windows, first, on).log_softmax(-1) for on in (False, True)
    )
    expected = (dense.exp() * (dense - sparse)).sum(-1).mean().item()
    # Sums in another order.
    assert loss.kl_divergence == pytest.approx(expected, rel=1e-3)
    assert loss.tokens == HELD_OUT * (TOKENS - first)

    line = card_line(info)
    assert f"KL divergence from the dense model {loss.kl_divergence:.4f} nats" in line
    assert f"model card: {line}\n" in describe(info)


def test_only_the_answers_of_chats_count(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    chats = tmp_path / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i} plus {i}, and why so?"},
                {"role": "assistant", "content": f"it is {2 * i}"},
            ]
        }
        for i in range(100, 140)
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"calibration_data": (chats,), "recipe": "greedy"}
    info = prepare(options(model, tmp_path / "out", **settings))
    loss = held_out_loss(info)
    assert loss is not None
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    # An answer is about a quarter of its chat.
    assert 0 < loss.tokens < 0.4 * HELD_OUT * TOKENS


def test_bits_are_found_too(tiny_llama: Path, tmp_path: Path) -> None:
    planes = {"weights": "int8-planes", "max_kl": 0.005}
    info = prepare(options(tiny_llama, tmp_path / "out", **planes))
    loss = held_out_loss(info)
    assert loss is not None
    assert loss.kl_divergence <= 0.005
    assert info.bits_read is not None
    assert 1 < info.bits_read < 8
    assert f"{info.bits_read:.2f} bits read of a weight" in card_line(info)


def test_an_interrupted_search_resumes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(options(tiny_llama, tmp_path / "whole"))
    divergence = HeldOut.divergence
    measured: list[float] = []

    def killed(self: HeldOut, planned: Any) -> float:
        if len(measured) == 2:
            measured.append(-1)
            raise KeyboardInterrupt
        measured.append(divergence(self, planned))
        return measured[-1]

    monkeypatch.setattr(HeldOut, "divergence", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(tiny_llama, tmp_path / "out"))
    assert [path.name for path in tmp_path.glob("out*")] == ["out.search"]
    info = prepare(options(tiny_llama, tmp_path / "out"))
    assert info == whole
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    loss = held_out_loss(info)
    assert loss is not None
    tried = list(loss.tried.values())
    assert [kl for kl in measured if kl > 0] == tried  # none twice


def test_a_price_that_is_out_of_reach(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "divergence", lambda *args: 0.0125)
    message = r"--max-kl 0.01: out of reach, .* 0.0125 nats at a sparsity of 0.05"
    with pytest.raises(PrepareError, match=message):
        prepare(options(tiny_llama, tmp_path / "out", max_kl=0.01))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kl": 0.0}, r"--max-kl must be a positive number, got 0.0"),
        ({"max_kl": float("nan")}, r"--max-kl must be a positive number, got nan"),
        ({"sparsity": 0.5}, r"--max-kl 0.05: finds the sparsity, so .* --sparsity"),
        ({"bits": 4.2, "weights": "int8-planes"}, r"--max-kl 0.05: finds the sparsity"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PrepareError, match=message):
        options(Path("model"), Path("out"), **changes)


def test_recipes_and_texts_that_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    message = r"--max-kl 0.05: recipe 'evolutionary' searches for long .* --recipe best"
    with pytest.raises(PrepareError, match=message):
        prepare(options(tiny_llama, tmp_path / "out", recipe="evolutionary"))
    short = tmp_path / "short.txt"
    short.write_text("x = 1\n" * 12)
    with pytest.raises(CheckpointError, match="tokens, fewer than two windows of 40"):
        prepare(options(tiny_llama, tmp_path / "out", calibration_data=(short,)))
