# SPDX-License-Identifier: Apache-2.0
"""From a ``quantization_config`` dictionary to its scheme."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_rsparse.formats.checkpoints.awq import AwqScheme
from vllm_rsparse.formats.checkpoints.compressed_tensors import CompressedTensorsScheme
from vllm_rsparse.formats.checkpoints.gptq import GptqScheme
from vllm_rsparse.formats.checkpoints.native_fp8 import NativeFp8Scheme
from vllm_rsparse.formats.checkpoints.scheme import Scheme, refuse

_SCHEMES: dict[str, Callable[[Mapping[str, Any], str], Scheme]] = {
    "awq": AwqScheme,
    "compressed-tensors": CompressedTensorsScheme,
    "fp8": NativeFp8Scheme,
    "gptq": GptqScheme,
}
# Names of the others for users.
_UNSUPPORTED = {
    "bitsandbytes": "bitsandbytes",
    "gguf": "GGUF",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "modelopt_fp4": "NVFP4 (ModelOpt)",
    "mxfp4": "MXFP4",
    "quark": "Quark",
    "torchao": "torchao",
}


def parse_scheme(config: Mapping[str, Any], where: str) -> Scheme:
    """Parse the ``quantization_config`` of a checkpoint.

    Args:
        config: the dictionary as config.json has it.
        where: that file, for errors.

    Raises:
        CheckpointError: a method or a variant that is not supported, or a malformed
            key; the message says what to do.
    """
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _SCHEMES:
        refuse(
            where,
            "a checkpoint quantized with"
            f" {_UNSUPPORTED.get(str(method), f'quant_method {method!r}')}",
            "use one in compressed-tensors W4A16, FP8 or INT8, AWQ, GPTQ or native FP8,"
            " or prepare the unquantized model it came from",
        )
    return _SCHEMES[method](config, where)
