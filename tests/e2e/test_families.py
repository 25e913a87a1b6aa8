# SPDX-License-Identifier: Apache-2.0
"""Families through prepare and vLLM as a whole, on small random models.

The reference model is a Llama; here are the families whose decoder differs in what it
computes around its linears. ``tests/serving/test_parallel_families.py`` has the layers
of all.
"""

import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm_rsparse.cli import main
from vllm_rsparse.testing.families import FAMILIES

from .served import assert_same_scores

pytestmark = pytest.mark.serve

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    # Large weights: logits far apart, so that an error shows.
    "initializer_range": 0.1,
}


@pytest.mark.parametrize(
    "family", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Gemma4", "Qwen2 MoE"]
)
def test_log_probabilities_equal_plain_pytorch(
    family, tmp_path, pyllama, offline, plain_pytorch
):
    torch.manual_seed(0)
    base, prepared = tmp_path / "base", tmp_path / "prepared"
    FAMILIES[family].save(base, SIZES)
    for file in pyllama.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    command = ["prepare", base, prepared, "--device", "cpu"]
    command += ["--sparsity", "0.5", "--recipe", "uniform", "--rho", "0.8"]
    command += ["--calibration-samples", "4", "--calibration-tokens", "256"]
    command += ["--calibration-data", text]
    assert main([str(word) for word in command]) == 0

    tokens = torch.randint(2, SIZES["vocab_size"], (192,)).tolist()
    served = offline.score(prepared, tokens)
    sparse = plain_pytorch(prepared, limit=100_000).log_probabilities(tokens)
    dense = plain_pytorch(prepared, limit=0).log_probabilities(tokens)
    assert_same_scores(served, sparse, dense)
