# SPDX-License-Identifier: Apache-2.0
"""Small random checkpoints of every family that is tested, by transformers' classes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_GEMMA = {"sliding_window": 32}
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "image_size": 28,
    "vision_use_head": False,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 8,
    "num_position_embeddings": 16,
    "out_hidden_size": 0,  # the language model's
}


@dataclass(frozen=True)
class RandomFamily:
    """How to make a random model of an architecture.

    Attributes:
        architecture: transformers' class, without "ForCausalLM" and the like.
        config: transformers' config class, without "Config"; the architecture's if
            empty.
        options: of the config, besides the sizes; these include ``head_dim`` unless it
            is None here.
        wraps: model type of the language model that this architecture wraps.
        vision: options of the vision model's config.
        vision_tower: path of its tensors in published checkpoints, where transformers
            writes another.
    """

    architecture: str
    config: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    wraps: str = ""
    vision: Mapping[str, Any] = field(default_factory=lambda: _VISION)
    vision_tower: str = "vision_tower"

    def save(self, directory: Path, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
        """Write a random checkpoint; returns its tensors.

        Args:
            directory: to create.
            sizes: of the language model, by the names that Llama's config has.
        """
        self.build(sizes).save_pretrained(directory)
        file = directory / "model.safetensors"
        tensors = {
            name.replace("vision_tower", self.vision_tower, 1): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
        return tensors

    def build(self, sizes: Mapping[str, Any]) -> Any:
        """A random model in float32, biases and norms included.

        Args:
            sizes: of the language model, by the names that Llama's config has.
        """
        import transformers

        values = {**sizes, **self.options}
        values = {name: value for name, value in values.items() if value is not None}
        if values.get("hidden_size_per_layer_input"):
            values["vocab_size_per_layer_input"] = values["vocab_size"]
        config_class = getattr(
            transformers, f"{self.config or self.architecture}Config"
        )
        if self.wraps:
            tied = values.pop("tie_word_embeddings")
            vision = dict(self.vision)
            if "out_hidden_size" in vision:
                vision["out_hidden_size"] = values["hidden_size"]
            text = {"model_type": self.wraps, "tie_word_embeddings": tied, **values}
            config = config_class(
                text_config=text,
                vision_config=vision,
                tie_word_embeddings=tied,
            )
        else:
            config = config_class(**values)
        ending = "ForConditionalGeneration" if self.wraps else "ForCausalLM"
        architecture = getattr(transformers, f"{self.architecture}{ending}")
        model = architecture(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(std=0.5)  # zeros would hide its absence
        config.architectures = [f"{self.architecture}{ending}"]
        return model.eval()


# What a fused tensor of a checkpoint holds, in the order of its rows.
PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"),
}


def separate(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Weights and biases of the decoder layers' linears, one linear at a time.

    The splitting is written out here and not taken from ``model``, which the tests
    compare with it.

    Args:
        tensors: of a checkpoint.
        config: of the language model: its numbers of heads.
    """
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    result = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        parent, _, label = module.rpartition(".")
        takes_part = label.endswith("_proj") or label in {"in_proj_qkv", "in_proj_z"}
        if not takes_part or re.search(r"vision|visual|\.experts\b", name):
            continue
        if label == "qkv_proj":
            head = len(tensor) // (heads + 2 * kv_heads)
            parts = tensor.split([heads * head, kv_heads * head, kv_heads * head])
        elif label == "gate_up_proj":
            parts = tensor.chunk(2)
        elif label == "in_proj_qkv":
            parts = tensor.split([_DELTA_KEYS, _DELTA_KEYS, _DELTA_VALUES])
        else:
            parts = (tensor,)
        for part, part_label in zip(parts, PARTS.get(label, (label,)), strict=True):
            result[f"{parent}.{part_label}.{suffix}"] = part
    return result


