# SPDX-License-Identifier: Apache-2.0
"""``evaluate --engine vllm`` without vLLM: arithmetic, counting, errors."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.cli import main
from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.evaluate import engine
from vllm_rsparse.evaluate.engine import EngineRun, Scores, measure_served, run_engine
from vllm_rsparse.evaluate.engine_worker import KeptChannels
from vllm_rsparse.op import layers, observers
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.testing.cases import make_case

RUN = EngineRun("cpu", "float32", "0.0")


@pytest.fixture
def directory(tmp_path: Path, write_artifact: Any, pyllama: Path) -> Path:
    """A prepared directory of two linears, of 8 x 4 and 4 x 8."""
    write_artifact(
        tmp_path / "rsparse",
        {
            "model.layers.0.mlp.up_proj": (8, 4, 0, False),
            "model.layers.0.mlp.down_proj": (4, 8, 0, False),
        },
    )
    for file in pyllama.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((pyllama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rsparse", "artifact": "rsparse"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_figures_of_two_engines(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    kept = {up: [0.5], down: [0.25]}
    engines = {
        False: Scores([math.log(0.5)] * 4, [1, 2, 3, 4], {}, RUN),
        True: Scores([math.log(0.25)] * 4, [1, 2, 9, 4], kept, RUN),
    }
    monkeypatch.setattr(
        engine, "run_engine", lambda *args, sparse, **rest: engines[sparse]
    )
    prepared = PreparedDirectory.open(directory)
    (loss,), run = measure_served([prepared], torch.zeros(1, 5), 0, "auto")
    assert loss.perplexity_dense == pytest.approx(2)
    assert loss.perplexity_sparse == pytest.approx(4)
    assert loss.ratio == pytest.approx(2)
    assert loss.top1_agreement == 0.75
    assert loss.kl_divergence is None
    assert loss.tokens == 4
    # Both have 32 weights: half of one is skipped, three quarters of the other.
    assert loss.achieved_sparsity == pytest.approx(0.625)
    assert loss.by_kind == {"up_proj": 0.5, "down_proj": 0.75}
    assert run == RUN


def test_kept_channels_are_counted_by_linear() -> None:
    x = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.1, -0.6]])
    thresholds = torch.tensor([[0.5, 0.5, 0.5], [2.0, 0.0, 2.0]])
    case = make_case(2, 3, (2, 2), (0, 0))
    case = replace(case, x=x).with_operands(thresholds=thresholds)
    number = layers.next_layer()
    layers.set_layer(thresholds, number)
    layer = nn.Module()
    layer.rsparse_thresholds = nn.Parameter(thresholds, requires_grad=False)
    layer.quant_method = SimpleNamespace(names=["q", "k"], layer_number=number)
    counts, others = KeptChannels(), []
    try:
        observers.add_observer(lambda *seen: others.append(seen))
        counts.watch(nn.Sequential(nn.Identity(), layer))
        for limit in (2, 0):  # sparse, then dense: not counted
            case.through_op(Backend.REFERENCE, limit)
        make_case(1, 3).through_op(Backend.REFERENCE)  # of no numbered layer
    finally:
        observers._observers.clear()
        layers.forget_layer(number)
    # Another observer sees the same calls.
    assert [(seen[0], seen[3]) for seen in others] == [(number, False), (number, True)]
    assert counts.fractions() == {"q": [3 / 6], "k": [2 / 6]}


def test_an_engine_that_fails(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker that ends with status 0 and leaves no result must not pass either.
    for worker, status in (("vllm_rsparse.nowhere", 1), ("this", 0)):
        monkeypatch.setattr(engine, "WORKER", worker)
        with pytest.raises(
            ArtifactError, match=rf"exit status {status}.*--engine torch"
        ):
            run_engine(
                PreparedDirectory.open(directory),
                torch.zeros(1, 5, dtype=torch.int64),
                0,
                "auto",
                sparse=True,
            )


@pytest.mark.parametrize(
    ("options", "installed", "message"),
    [
        (["--device", "cpu"], True, "--device cpu goes with --engine torch"),
        (["--window", "2048"], True, "leaves 2047 of the model's 2048 positions"),
        ([], False, "vLLM is not installed"),
    ],
)
def test_refused_before_an_engine_starts(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    installed: bool,
    message: str,
) -> None:
    text = directory / "text"
    text.write_text(Path(json.__file__).read_text() * 2)
    found = {"vllm": object() if installed else None}
    util = SimpleNamespace(find_spec=found.__getitem__)
    monkeypatch.setattr(engine, "importlib", SimpleNamespace(util=util))
    arguments = [str(directory), "--data", str(text), "--engine", "vllm", *options]
    assert main(["evaluate", *arguments]) == 1
    assert message in capsys.readouterr().err
