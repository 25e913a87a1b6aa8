# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a Hugging Face checkpoint: names, config, tokenizer, bfloat16 weights.

Needs the package ``gguf`` when it converts (``fetch.require_reader``).
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer


@dataclass(frozen=True)
class Kind:
    """What distinguishes an architecture, which has a name in GGUF.

    Attributes:
        architecture: transformers' class.
        model_type: transformers' name.
        config: keys of ``config.json`` that GGUF does not have.
        keys: further keys -> their names in GGUF.
        modules: modules of a layer that others do not have, or have by other names.
        pairs: q and k rotate neighbouring channels; transformers' rotate two halves.
        norm_offset: what GGUF's weights of norms have in addition to transformers'.
    """

    architecture: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    pairs: bool = False
    norm_offset: float = 0.0


KINDS = {
    "llama": Kind("LlamaForCausalLM", "llama", {"hidden_act": "silu"}, pairs=True),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2", {"hidden_act": "silu"}),
    "gemma3": Kind(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
        {
            "head_dim": "attention.key_length",
            "query_pre_attn_scalar": "attention.key_length",
            "sliding_window": "attention.sliding_window",
        },
        {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}
# GGUF's name of a module in a layer -> transformers'.
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert(file: Path, target: Path, tokenizer: Path | None = None) -> None:
    """Write config, tokenizer and bfloat16 weights of a GGUF file of ``KINDS``.

    Args:
        file: to read.
        target: folder to write.
        tokenizer: folder with the tokenizer, converted before; half of the time.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    kind = kind_of(reader)
    config = model_config(reader, kind)
    tensors = {}
    for stored in reader.tensors:
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        name, tensor = renamed(stored.name, values.float(), kind, config)
        tensors[name] = tensor.bfloat16().contiguous()
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    config |= {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    # Renamed when it is complete: whoever finds the directory may use it.
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if tokenizer is None:
        made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    else:
        made = AutoTokenizer.from_pretrained(tokenizer)
    if metadata(reader, "tokenizer.ggml.add_bos_token"):
        begin_with(made, config["bos_token_id"])
    made.save_pretrained(part)
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (part / "generation_config.json").write_text(json.dumps(generation) + "\n")
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    part.rename(target)


def begin_with(tokenizer: Any, bos: int) -> None:
    """Put a token before every text, which the conversion from GGUF leaves out."""
    if tokenizer("a").input_ids[0] == bos:
        return
    token = tokenizer.convert_ids_to_tokens(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, bos)]
    )


def kind_of(reader: Any) -> Kind:
    """The file's architecture.

    Raises:
        SystemExit: it is not one of ``KINDS``.
    """
    name = metadata(reader, "general.architecture")
    if name not in KINDS:
        raise SystemExit(f"GGUF of a {name}: only {', '.join(KINDS)} here")
    return KINDS[name]


def model_config(reader: Any, kind: Kind) -> dict[str, Any]:
    """``config.json`` without what the tensors' shapes tell."""
    name = metadata(reader, "general.architecture")

    def of_kind(key: str) -> Any:
        return metadata(reader, f"{name}.{key}")

    return {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "intermediate_size": of_kind("feed_forward_length"),
        "num_hidden_layers": of_kind("block_count"),
        "num_attention_heads": of_kind("attention.head_count"),
        "num_key_value_heads": of_kind("attention.head_count_kv"),
        "max_position_embeddings": of_kind("context_length"),
        "rms_norm_eps": of_kind("attention.layer_norm_rms_epsilon"),
        "rope_theta": of_kind("rope.freq_base") or 10000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        **kind.config,
        **{key: of_kind(theirs) for key, theirs in kind.keys.items()},
    }


def metadata(reader: Any, key: str) -> Any:
    """A scalar or a string of the file's header; None if it is not there."""
    entry = reader.fields.get(key)
    if entry is None:
        return None
    value = entry.parts[entry.data[0]]
    return bytes(value).decode() if entry.types[-1].name == "STRING" else value.item()


def renamed(
    name: str, tensor: Tensor, kind: Kind, config: dict[str, Any]
) -> tuple[str, Tensor]:
    """transformers' name of a tensor, and the tensor as transformers has it."""
    if name.endswith("norm.weight"):
        tensor = tensor - kind.norm_offset
    if name in OUTSIDE:
        return OUTSIDE[name], tensor
    _, layer, module, suffix = name.split(".")
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(module)
    if kind.pairs and heads is not None:
        pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    modules = MODULES | kind.modules
    return f"model.layers.{layer}.{modules[module]}.{suffix}", tensor
