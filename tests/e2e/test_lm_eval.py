# SPDX-License-Identifier: Apache-2.0
"""A local task through lm-eval's vLLM model type, against plain PyTorch."""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-eval is not installed (600 MB): run `make lm-eval-test`",
    ),
]

QUESTIONS = 24


def logarithms(model, tokenizer, row):
    """Of the probability of each choice, all its tokens together."""
    context = len(tokenizer(row["context"]).input_ids)
    result = []
    for choice in row["choices"]:
        tokens = tokenizer(f"{row['context']}\n{choice}").input_ids
        result.append(model.log_probabilities(tokens)[context - 1 :].sum().item())
    return torch.tensor(result)


def test_a_local_task_counts_the_sparse_model(
    repository, pyllama, tmp_path, plain_pytorch
):
    stdlib = Path(sysconfig.get_path("stdlib"))
    bin_directory = Path(sys.executable).parent
    prepared, tasks, out = (tmp_path / name for name in ("prepared", "tasks", "out"))
    command = [bin_directory / "vllm-rsparse", "prepare", pyllama, prepared]
    command += ["--sparsity", "0.5", "--recipe", "uniform"]
    command += ["--calibration-samples", "2", "--calibration-tokens", "256"]
    command += ["--calibration-data", stdlib / "argparse.py"]
    subprocess.run(command, check=True)
    command = [sys.executable, repository / "benchmarks/next_line.py", tasks]
    command += [stdlib / "json/decoder.py", stdlib / "textwrap.py"]
    subprocess.run([*command, "--questions", str(QUESTIONS)], check=True)
    rows = [
        json.loads(line)
        for line in (tasks / "next_line.jsonl").read_text().split("\n")[:-1]
    ]
    assert len(rows) == QUESTIONS

    command = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args"]
    command += [
        f"pretrained={prepared},dtype=float32,max_model_len=1024,enforce_eager=True"
    ]
    command += ["--tasks", "next_line", "--include_path", tasks]
    command += ["--output_path", out, "--log_samples"]
    environment = os.environ | {
        "VLLM_RSPARSE_MAX_SPARSE_TOKENS": "100000",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TRITON_INTERPRET": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    subprocess.run(command, check=True, env=environment)
    (samples,) = out.rglob("samples_next_line_*.jsonl")
    served = torch.empty(QUESTIONS, 4)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        served[sample["doc_id"]] = torch.tensor(
            [float(response[0][0]) for response in sample["resps"]]
        )
    (results,) = out.rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["next_line"]["acc,none"]

    tokenizer = AutoTokenizer.from_pretrained(prepared)
    sparse, dense = (
        torch.stack([logarithms(model, tokenizer, row) for row in rows])
        for model in (
            plain_pytorch(prepared, limit=100_000),
            plain_pytorch(prepared, limit=0),
        )
    )
    # A channel at its threshold may fall either way under another order of sums (see
    # test_evaluate_engine): most answers agree to rounding, a quarter moved by more
    # than 0.01, one of 96 by 1.6; dense and sparse were 4.2 apart in the median.
    off = (served - sparse).abs()
    assert off.median() < 1e-3
    assert (off > 0.01).float().mean() < 0.5
    assert off.max() < 4
    assert (served - dense).abs().median() > 1
    answers = torch.tensor([row["answer"] for row in rows])
    right = served.argmax(1) == answers
    assert accuracy == pytest.approx(right.float().mean().item(), abs=1e-6)
    # A pick turns where the moved answers were near ties.
    turned = served.argmax(1) != sparse.argmax(1)
    best = sparse.topk(2, dim=1).values
    assert turned.sum() <= 2
    assert (best[:, 0] - best[:, 1])[turned].le(2).all()
