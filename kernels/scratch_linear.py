# SPDX-License-Identifier: Apache-2.0
"""int4 and fp8 weights as numbers in scratch, for the library; launches ``scratch.py``.

Strips of 24 to 64 MB, which stay in the L2 cache of an H200, are not faster than the
whole weight at once (planes, the four linears of Llama-3-8B and 2048 tokens: 1314 to
1374 us, and 1330), and take more launches, for which a prompt waits on a busy host.
"""

import torch
import triton
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .codes import INT8_PLANES
from .known_launch import KnownLaunches
from .scratch import dequantise_kernel, dequantise_pairs_kernel
from .sizes import cdiv, next_power_of_2
from .stored_rows import column_scales, is_four_bit, rows_of
from .weight_tiles import Codes

# Input channels, and columns or words of columns, of a program.
_BLOCK_K, _BLOCK_N, _BLOCK_W = 32, 256, 64
_dequantise = KnownLaunches(dequantise_kernel, num_warps=4)
_dequantise_pairs = KnownLaunches(dequantise_pairs_kernel, num_warps=4)


def dequantise(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``, an input channel a row: contiguous [K, N]."""
    out = torch.empty(weight.k, weight.n, dtype=dtype, device=weight.device)
    dequantise_into(out, weight)
    return out


def dequantise_into(out: Tensor, weight: StoredWeight) -> None:
    """The weight, as numbers of ``out``'s type.

    Args:
        out: [K, N], contiguous, written.
        weight: int4, planes or fp8.
    """
    n, k, scales, zeros = weight.n, weight.k, weight.scales, weight.zeros
    assert scales is not None
    data, pitch = rows_of(weight)
    group, code = weight.group or k, weight.format.code
    codes = Codes(data, scales, zeros, n, k, pitch)
    key = (
        out.device,
        n,
        k,
        out.dtype,
        scales.dtype,
        # An address in bytes: what matters is whether 16 divides it.
        data.data_ptr() % 16,
        scales.data_ptr() % 16,
        None if zeros is None else zeros.data_ptr() % 16,
        out.data_ptr() % 16,
    )
    if _by_pairs(out, weight):
        block_k = min(_BLOCK_K, next_power_of_2(group))
        _dequantise_pairs(
            key,
            (cdiv(k, block_k), cdiv(n // 8, _BLOCK_W), 1),
            (codes, out),
            (
                code == INT8_PLANES.value,
                group,
                _BLOCK_W,
                block_k,
                not triton.knobs.runtime.interpret,
            ),
        )
        return
    _dequantise(
        key,
        (cdiv(k, _BLOCK_K), cdiv(n, _BLOCK_N), 1),
        (codes, column_scales(weight), out),
        (code, group, _BLOCK_N, _BLOCK_K),
    )


def _by_pairs(out: Tensor, weight: StoredWeight) -> bool:
    """Whether whole words become pairs of bfloat16, with scales of the same type."""
    scales = weight.scales
    return (
        is_four_bit(weight)
        and scales is not None
        and out.dtype == scales.dtype == torch.bfloat16
        # A pair is read and written as a word.
        and (scales.data_ptr() | out.data_ptr()) % 4 == 0
    )
