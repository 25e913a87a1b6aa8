# SPDX-License-Identifier: Apache-2.0
"""What a token reads, counted by hand for a mixture of experts and a dense model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.language_model import LanguageModel
from vllm_rsparse.model.linears import find_linears
from vllm_rsparse.model.reads import TokenReads, token_reads
from vllm_rsparse.testing.families import FAMILIES

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# q, k, v and o of the two layers.
ATTENTION = 2 * (16 + 8 + 8 + 16) * 16


def reads(family: str, directory: Path) -> TokenReads:
    FAMILIES[family].save(directory, SIZES)
    checkpoint = Checkpoint(directory)
    linears, _ = find_linears(checkpoint)
    return token_reads(LanguageModel(checkpoint), linears)


def test_two_of_eight_experts_and_the_router(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert reads("Qwen3 MoE", tmp_path) == TokenReads(
        linears=ATTENTION,
        experts=2 * 2 * 3 * 32 * 16,
        others=2 * 8 * 16,
        head=100 * 16,
    )


def test_a_dense_model_reads_its_linears_and_the_tied_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert reads("Llama tied", tmp_path) == TokenReads(
        linears=ATTENTION + 2 * 3 * 24 * 16, experts=0, others=0, head=100 * 16
    )


def test_keys_and_values_that_a_layer_takes_from_another_are_not_read(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    FAMILIES["Gemma4 E2B"].save(tmp_path, SIZES)
    file = tmp_path / "model.safetensors"
    unused = {"model.layers.3.self_attn.k_proj.weight": torch.zeros(64, 16)}
    save_file(load_file(file) | unused, file, {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    linears, _ = find_linears(checkpoint)
    counted = token_reads(LanguageModel(checkpoint), linears)
    per_layer_embeddings = 2 * 24 * 16
    assert counted.others == 4 * per_layer_embeddings
