# SPDX-License-Identifier: Apache-2.0
"""Small quantized checkpoints: a plain one, rounded to nearest, in each layout.

The packing is written out here and not taken from ``formats``, which the tests compare
with it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
# Makes the tensors of a linear, by suffix, and their dequantised float32 weight.
Quantise = Callable[[Tensor], tuple[Tensors, Tensor]]

# Names of what is quantized: not vision models, not gates and per-layer embeddings.
_QUANTIZED = (
    r"^(?!.*(vision|visual|audio|per_layer)).*(_proj|in_proj_qkv|in_proj_z)\.weight$"
)
E4M3_MAX = 448.0
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def write_quantized(source: Path, target: Path, layout: str) -> Tensors:
    """Write a quantized copy of a checkpoint of one file.

    Args:
        source: directory of a plain checkpoint. The linears of its language model are
            quantized, experts included; the config lists those that are not.
        target: directory to create.
        layout: one of ``LAYOUTS`` or ``INT8_LAYOUTS``.

    Returns:
        All tensors of the equivalent plain checkpoint, with float32 linears.
    """
    config, quantise = (LAYOUTS | INT8_LAYOUTS)[layout]
    stored, meant, plain = {}, {}, []
    for name, tensor in load_file(source / "model.safetensors").items():
        linear = name.rpartition(".")[0]
        if not re.search(_QUANTIZED, name):
            stored[name] = meant[name] = tensor
            if tensor.ndim == 2 and not linear.endswith(("embed_tokens", "lm_head")):
                plain.append(linear)
            continue
        parts, meant[name] = quantise(tensor.float())
        stored |= {f"{linear}.{suffix}": part for suffix, part in parts.items()}
    if plain:
        config = config | _left_out(config["quant_method"], plain)
    _write(source, target, stored, {"quantization_config": config})
    return meant


def _left_out(method: str, names: list[str]) -> dict[str, Any]:
    """How a method's config lists linears that are not quantized."""
    if method == "compressed-tensors":
        return {"ignore": ["lm_head", *names]}
    if method == "gptq":
        return {"dynamic": {f"-:{re.escape(name)}": {} for name in names}}
    return {"modules_to_not_convert": names}


def write_plain(source: Path, target: Path, tensors: Tensors) -> None:
    """Write a plain checkpoint with these tensors and the source's other files."""
    _write(source, target, tensors, {})


def _write(
    source: Path, target: Path, tensors: Tensors, changes: dict[str, Any]
) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            (target / file.name).write_text(file.read_text())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", {"format": "pt"})


