# SPDX-License-Identifier: Apache-2.0
"""Which ``CheckpointWeights`` a layer has. A new checkpoint format adds a line here."""

from collections.abc import Mapping
from typing import Any

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.checkpoints.awq import AwqGemm
from vllm_rsparse.formats.checkpoints.fp8 import Fp8Block, Fp8Channel, Fp8Tensor
from vllm_rsparse.formats.checkpoints.gptq import Gptq
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.pack_quantized import PackQuantized
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.serving.weights.awq import AwqWeights
from vllm_rsparse.serving.weights.base import CheckpointWeights
from vllm_rsparse.serving.weights.float import FloatWeights
from vllm_rsparse.serving.weights.fp8 import (
    Fp8BlockWeights,
    Fp8ChannelWeights,
    Fp8TensorWeights,
)
from vllm_rsparse.serving.weights.gptq import GptqWeights
from vllm_rsparse.serving.weights.pack_quantized import PackQuantizedWeights

_WHERE = "the checkpoint's quantization_config"


def checkpoint_weights(
    quantization: Mapping[str, Any] | None, names: list[str]
) -> CheckpointWeights:
    """How the checkpoint holds a layer's weight.

    Args:
        quantization: the checkpoint's own ``quantization_config``; None where it has
            none, or for a layer that is known to be in a floating-point type.
        names: checkpoint names of the fused shards, in the order of the output.

    Raises:
        CheckpointError: the format is not supported, or the shards differ in it; says
            what to do.
    """
    if quantization is None:
        return FloatWeights()
    scheme = parse_scheme(quantization, _WHERE)
    layouts = [scheme.layout(name) for name in names]
    if any(layout != layouts[0] for layout in layouts):
        found = ", ".join(
            f"{name}: {'not quantized' if layout is None else layout}"
            for name, layout in zip(names, layouts, strict=True)
        )
        raise CheckpointError(
            f"{_WHERE} gives different layouts to linears that vLLM fuses ({found}),"
            " which is not supported; use a checkpoint that quantizes them alike"
        )
    return _weights(layouts[0], names)


def _weights(layout: Layout | None, names: list[str]) -> CheckpointWeights:
    match layout:
        case None:
            return FloatWeights()
        case PackQuantized():
            return PackQuantizedWeights(layout, names, layout.group)
        case AwqGemm():
            return AwqWeights(layout, names, layout.group)
        case Gptq():
            return GptqWeights(layout, names, layout.group)
        case Fp8Channel():
            return Fp8ChannelWeights(layout, names)
        case Fp8Tensor():
            return Fp8TensorWeights(layout, names)
        case Fp8Block():
            return Fp8BlockWeights(layout, names)
    raise TypeError(f"no weights for {layout}")
