# SPDX-License-Identifier: Apache-2.0
"""Which ``CheckpointWeights`` a layer has. A new checkpoint layout adds a line here."""

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.checkpoints.awq import AwqGemm
from vllm_rsparse.formats.checkpoints.fp8 import Fp8Block, Fp8Channel, Fp8Tensor
from vllm_rsparse.formats.checkpoints.gptq import Gptq
from vllm_rsparse.formats.checkpoints.int8 import Int8Channel, PackedInt8
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.on_disk import PlanesOnDisk
from vllm_rsparse.formats.checkpoints.pack_quantized import PackQuantized
from vllm_rsparse.formats.checkpoints.scheme import Scheme
from vllm_rsparse.serving.weights.awq import AwqWeights
from vllm_rsparse.serving.weights.base import CheckpointWeights
from vllm_rsparse.serving.weights.float import FloatWeights
from vllm_rsparse.serving.weights.fp8 import (
    Fp8BlockWeights,
    Fp8ChannelWeights,
    Fp8TensorWeights,
)
from vllm_rsparse.serving.weights.gptq import GptqWeights
from vllm_rsparse.serving.weights.int8 import Int8ChannelWeights, PackedInt8Weights
from vllm_rsparse.serving.weights.pack_quantized import PackQuantizedWeights
from vllm_rsparse.serving.weights.planes import PlanesWeights


def shared_layout(scheme: Scheme, names: list[str]) -> Layout | None:
    """The layout of all shards of a layer; None where they are not quantized.

    Args:
        scheme: the checkpoint's own ``quantization_config``.
        names: checkpoint names of the fused shards, in the order of the output.

    Raises:
        CheckpointError: the shards differ.
    """
    layouts = [scheme.layout(name) for name in names]
    if any(layout != layouts[0] for layout in layouts):
        found = ", ".join(
            f"{name}: {'not quantized' if layout is None else layout}"
            for name, layout in zip(names, layouts, strict=True)
        )
        raise CheckpointError(
            "the checkpoint's quantization_config gives different layouts to linears"
            f" that vLLM fuses ({found}), which is not supported; use a checkpoint that"
            " quantizes them alike"
        )
    return layouts[0]


def checkpoint_weights(layout: Layout | None, names: list[str]) -> CheckpointWeights:
    """How a layer's weight is loaded and turned into what the kernels read.

    Args:
        layout: how the checkpoint stores it; None for a floating-point type.
        names: checkpoint names of the fused shards, for messages.
    """
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
        case Int8Channel():
            return Int8ChannelWeights(layout, names)
        case PackedInt8():
            return PackedInt8Weights(layout, names)
        case PlanesOnDisk():
            return PlanesWeights(layout, names)
        case Fp8Block():
            return Fp8BlockWeights(layout, names)
    raise TypeError(f"no weights for {layout}")
