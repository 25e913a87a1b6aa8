# SPDX-License-Identifier: Apache-2.0
"""Which ``CheckpointWeights`` a layer has. A new checkpoint format adds a line here."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.serving.weights.base import CheckpointWeights
from vllm_rsparse.serving.weights.float import FloatWeights

# Called with the checkpoint's `quantization_config` and the checkpoint names of the
# layer's shards, for a layer that the checkpoint quantizes.
Maker = Callable[[Mapping[str, Any], list[str]], CheckpointWeights]

# Key: `quant_method` of the checkpoint's own `quantization_config`.
_MAKERS: dict[str, Maker] = {}


def checkpoint_weights(
    quantization: Mapping[str, Any] | None, names: list[str]
) -> CheckpointWeights:
    """How the checkpoint holds a layer's weight.

    Args:
        quantization: the checkpoint's own ``quantization_config``; None for a layer
            that it leaves in a floating-point type.
        names: checkpoint names of the fused shards, in the order of the output.

    Raises:
        CheckpointError: the format is not supported; names it and those that are.
    """
    if quantization is None:
        return FloatWeights()
    method = str(quantization.get("quant_method"))
    if method not in _MAKERS:
        known = ", ".join(_MAKERS) or "none yet"
        raise CheckpointError(
            f"{names[0]} is quantized with quant_method {method!r}, which rsparse"
            f" cannot serve sparse; it can: {known}. Prepare a checkpoint of the model"
            " in bfloat16, or serve this one without --quantization rsparse"
        )
    return _MAKERS[method](quantization, names)
