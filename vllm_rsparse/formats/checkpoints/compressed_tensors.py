# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors: of its many schemes W4A16, INT8 and FP8, recognised by group."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from vllm_rsparse.formats.checkpoints.fp8 import Fp8Block, Fp8Channel, Fp8Tensor
from vllm_rsparse.formats.checkpoints.int8 import Int8Channel, PackedInt8
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.pack_quantized import (
    PackQuantized,
    PackQuantizedAsymmetric,
)
from vllm_rsparse.formats.checkpoints.scheme import (
    Keys,
    Scheme,
    layout_group,
    read_keys,
    refuse,
)
from vllm_rsparse.formats.fp8_block import BLOCK
from vllm_rsparse.formats.int8 import GROUP as INT8_GROUP

_FP8_FORMATS = ("float-quantized", "naive-quantized")
_INT8_FORMATS = ("int-quantized", "naive-quantized")
_INSTEAD = (
    "use a checkpoint in W4A16, FP8 or symmetric INT8, or prepare the unquantized model"
    " it came from"
)
# The name that users know, by format.
_UNSUPPORTED = {
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "mxfp8-quantized": "MXFP8",
    "marlin-24": "2:4 sparsity (marlin-24)",
    "sparse-24-bitmask": "2:4 sparsity (sparse-24-bitmask)",
    "sparse-bitmask": "sparsity of the weights (sparse-bitmask)",
    "dense": "a checkpoint that is not compressed (format dense)",
}


class _Weights(Keys):
    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | None = None
    symmetric: bool = True
    actorder: str | bool | None = None

    @field_validator("block_structure", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """Older files write "128x128"."""
        if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
            return [int(part) for part in value.split("x")]
        return value

    @property
    def granularity(self) -> str:
        """The strategy; if none is named, the one that the group size implies."""
        if self.strategy is not None:
            return self.strategy
        if self.group_size is None:
            return "tensor"
        return "channel" if self.group_size == -1 else "group"


class _Group(Keys):
    targets: list[str]
    weights: _Weights | None = None
    input_activations: _Weights | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None


class _Keys(Keys):
    config_groups: dict[str, _Group]
    format: str
    ignore: list[str] | None = None
    quantization_status: str = "compressed"
    sparsity_config: dict[str, Any] | None = Field(default=None)
    transform_config: dict[str, Any] | None = Field(default=None)


class CompressedTensorsScheme(Scheme):
    """Parsed ``quantization_config`` of compressed-tensors.

    Args:
        config: the dictionary.
        where: its file, for errors.

    Raises:
        CheckpointError: a variant that is not supported; says what to do.
    """

    method = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        keys = read_keys(_Keys, config, where)
        if keys.quantization_status not in ("compressed", "frozen"):
            refuse(
                where,
                f"quantization_status {keys.quantization_status!r}",
                "save the model compressed",
            )
        transforms = (keys.transform_config or {}).get("config_groups")
        if transforms:
            refuse(
                where,
                "a checkpoint with transforms of the activations (transform_config:"
                f" {', '.join(transforms)})",
                _INSTEAD,
            )
        if (keys.sparsity_config or {}).get("format", "dense") != "dense":
            refuse(where, "sparsity of the weights (sparsity_config)", _INSTEAD)
        self._ignored = keys.ignore or []
        self._layouts: dict[str, Layout | None] = {}
        for name, group in keys.config_groups.items():
            # Scales of the KV cache, which vLLM handles.
            if all(target.endswith("Attention") for target in group.targets):
                continue
            here = f"{where}: config_groups.{name}"
            layout = _group_layout(group, group.format or keys.format, here)
            for target in group.targets:
                self._layouts[target] = layout

    def layout(self, name: str) -> Layout | None:
        """See the base class. A target that matches the name precedes the class."""
        if _first_match(name, self._ignored) is not None:
            return None
        target = _first_match(name, self._layouts)
        return self._layouts.get("Linear" if target is None else target)


def _first_match(name: str, patterns: Mapping[str, Any] | list[str]) -> str | None:
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], name):
                return pattern
        elif pattern == name:
            return pattern
    return None


