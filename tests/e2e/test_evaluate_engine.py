# SPDX-License-Identifier: Apache-2.0
"""``evaluate --engine vllm``: the served kernels' scores against plain PyTorch."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from transformers import AutoTokenizer

from vllm_rsparse.artifact.prepared import PreparedDirectory
from vllm_rsparse.cli import main
from vllm_rsparse.evaluate.engine import run_engine

pytestmark = pytest.mark.serve

WINDOW, FIRST = 96, 9


def test_scores_and_counts_equal_plain_pytorch(
    pyllama, tmp_path, plain_pytorch, monkeypatch
):
    prepared = tmp_path / "prepared"
    stdlib = Path(sysconfig.get_path("stdlib"))
    command = ["prepare", pyllama, prepared, "--sparsity", "0.5", "--device", "cpu"]
    command += ["--recipe", "uniform", "--head-sparsity", "0.05"]
    command += ["--calibration-samples", "2", "--calibration-tokens", "256"]
    command += ["--calibration-data", stdlib / "argparse.py"]
    assert main([str(word) for word in command]) == 0
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        ("TRITON_INTERPRET", "0"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        monkeypatch.setenv(name, value)
    plain = plain_pytorch(prepared, limit=100_000)
    text = Path(json.__file__).read_text()
    ids = AutoTokenizer.from_pretrained(prepared)(text)["input_ids"]
    windows = torch.tensor(ids[: 4 * WINDOW]).view(-1, WINDOW)

    kept = {}

    def count(name):
        def hook(module, inputs):
            fraction = (inputs[0].abs() > module.threshold).float().mean()
            kept.setdefault(name, []).append(fraction)

        return hook

    for name, module in plain.model.named_modules():
        if hasattr(module, "threshold"):
            # Each is the only part of a linear that may be fused.
            linear = name.removesuffix(".parts.0")
            module.register_forward_pre_hook(count(linear))
    with torch.no_grad():
        logits = plain.model(windows).logits[:, FIRST:-1].flatten(0, 1)
    labels = windows[:, FIRST + 1 :].reshape(-1, 1)
    expected = logits.log_softmax(-1).gather(1, labels).squeeze(1)

    scores = run_engine(
        PreparedDirectory.open(prepared), windows, FIRST, "auto", sparse=True
    )
    assert scores.run.device == "cpu"
    assert scores.run.dtype == "float32"
    served = torch.tensor(scores.log_probabilities)
    assert len(served) == 4 * (WINDOW - FIRST - 1)
    # A channel at its threshold may fall either way under another order of sums: the
    # bulk agrees to rounding, one in eight moves by more than 0.01 (so do float32 and
    # float64 in plain PyTorch), all by 0.02 on average.
    assert (served - expected).abs().median() < 1e-3
    assert (served - expected).abs().mean() < 0.05
    likeliest = torch.tensor(scores.likeliest)
    assert (likeliest == logits.argmax(-1)).float().mean() > 0.97
    assert scores.kept.keys() == kept.keys()
    for name, fractions in kept.items():
        assert scores.kept[name][0] == pytest.approx(
            torch.stack(fractions).mean().item(), abs=1e-3
        )
