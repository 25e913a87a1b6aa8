# SPDX-License-Identifier: Apache-2.0
"""Weights of every format that the op reads, made from dense ones."""

from collections.abc import Callable

from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.formats.int8_planes import encode_planes
from vllm_rsparse.testing.quantized import LAYOUTS

_LAYOUTS = {
    "int4-g128": "w4a16-g128",
    "int4-asym-g32": "w4a16-asym-g32",
    "int4-g64": "w4a16-g64",
    "int4-channel": "w4a16-channel",
    # Scales in float16, whatever x is.
    "int4-awq": "awq",
    "fp8": "fp8-channel",
    "fp8-block": "fp8-block",
}
# Group, and whether zero points are 8 everywhere.
_PLANES = {"int8-planes": (128, False), "int8-planes-sym-g32": (32, True)}
WEIGHTS = (*_LAYOUTS, "int8-planes")


def store(name: str) -> Callable[[Tensor], StoredWeight]:
    """Lays out a dense weight [N, K], rounded, in the format of this name."""

    def stored(weight: Tensor) -> StoredWeight:
        if name in _PLANES:
            group, symmetric = _PLANES[name]
            return encode_planes(weight, group, weight.dtype, symmetric=symmetric)
        config, quantise = LAYOUTS[_LAYOUTS[name]]
        layout = parse_scheme(config, "config").layout("linear")
        # Rounded on the CPU: the same codes on every machine.
        codes, _ = quantise(weight.float().cpu())
        return layout.store(codes).to(weight.device)

    return stored