def _group_layout(group: _Group, form: str, where: str) -> Layout | None:
    if group.weights is None:
        return None
    if group.output_activations is not None:
        refuse(where, "quantization of a linear's output", _INSTEAD)
    integers = group.weights.type == "int"
    if form == "pack-quantized" and integers and group.weights.num_bits == 8:
        return _packed_int8(group.weights, group.input_activations, where)
    if form == "pack-quantized":
        return _int4(group.weights, group.input_activations, where)
    if form in _INT8_FORMATS and integers:
        return _int8(group.weights, group.input_activations, where)
    if form in _FP8_FORMATS and group.weights.type == "float":
        return _fp8(group.weights, group.input_activations is not None, where)
    refuse(where, _UNSUPPORTED.get(form, f"the format {form!r}"), _INSTEAD)


def _int4(weights: _Weights, activations: _Weights | None, where: str) -> Layout:
    if weights.type != "int" or weights.num_bits != 4:
        kind = f"{weights.num_bits}-bit {weights.type} weights (pack-quantized)"
        refuse(where, kind, _INSTEAD)
    if activations is not None:
        what = f"W4A{activations.num_bits} (four-bit weights, quantized activations)"
        refuse(where, what, _INSTEAD)
    _refuse_act_order(weights, where)
    if weights.granularity == "channel":
        group = None
    elif weights.granularity == "group" and weights.group_size is not None:
        group = layout_group(where, weights.group_size)
    else:
        refuse(where, f"W4A16 by {weights.granularity}", "use one by group or channel")
    return PackQuantized(group) if weights.symmetric else PackQuantizedAsymmetric(group)


def _packed_int8(weights: _Weights, activations: _Weights | None, where: str) -> Layout:
    """W8A16: one scale per output channel, or per 128 input channels of it."""
    _require_symmetric(weights, where)
    _refuse_act_order(weights, where)
    if activations is not None:
        refuse(where, f"W8A{activations.num_bits} in pack-quantized", _INSTEAD)
    if weights.granularity == "channel":
        return PackedInt8(None)
    if weights.granularity == "group" and weights.group_size == INT8_GROUP:
        return PackedInt8(INT8_GROUP)
    refuse(
        where,
        f"INT8 by {weights.granularity}"
        + (f" of {weights.group_size}" if weights.granularity == "group" else ""),
        f"use a checkpoint with scales per channel or groups of {INT8_GROUP}",
    )


def _int8(weights: _Weights, activations: _Weights | None, where: str) -> Layout:
    """W8A8, of which the weights are used: one scale per output channel."""
    if weights.num_bits != 8:
        refuse(where, f"{weights.num_bits}-bit int weights (int-quantized)", _INSTEAD)
    _require_symmetric(weights, where)
    if activations is None:
        refuse(
            where,
            "INT8 with activations that are not quantized, in int-quantized",
            "vLLM has no layer for it; save the model as pack-quantized",
        )
    if weights.granularity != "channel":
        refuse(
            where,
            f"INT8 W8A8 by {weights.granularity}",
            "use a checkpoint with scales per channel",
        )
    return Int8Channel()


def _require_symmetric(weights: _Weights, where: str) -> None:
    if not weights.symmetric:
        refuse(where, "asymmetric INT8 (symmetric = false)", _INSTEAD)


def _refuse_act_order(weights: _Weights, where: str) -> None:
    if weights.actorder in ("group", "dynamic", True):
        refuse(
            where,
            f"act-order (actorder = {weights.actorder!r})",
            "use a checkpoint with actorder static, weight or null",
        )


def _fp8(weights: _Weights, quantised_inputs: bool, where: str) -> Layout:
    if weights.num_bits != 8 or not weights.symmetric:
        kind = "symmetric" if weights.symmetric else "asymmetric"
        refuse(where, f"{kind} {weights.num_bits}-bit float weights", _INSTEAD)
    if weights.granularity == "channel":
        return Fp8Channel(quantised_inputs)
    if weights.granularity == "tensor":
        return Fp8Tensor(quantised_inputs)
    if weights.granularity == "block":
        if weights.block_structure == [BLOCK, BLOCK]:
            return Fp8Block()
        refuse(
            where,
            f"FP8 in blocks of {weights.block_structure}",
            f"use a checkpoint with blocks of [{BLOCK}, {BLOCK}]",
        )
    refuse(
        where,
        f"FP8 by {weights.granularity}",
        "use a checkpoint with scales per channel, tensor or block",
    )