# Gated DeltaNet: 8 heads of keys, 16 of values, 32 channels each. (To run, and not only
# to be built, vLLM's layer needs 128 on a CPU.)
_DELTA_KEYS, _DELTA_VALUES = 256, 512
_DELTA_NET = {
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED = {"shared_expert_intermediate_size": 48}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

_GEMMA4 = {
    **_TIED,
    **_GEMMA,
    "layer_types": ["sliding_attention", "full_attention"],
    "attention_k_eq_v": True,
    "global_head_dim": 64,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
}
# Per-layer embeddings; the last two layers have queries only, and wider MLPs. Published
# models of this kind have values in all other layers.
_GEMMA4_SHARED = {
    **_GEMMA4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 24,
}
_GEMMA4_VISION = {**_VISION, "head_dim": 8, "num_key_value_heads": 8}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

# What each is here for: sliding windows (Mistral), biases on q, k, v (Qwen2), norms on
# q and k (Qwen3), capped logits and windows in every other layer (Gemma).
FAMILIES = {
    "Llama": RandomFamily("Llama", options=_UNTIED),
    "Llama tied": RandomFamily("Llama", options=_TIED),
    "Mistral": RandomFamily("Mistral", options={**_UNTIED, "sliding_window": 32}),
    "Qwen2": RandomFamily("Qwen2", options=_TIED),
    "Qwen3": RandomFamily("Qwen3", options=_UNTIED),
    "Gemma2": RandomFamily("Gemma2", options={**_TIED, **_GEMMA}),
    "Gemma3": RandomFamily("Gemma3", "Gemma3Text", {**_TIED, **_GEMMA}),
    # A language model among others.
    "Mistral3": RandomFamily("Mistral3", options=_UNTIED, wraps="mistral"),
    "Ministral3": RandomFamily("Mistral3", options=_UNTIED, wraps="ministral3"),
    "Gemma3 vision": RandomFamily(
        "Gemma3",
        options={**_TIED, **_GEMMA},
        wraps="gemma3_text",
        vision_tower="vision_tower.vision_model",
    ),
    "InternVL": RandomFamily("InternVL", options=_UNTIED, wraps="qwen3"),
    # Several linears in one tensor.
    "Phi3": RandomFamily(
        "Phi3", options={**_UNTIED, "head_dim": None, "pad_token_id": 0}
    ),
    "Glm4": RandomFamily("Glm4", options={**_UNTIED, "pad_token_id": 0}),
    # The engine fuses and declares no mapping.
    "StableLm": RandomFamily("StableLm", options={**_UNTIED, "head_dim": None}),
    # Scaled embeddings, residuals and logits; norms elsewhere, none at all, one for
    # attention and MLP. vLLM builds some through its Transformers backend.
    "Granite": RandomFamily("Granite", options=_UNTIED),
    "SmolLM3": RandomFamily("SmolLM3", options={**_UNTIED, "pad_token_id": 0}),
    "Olmo2": RandomFamily("Olmo2", options={**_UNTIED, "head_dim": None}),
    "Olmo3": RandomFamily("Olmo3", options={**_UNTIED, "head_dim": None}),
    "Seed-OSS": RandomFamily("SeedOss", options=_UNTIED),
    "HunYuan dense": RandomFamily("HunYuanDenseV1", options=_UNTIED),
    "Cohere": RandomFamily("Cohere", options={**_TIED, "head_dim": None}),
    "Ernie 4.5": RandomFamily("Ernie4_5", options=_UNTIED),
    # Routed experts, and what stands next to them.
    "Qwen3 MoE": RandomFamily("Qwen3Moe", options={**_UNTIED, **_EXPERTS}),
    "Qwen2 MoE": RandomFamily(
        "Qwen2Moe", options={**_UNTIED, **_EXPERTS, **_SHARED, "head_dim": None}
    ),
    "Qwen3.5 MoE": RandomFamily(
        "Qwen3_5Moe",
        "Qwen3_5MoeText",
        {**_UNTIED, **_EXPERTS, **_SHARED, **_DELTA_NET, **_HYBRID},
    ),
    "Qwen3.5 MoE vision": RandomFamily(
        "Qwen3_5Moe",
        options={**_UNTIED, **_EXPERTS, **_SHARED, **_DELTA_NET, **_HYBRID},
        wraps="qwen3_5_moe_text",
        vision=_QWEN_VISION,
    ),
    # Layers of two head sizes, the second without values.
    "Gemma4": RandomFamily("Gemma4", "Gemma4Text", _GEMMA4),
    "Gemma4 E2B": RandomFamily("Gemma4", "Gemma4Text", _GEMMA4_SHARED),
    "Gemma4 MoE": RandomFamily(
        "Gemma4",
        "Gemma4Text",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "Gemma4 vision": RandomFamily(
        "Gemma4", options=_GEMMA4, wraps="gemma4_text", vision=_GEMMA4_VISION
    ),
    # A recurrent layer, then one of gated attention.
    "Qwen3.5": RandomFamily(
        "Qwen3_5", "Qwen3_5Text", {**_UNTIED, **_DELTA_NET, **_HYBRID}
    ),
    "Qwen3.5 vision": RandomFamily(
        "Qwen3_5",
        options={**_UNTIED, **_DELTA_NET, **_HYBRID},
        wraps="qwen3_5_text",
        vision=_QWEN_VISION,
    ),
}
