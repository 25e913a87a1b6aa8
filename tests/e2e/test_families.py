# SPDX-License-Identifier: Apache-2.0
"""Each supported architecture through prepare and vLLM, on small random models.

The reference model is a Llama; here are the families whose decoder differs: sliding
windows (Mistral), biases on q, k, v (Qwen2), norms on q and k (Qwen3), capped logits
and windows in every other layer (Gemma).
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
import transformers
from served import assert_same_scores, score_offline

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
FAMILIES = {
    "Mistral": {"sliding_window": 64},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "Gemma3": {"sliding_window": 64, "query_pre_attn_scalar": 64},
}


@pytest.fixture
def base(request, tmp_path, pyllama):
    """A random model of the family, with the reference model's tokenizer."""
    family = request.param
    kind = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, kind)(**SIZES, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # zeros would hide its absence
    directory = tmp_path / family
    model.save_pretrained(directory)
    for file in pyllama.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("base", FAMILIES, indirect=True)
def test_log_probabilities_equal_plain_pytorch(base, tmp_path, plain_pytorch):
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    prepared = tmp_path / "prepared"
    command = [Path(sys.executable).parent / "vllm-rsparse", "prepare", base, prepared]
    command += ["--sparsity", "0.5", "--recipe", "uniform", "--rho", "0.8"]
    command += ["--calibration-samples", "4", "--calibration-tokens", "256"]
    command += ["--calibration-data", text]
    subprocess.run(command, check=True)

    tokens = torch.randint(2, SIZES["vocab_size"], (192,)).tolist()
    served = score_offline(prepared, tokens, tmp_path)
    sparse = plain_pytorch(prepared, limit=100_000).log_probabilities(tokens)
    dense = plain_pytorch(prepared, limit=0).log_probabilities(tokens)
    assert_same_scores(served, sparse, dense)
