# SPDX-License-Identifier: Apache-2.0
"""The base model as transformers builds it: whole in memory, or without weights."""

import math
from typing import Any

import torch

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.attention import attention_implementation
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.language_model import LanguageModel


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a checkpoint; quantized linears are dequantised.

    Args:
        checkpoint: the base model, or a prepared directory's link to it.
        dtype: of weights and activations.
        device: where to put it.

    Raises:
        Exception: whatever transformers raises for unknown architectures, remote code
            or broken weights.
    """
    import transformers

    directory = checkpoint.directory
    auto = transformers.AutoModelForCausalLM
    if LanguageModel(checkpoint).family.text_config is not None:
        auto = transformers.AutoModelForImageTextToText
    config = transformers.AutoConfig.from_pretrained(directory)
    # transformers would look for a quantizer; weights are read dequantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    settings = {
        "config": config,
        "dtype": dtype,
        "attn_implementation": attention_implementation(config),
    }
    if not checkpoint.quantized:
        model = auto.from_pretrained(directory, **settings)
    else:
        with torch.device("meta"):
            architecture = type(auto.from_config(config))
        weights = checkpoint.read(checkpoint.plain_names(), dequantised=dtype)
        model = architecture.from_pretrained(None, state_dict=weights, **settings)
    return model.to(device).eval()


def load_skeleton(tensors: LanguageModel, dtype: torch.dtype) -> Any:
    """A checkpoint's language model on the meta device, without weights.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tensors.checkpoint.directory
    try:
        config = AutoConfig.from_pretrained(directory)
        if tensors.family.text_config is not None:
            config = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention_implementation(config),
            )
    # Unknown architectures, remote code, broken configs: each its own exception.
    except Exception as error:
        raise CheckpointError(
            f"{directory / 'config.json'}: transformers cannot build this"
            f" model ({error}); models that need remote code are not supported"
        ) from error
    return model.eval()


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of the weights of a loaded model."""
    elements = 0
    for name in checkpoint.plain_names():
        if name in checkpoint.tensors:
            shape: tuple[int, ...] | None = checkpoint.tensors[name].shape
        else:  # INT4: packed, under other names
            shape = checkpoint.linear_shape(name.removesuffix(".weight"))
        elements += math.prod(shape or ())
    return elements * dtype.itemsize
