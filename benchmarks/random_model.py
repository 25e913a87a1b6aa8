# SPDX-License-Identifier: Apache-2.0
"""Model directories with real shapes and no weights, for vLLM's dummy load format.

vLLM fills the weights from a seed, so every engine of a run sees the same model. The
artifact's thresholds keep everything; ``serve_worker.py`` finds those that give the
requested kept fraction and sets them in the running engine.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_rsparse.artifact.quantization import QUANT_METHOD, QuantizationSettings
from vllm_rsparse.artifact.schema import (
    ArtifactInfo,
    BaseWeights,
    LinearEntry,
    factor_rank,
)
from vllm_rsparse.artifact.tensors import (
    ARTIFACT_DIR,
    JSON_NAME,
    TENSORS_NAME,
    file_sha256,
)
from vllm_rsparse.artifact.versions import write_info
from vllm_rsparse.formats.names import AS_STORED


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: sizes in features, heads and layers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 0

    @property
    def head(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The seven linears of one decoder layer, name -> (N, K)."""
        q, kv = self.head * self.heads, self.head * self.kv_heads
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


SHAPES = {
    "pyllama-8m": Shape(384, 1024, 4, 6, 2, 4096),  # the bundled model's
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 32768),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
    # Without the norms of q and k that Qwen3 has.
    "qwen3-32b": Shape(5120, 25600, 64, 64, 8, 151936, head_dim=128),
    "tiny": Shape(256, 512, 2, 4, 2, 512),
}


def _compressed(weights: dict[str, Any], activations: dict[str, Any] | None) -> dict:
    """``quantization_config`` as compressed-tensors writes it."""
    integer = weights["type"] == "int"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if integer else "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"dynamic": False, "symmetric": True, **weights},
                "input_activations": activations,
            }
        },
    }


_INT4_GROUP = 128
# Quantized while it loads; no base model has it.
PLANES = "int8-planes"
# Weight format -> quantization_config of the base model.
WEIGHTS: dict[str, dict | None] = {
    "bf16": None,
    PLANES: None,
    "fp8": _compressed(
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {
            "num_bits": 8,
            "type": "float",
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
        },
    ),
    "fp8-block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
    },
    "int4": _compressed(
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": _INT4_GROUP},
        None,
    ),
}


@dataclass(frozen=True)
class Variant:
    """What a sparse model differs in from others of its shape.

    Attributes:
        weights: format of the base model's weights, a key of ``WEIGHTS``.
        rho: share of the budget for exact channels; below 1, there are factors.
        head: format of the output layer.
    """

    weights: str = "bf16"
    rho: float = 1.0
    head: str = AS_STORED

    @property
    def suffix(self) -> str:
        """What names of files and engines end in."""
        rho = f"-rho{self.rho:g}" if self.rho < 1 else ""
        return rho + (f"-head-{self.head}" if self.head != AS_STORED else "")


def write_config(directory: Path, shape: Shape, quantization: dict | None) -> None:
    """Write ``config.json`` of a Llama of this shape."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def write_sparse_model(
    directory: Path,
    shape: Shape,
    shares: Sequence[float],
    variant: Variant,
) -> None:
    """Write a model directory whose artifact keeps every channel.

    Args:
        directory: where to write.
        shape: the decoder's shape.
        shares: of the channels that the thresholds will keep once they are found, for
            each plane of the weights. The plug-in's default switch point depends on
            them, and with ``variant.rho`` they set the ranks.
        variant: weights, rho and the output layer.
    """
    weights, rho = variant.weights, variant.rho
    planes, sparsity = len(shares), round(1 - shares[0] / rho, 9)
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, LinearEntry] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(shape.layers):
        for kind, (n, k) in shape.linears.items():
            name = f"model.layers.{layer}.{kind}"
            rank = factor_rank(n, k, sparsity, rho)
            rows = (planes, k) if planes > 1 else (k,)
            tensors[f"{name}.thresholds"] = torch.full(rows, -1.0)
            if rank > 0:
                # Small: the model's activations stay as they would be without.
                for field, size in (("u", (n, rank)), ("v", (rank, k))):
                    factor = torch.randn(*size, generator=generator) * 1e-3
                    tensors[f"{name}.{field}"] = factor.bfloat16()
            entries[name] = LinearEntry(
                (n, k),
                sparsity,
                rho,
                rank,
                shares[0],
                full_fraction=shares[1] if planes > 1 else None,
            )
    artifact = directory / ARTIFACT_DIR
    artifact.mkdir(parents=True, exist_ok=True)
    save_file(tensors, artifact / TENSORS_NAME)
    digest = file_sha256(artifact / TENSORS_NAME)
    name = "float" if WEIGHTS[weights] is None else weights
    stored = BaseWeights(name, "bfloat16", _INT4_GROUP if weights == "int4" else 0)
    load_time = {"weights": PLANES} if planes > 1 else {}
    if variant.head != AS_STORED:
        load_time["head"] = variant.head
    info = ArtifactInfo(sparsity, entries, "bfloat16", digest, stored, **load_time)
    (artifact / JSON_NAME).write_text(write_info(info))
    quantization = QuantizationSettings(
        quant_method=QUANT_METHOD,
        artifact=ARTIFACT_DIR,
        artifact_sha256=digest,
        sparsity=sparsity,
        base=WEIGHTS[weights],
        **load_time,
    )
    write_config(directory, shape, quantization.to_dict())
