# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints of families whose names the engine changes.

Wrappers, fused tensors, hybrids and mixtures of experts: their ``quantization_config``
has the checkpoint's names, their layers have the engine's. vLLM loads the checkpoint on
one simulated rank and on each of two, and every sparse layer must compute what the
definition gives on the dequantised weight.
"""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")

from safetensors.torch import load_file
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import RowParallelLinear

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.plugin import register
from vllm_rsparse.serving import config
from vllm_rsparse.serving.base import base_method
from vllm_rsparse.testing.cases import one_linear
from vllm_rsparse.testing.families import FAMILIES, separate
from vllm_rsparse.testing.quantized import write_quantized

from .simulated import build_model, output, sparse_linears

pytestmark = pytest.mark.usefixtures("torchvision", "inspected_here")

# Every shard of each of two ranks is at least one block of 128 x 128.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 64,
}
# As published: Qwen's FP8 and GPTQ, Gemma's w4a16, AWQ and FP8 of others.
CASES = [
    ("Qwen3.5 vision", "fp8-block-native"),
    ("Qwen3.5", "w4a16-g128"),
    ("Qwen3 MoE", "fp8-block-native"),
    ("Qwen3 MoE", "gptq"),
    ("Gemma4", "w4a16-g64"),
    ("Gemma4 vision", "w4a16-g64"),
    ("Mistral3", "fp8-channel"),
    ("Gemma3 vision", "awq"),
    ("Phi3", "awq"),
    ("Glm4", "fp8-block"),
]


def without_experts(base, layer, prefix, packed_modules_mapping):
    """vLLM has no quantized experts for CPUs: FP8 needs AMX, four bits a GPU."""
    if isinstance(layer, RoutedExperts):
        return None
    return base_method(base, layer, prefix, packed_modules_mapping)


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_ranks_compute_with_the_dequantised_weights(
    family, layout, tmp_path, write_artifact, monkeypatch
):
    torch.manual_seed(0)
    register()
    options = dict(FAMILIES[family].options)
    if "num_experts" in options:
        options["moe_intermediate_size"] = 256
        monkeypatch.setattr(config, "base_method", without_experts)
    replace(FAMILIES[family], options=options).save(tmp_path / "plain", SIZES)
    base = tmp_path / "base"
    linears = separate(write_quantized(tmp_path / "plain", base, layout), SIZES)
    shapes = {
        name.removesuffix(".weight"): (*weight.shape, 2, True)
        for name, weight in linears.items()
        if name.endswith(".weight")
    }
    stored = Checkpoint(base).linear_format(
        next(name for name in shapes if name.endswith("o_proj"))
    )
    artifact = write_artifact(
        base / "rsparse",
        shapes,
        dtype=torch.bfloat16,
        base={"format": stored[0], "group": stored[1], "dtype": "bfloat16"},
    )
    values = json.loads((base / "config.json").read_text())
    values["quantization_config"] = {
        "quant_method": "rsparse",
        "artifact": "rsparse",
        "backend": "reference",
        "max_sparse_tokens": 8,
        "base": values["quantization_config"],
    }
    (base / "config.json").write_text(json.dumps(values))
    # vLLM's own methods have no float32, except for compressed-tensors.
    model_config = ModelConfig(str(base), skip_tokenizer_init=True, dtype="bfloat16")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if ".experts." not in name}
    for size in (1, 2):
        ranks = [
            sparse_linears(build_model(monkeypatch, model_config, tensors, rank, size))
            for rank in range(size)
        ]
        names = [n for layer in ranks[0].values() for n in layer.quant_method.names]
        assert set(names) == set(artifact)
        for name, first in ranks[0].items():
            layers = [rank[name] for rank in ranks]
            check(first.quant_method.names, layers, linears, artifact)


def check(names, layers, linears, artifact):
    first = layers[0]
    row_parallel = isinstance(first, RowParallelLinear)
    k = first.input_size
    x = torch.randn(3, k).bfloat16()
    expected = [
        one_linear(
            x.float(),
            linears[f"{name}.weight"].float(),
            artifact[name],
            linears.get(f"{name}.bias"),
        )
        for name in names
    ]
    with torch.no_grad():
        if row_parallel:
            parts = x.chunk(len(layers), -1)
            found = [sum(output(*pair) for pair in zip(layers, parts, strict=True))]
        else:
            outputs = [
                output(layer, x).split(layer.quant_method.shard_sizes, -1)
                for layer in layers
            ]
            found = [torch.cat(shards, -1) for shards in zip(*outputs, strict=True)]
    for mine, wanted in zip(found, expected, strict=True):
        # bf16 has 8 bits; sums of 256 products are rounded at the end.
        scale = float(wanted.abs().max())
        torch.testing.assert_close(mine.float(), wanted, rtol=0, atol=0.02 * scale)