def pack(codes: Tensor, dim: int) -> Tensor:
    """Eight neighbours along a dimension to an int32, low nibble first."""
    words = codes.to(torch.int64).unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    packed = (words << torch.arange(0, 32, 4)).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def round_groups(
    weight: Tensor, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales and zero points [N, K/G] of a weight [N, K]."""
    groups = weight.unflatten(1, (-1, group))
    if symmetric:
        zeros = torch.full(groups.shape[:2], 8.0)
        scales = groups.abs().amax(-1) / 7
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales).round()
    scales = scales.to(dtype)
    codes = (groups / scales.float()[..., None]).round() + zeros[..., None]
    return codes.clamp(0, 15).flatten(1), scales, zeros


def _int4(
    group: int | None, symmetric: bool, dtype: torch.dtype, arrange: Callable
) -> Quantise:
    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        size = group or weight.shape[1]
        codes, scales, zeros = round_groups(weight, size, symmetric, dtype)
        every = [t.float().repeat_interleave(size, 1) for t in (scales, zeros)]
        return arrange(codes, scales, zeros), (codes - every[1]) * every[0]

    return quantise


def _pack_quantized(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensors:
    shape = torch.tensor(codes.shape)
    return {
        "weight_packed": pack(codes, 1),
        "weight_scale": scales,
        "weight_shape": shape,
    }


def _pack_quantized_zeros(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensors:
    packed = {"weight_zero_point": pack(zeros, 0)}
    return _pack_quantized(codes, scales, zeros) | packed


def _awq(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensors:
    def order(values: Tensor) -> Tensor:
        return values.t().unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)

    return {
        "qweight": pack(order(codes), 1),
        "qzeros": pack(order(zeros), 1),
        "scales": scales.t(),
    }


def _gptq(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensors:
    k, groups = codes.shape[1], scales.shape[1]
    return {
        "qweight": pack(codes.t(), 0),
        "qzeros": pack(zeros.t() - 1, 1),
        "scales": scales.t(),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }


def _fp8_channel(weight: Tensor) -> tuple[Tensors, Tensor]:
    scales = (weight.abs().amax(1, keepdim=True) / E4M3_MAX).bfloat16()
    return _fp8(weight, scales, scales.float(), "weight_scale")


def _fp8_tensor(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = (weight.abs().amax() / E4M3_MAX).view(1)
    tensors, meant = _fp8(weight, scale, scale, "weight_scale")
    return tensors | {"input_scale": torch.ones(1)}, meant


def _fp8_block(suffix: str) -> Quantise:
    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        n, k = weight.shape
        padded = torch.zeros(-(-n // 128) * 128, -(-k // 128) * 128)
        padded[:n, :k] = weight.abs()
        blocks = padded.view(len(padded) // 128, 128, -1, 128)
        scales = blocks.amax((1, 3)) / E4M3_MAX
        every = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
        return _fp8(weight, scales, every, suffix)

    return quantise


def _fp8(
    weight: Tensor, scales: Tensor, every: Tensor, suffix: str
) -> tuple[Tensors, Tensor]:
    elements = (weight / every).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {"weight": elements, suffix: scales}, elements.float() * every


def _int8(group: int | None, packed: bool) -> Quantise:
    """Symmetric codes from -127 to 127, in bytes or four to an int32."""

    def quantise(weight: Tensor) -> tuple[Tensors, Tensor]:
        groups = weight.unflatten(1, (-1, group or weight.shape[1]))
        scales = (groups.abs().amax(-1) / 127).bfloat16()
        every = scales.float()[..., None]
        codes = (groups / every).round().clamp(-128, 127)
        meant = (codes * every).flatten(1)
        codes = codes.flatten(1)
        if not packed:
            return {"weight": codes.to(torch.int8), "weight_scale": scales}, meant
        bytes_ = (codes + 128).to(torch.int64).unflatten(1, (-1, 4))
        words = (bytes_ << torch.arange(0, 32, 8)).sum(-1)
        words = (words - ((words >> 31) << 32)).to(torch.int32)
        shape = torch.tensor(weight.shape)
        tensors = {"weight_packed": words, "weight_scale": scales}
        return tensors | {"weight_shape": shape}, meant

    return quantise


def compressed_tensors_config(form: str, **weights: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors with one group."""
    activations = None
    if form == "float-quantized":
        activations = {"num_bits": 8, "type": "float", "dynamic": True}
    if form == "int-quantized":
        activations = {"num_bits": 8, "type": "int", "dynamic": True}
        activations |= {"strategy": "token", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {"dynamic": False, "symmetric": True} | weights,
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _w4a16(**weights: Any) -> dict[str, Any]:
    return compressed_tensors_config(
        "pack-quantized", num_bits=4, type="int", **weights
    )


def _w8(**weights: Any) -> dict[str, Any]:
    return compressed_tensors_config(
        "float-quantized", num_bits=8, type="float", **weights
    )


def _by_group(group: int, symmetric: bool) -> tuple[dict[str, Any], Quantise]:
    arrange = _pack_quantized if symmetric else _pack_quantized_zeros
    config = _w4a16(strategy="group", group_size=group, symmetric=symmetric)
    return config, _int4(group, symmetric, torch.bfloat16, arrange)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

# ``quantization_config`` and what quantizes a weight, by a name for tests.
LAYOUTS: dict[str, tuple[dict[str, Any], Quantise]] = {
    "w4a16-g128": _by_group(128, symmetric=True),
    "w4a16-g64": _by_group(64, symmetric=True),
    "w4a16-asym-g32": _by_group(32, symmetric=False),
    "w4a16-channel": (
        _w4a16(strategy="channel"),
        _int4(None, True, torch.bfloat16, _pack_quantized),
    ),
    "awq": (AWQ | {"version": "gemm"}, _int4(128, False, torch.float16, _awq)),
    "gptq": (GPTQ, _int4(128, True, torch.float16, _gptq)),
    "fp8-channel": (_w8(strategy="channel"), _fp8_channel),
    "fp8-tensor": (_w8(strategy="tensor"), _fp8_tensor),
    "fp8-tensor-native": (FP8 | {"activation_scheme": "static"}, _fp8_tensor),
    "fp8-block": (
        _w8(strategy="block", block_structure=[128, 128]),
        _fp8_block("weight_scale"),
    ),
    "fp8-block-native": (
        FP8 | {"weight_block_size": [128, 128]},
        _fp8_block("weight_scale_inv"),
    ),
}

_INT8 = {"num_bits": 8, "type": "int"}
# The same for bases that are served as two planes only.
INT8_LAYOUTS: dict[str, tuple[dict[str, Any], Quantise]] = {
    "int8-channel": (
        compressed_tensors_config("int-quantized", strategy="channel", **_INT8),
        _int8(None, packed=False),
    ),
    "w8a16-channel": (
        compressed_tensors_config("pack-quantized", strategy="channel", **_INT8),
        _int8(None, packed=True),
    ),
    "w8a16-g128": (
        compressed_tensors_config(
            "pack-quantized", strategy="group", group_size=128, **_INT8
        ),
        _int8(128, packed=True),
    ),
}
