# SPDX-License-Identifier: Apache-2.0
"""Random weights of a layer's shape in every format, made where they are used."""

import torch
from torch import Tensor

from vllm_rsparse.bench.layers import Layer
from vllm_rsparse.formats.base import StoredWeight
from vllm_rsparse.formats.fp8 import FP8, store_fp8
from vllm_rsparse.formats.fp8_block import BLOCK, FP8_BLOCK
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8_planes import INT8_PLANES
from vllm_rsparse.formats.nibbles import PER_WORD
from vllm_rsparse.formats.plain import store_float
from vllm_rsparse.formats.registry import format_of_name

# Standard deviation of codes that are distributed evenly over 0 to 15.
_CODE_DEVIATION = 4.6


def random_weight(
    layer: Layer, dtype: torch.dtype, generator: torch.Generator
) -> StoredWeight:
    """A random weight in the layer's format, with outputs of about the inputs' size.

    Args:
        layer: shape, format and group.
        dtype: of a weight of the format float, and of the scales of groups.
        generator: its device is the weight's.
    """
    n, k = layer.n, layer.k
    weight_format = format_of_name(layer.format)
    if weight_format is FP8:
        elements = _randn(k, n, torch.bfloat16, generator).to(torch.float8_e4m3fn).t()
        return store_fp8(elements, _scales((n,), k, generator))
    if weight_format is FP8_BLOCK:
        elements = _randn(k, n, torch.bfloat16, generator).to(torch.float8_e4m3fn).t()
        scales = _scales((-(-k // BLOCK), -(-n // BLOCK)), k, generator)
        return StoredWeight(FP8_BLOCK, elements, n, k, scales, group=BLOCK)
    if weight_format in (INT4, INT8_PLANES):
        planes = [2] if weight_format is INT8_PLANES else []
        groups = k // layer.group
        scales = _scales((groups, n), k, generator) / _CODE_DEVIATION
        # As the engine makes them: planes have zero points, most INT4 checkpoints none.
        zeros = _words([groups, n // PER_WORD], generator) if planes else None
        words = _words([*planes, k, n // PER_WORD], generator)
        group = layer.group
        return StoredWeight(weight_format, words, n, k, scales.to(dtype), zeros, group)
    return store_float(_randn(k, n, dtype, generator).mul_(k**-0.5).t())


def _scales(shape: tuple[int, ...], k: int, generator: torch.Generator) -> Tensor:
    """Float32 scales that differ up to three times."""
    random = torch.rand(shape, generator=generator, device=generator.device)
    return (random + 0.5) * k**-0.5


def _words(shape: list[int], generator: torch.Generator) -> Tensor:
    """Int32 words of random codes."""
    device = generator.device
    return torch.randint(
        -(2**31), 2**31, shape, generator=generator, device=device, dtype=torch.int32
    )


def _randn(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    return torch.randn(
        rows, columns, generator=generator, device=generator.device, dtype=dtype
    )
