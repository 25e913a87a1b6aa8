# SPDX-License-Identifier: Apache-2.0
"""Families through prepare and vLLM as a whole, on small random models.

The reference model is a Llama; here are the families whose decoder differs in what it
computes around its linears, prepared with the default recipe.
``tests/serving/test_parallel_families.py`` has the layers of all.
"""

import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from transformers import AutoTokenizer

from vllm_rsparse.cli import main
from vllm_rsparse.testing.families import FAMILIES

from .offline import ALWAYS_SPARSE
from .served import (
    NEW_TOKENS,
    PROMPTS,
    assert_same_scores,
    assert_same_tokens,
    nearest_scores,
)

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


# What differs around the linears: windows, biases, norms, capped logits, layers without
# values or keys, routed experts, scaled residuals, fused weights, norms elsewhere.
CASES = [
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Gemma2",
    "Gemma3",
    "Gemma4 E2B",
    "Qwen3 MoE",
    "Qwen2 MoE",
    "Granite",
    "Glm4",
    "Phi3",
    "Olmo3",
]


@pytest.mark.parametrize("family", CASES)
def test_scores_and_greedy_tokens_equal_plain_pytorch(
    family, tmp_path, pyllama, offline, plain_pytorch
):
    torch.manual_seed(0)
    base, prepared = tmp_path / "base", tmp_path / "prepared"
    FAMILIES[family].save(base, SIZES)
    for file in pyllama.glob("tokenizer*"):
        (base / file.name).write_bytes(file.read_bytes())
    text = Path(sysconfig.get_path("stdlib")) / "argparse.py"
    command = ["prepare", base, prepared, "--device", "cpu", "--sparsity", "0.5"]
    command += ["--calibration-samples", "2", "--calibration-tokens", "128"]
    command += ["--calibration-data", text]
    assert main([str(word) for word in command]) == 0

    tokens = torch.randint(2, SIZES["vocab_size"], (192,)).tolist()
    tokenizer = AutoTokenizer.from_pretrained(prepared)
    prompts = [tokens, *(tokenizer(prompt).input_ids for prompt in PROMPTS)]
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    scored, *continued = offline.run(
        ALWAYS_SPARSE,
        {
            "model": str(prepared),
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 8,
        },
        [{"prompt_token_ids": ids} for ids in prompts],
        {**sampling, "prompt_logprobs": 0, "detokenize": False},
    )
    reference = plain_pytorch(prepared, limit=100_000)
    served = torch.tensor(scored["given"])
    sparse = nearest_scores(served, reference, tokens)
    dense = plain_pytorch(prepared, limit=0).log_probabilities(tokens)
    assert_same_scores(served, sparse, dense)
    assert_same_tokens([found["tokens"] for found in continued], reference)
