# SPDX-License-Identifier: Apache-2.0
"""``evaluate`` against an independent computation of the same protocol."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_rsparse.artifact import (
    JSON_NAME,
    TENSORS_NAME,
    ArtifactInfo,
    LinearEntry,
    file_sha256,
)
from vllm_rsparse.cli import main
from vllm_rsparse.reference import rsparse_linear

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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(Path(json.__file__).read_text()[:2500])
    return path


@pytest.fixture
def prepared(
    pyllama: Path, base: nn.Module, tmp_path: Path
) -> Callable[[str, Callable[[str, int, int], dict[str, Tensor]]], Path]:
    """Write a prepared directory; the tensors of each linear come from a function."""

    def write(
        name: str, tensors_of: Callable[[str, int, int], dict[str, Tensor]]
    ) -> Path:
        directory = tmp_path / name
        artifact = directory / "rsparse"
        artifact.mkdir(parents=True)
        for file in pyllama.iterdir():
            if file.suffix in (".safetensors", ".json") and file.name != "config.json":
                (directory / file.name).symlink_to(file)
        entries, tensors = {}, {}
        for linear, module in linears_of(base).items():
            n, k = module.weight.shape
            mine = tensors_of(linear, n, k)
            rank = mine["v"].shape[0] if "v" in mine else 0
            entries[linear] = LinearEntry(
                (n, k), 0.5, 1, rank, 0.5, bias="bias" in mine
            )
            tensors |= {f"{linear}.{suffix}": t for suffix, t in mine.items()}
        save_file(tensors, artifact / TENSORS_NAME)
        digest = file_sha256(artifact / TENSORS_NAME)
        info = ArtifactInfo(0.5, entries, "float32", digest)
        (artifact / JSON_NAME).write_text(info.to_json())
        config = json.loads((pyllama / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "rsparse",
            "format_version": 1,
            "artifact": "rsparse",
            "artifact_sha256": digest,
        }
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


def constant(value: float) -> Callable[[str, int, int], dict[str, Tensor]]:
    return lambda name, n, k: {"thresholds": torch.full((k,), value)}


def mixed(name: str, n: int, k: int) -> dict[str, Tensor]:
    """Thresholds near the median input, factors on q, corrections on o."""
    tensors = {"thresholds": 0.6 * torch.rand(k)}
    if name.endswith("q_proj"):
        tensors["u"] = 0.05 * torch.randn(n, 3)
        tensors["v"] = 0.05 * torch.randn(3, k)
    if name.endswith("o_proj"):
        tensors["bias"] = 0.02 * torch.randn(n)
    return tensors


def evaluate(directory: Path, text: Path, *options: str) -> dict[str, Any]:
    out = text.with_suffix(".json")
    arguments = ["--data", str(text), "--window", str(WINDOW), "--device", "cpu"]
    arguments += ["--json", str(out), *options]
    assert main(["evaluate", str(directory), *arguments]) == 0
    return json.loads(out.read_text())


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
        n, k = module.weight.shape
        u = mine.get("u", torch.zeros(n, 0))
        v = mine.get("v", torch.zeros(0, k))

        def forward(x: Tensor) -> Tensor:
            y = x @ module.weight.T
            if self.sparse:
                tail = x[0, FIRST:]
                y[0, FIRST:] = rsparse_linear(
                    tail,
                    module.weight,
                    mine["thresholds"][None],
                    u,
                    v,
                    mine.get("bias"),
                )
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


def test_figures_agree_with_an_independent_computation(
    prepared: Any, base: Any, pyllama: Path, text: Path
) -> None:
    tensors: Tensors = {}

    def remember(name: str, n: int, k: int) -> dict[str, Tensor]:
        tensors[name] = mixed(name, n, k)
        return tensors[name]

    document = evaluate(prepared("mixed", remember), text)
    ids = AutoTokenizer.from_pretrained(pyllama)(
        text.read_text(), add_special_tokens=False
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


def test_thresholds_that_keep_all_lose_nothing(prepared: Any, text: Path) -> None:
    result = evaluate(prepared("all", constant(-1.0)), text)["results"][0]
    assert result["ratio"] == 1.0
    assert result["kl_divergence"] == 0.0
    assert result["top1_agreement"] == 1.0
    assert result["achieved_sparsity"] == 0.0


def test_thresholds_that_keep_nothing(prepared: Any, text: Path) -> None:
    result = evaluate(prepared("none", constant(math.inf)), text)["results"][0]
    assert result["achieved_sparsity"] == 1.0
    assert set(result["by_kind"].values()) == {1.0}
    assert result["perplexity_sparse"] > 10 * result["perplexity_dense"]


def test_compare_gives_what_separate_runs_give(
    prepared: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = prepared("one", mixed), prepared("two", constant(0.2))
    together = evaluate(one, text, "--compare", str(two))["results"]
    table = capsys.readouterr().out
    apart = [evaluate(path, text)["results"][0] for path in (one, two)]
    assert together == apart
    assert table.splitlines()[0].split() == ["one", "two"]


def test_windows_are_limited_and_spread(prepared: Any, text: Path) -> None:
    directory = prepared("few", constant(0.1))
    protocol = evaluate(directory, text, "--max-windows", "2")["protocol"]
    assert protocol["windows"] == 2
    assert protocol["windows_available"] > 2


def test_plot_of_loss_against_bytes(prepared: Any, text: Path) -> None:
    out = text.with_name("loss.png")
    other = prepared("other", constant(0.5))
    evaluate(
        prepared("one", constant(0.2)), text, "--compare", str(other), "--plot",
        str(out), "--max-windows", "1",
    )  # fmt: skip
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_told_first(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(text), "--plot", "out.docx"]
    assert main(["evaluate", str(tmp_path), *arguments]) == 1
    assert "must end in one of" in capsys.readouterr().err


def test_provenance_of_the_figures(prepared: Any, text: Path) -> None:
    document = evaluate(prepared("few", constant(0.1)), text, "--max-windows", "1")
    assert document["data"][0]["sha256"] == file_sha256(text)
    assert set(document["versions"]) == {"vllm_rsparse", "torch", "transformers"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "4096"], "--window 4096 is more than the model's length of 2048"),
        (["--window", "2"], None),
        (["--window", "1"], "leaves no sparse position"),
        (["--window", "0"], "--window must be at least 1"),
        (["--max-windows", "0"], "--max-windows must be at least 1"),
        (["--dense-fraction", "1"], "--dense-fraction must lie in [0, 1)"),
        (["--dense-fraction", "nan"], "--dense-fraction must lie in [0, 1)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_protocol(
    prepared: Any,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str | None,
) -> None:
    text.write_text(Path(json.__file__).read_text())
    directory = prepared("any", constant(0.1))
    status = main(
        [
            "evaluate",
            str(directory),
            "--data",
            str(text),
            "--max-windows",
            "1",
            *options,
        ]
    )
    assert status == (0 if message is None else 1)
    if message is not None:
        assert message in capsys.readouterr().err


def test_bad_text(
    prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = prepared("any", constant(0.1))
    file = tmp_path / "bad.txt"
    for content, message in (
        (b"", "has 0 tokens, fewer than one window of 512"),
        (b"caf\xe9", "not UTF-8 text (byte 3)"),
        (None, "No such file"),
    ):
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        assert main(["evaluate", str(directory), "--data", str(file)]) == 1
        assert message in capsys.readouterr().err


def test_bad_directories(
    prepared: Any,
    pyllama: Path,
    tmp_path: Path,
    text: Path,
    edit_json: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = prepared("good", constant(0.1))
    other = prepared("other", constant(0.1))
    (other / "model.safetensors").unlink()
    weights = (pyllama / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[:-2] + b"\1\1")
    changed = prepared("changed", constant(0.1))
    edit_json(
        changed / "config.json",
        lambda raw: raw["quantization_config"].update(artifact_sha256="0" * 64),
    )
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "config.json: cannot be read as JSON"),
        ([str(pyllama)], "quant_method is None, not 'rsparse'"),
        ([str(changed)], "config.json: quantization_config.artifact_sha256 says 0000"),
        ([str(good), "--compare", str(other)], "its weights are not those of"),
    ):
        assert main(["evaluate", *arguments, "--data", str(text)]) == 1
        assert message in capsys.readouterr().err


def test_artifact_of_another_model(
    prepared: Any,
    text: Path,
    edit_json: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = prepared("foreign", constant(0.1))
    # Same tensors, but the config describes a model with two layers fewer.
    edit_json(directory / "config.json", lambda raw: raw.update(num_hidden_layers=2))
    assert main(["evaluate", str(directory), "--data", str(text)]) == 1
    assert "belongs to another model" in capsys.readouterr().err
