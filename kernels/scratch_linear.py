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
from .known_launch import launch
from .scratch import dequantise_kernel, dequantise_pairs_kernel
from .sizes import cdiv, next_power_of_2
from .stored_rows import column_scales, is_four_bit, rows_of
from .weight_tiles import Codes

# Input channels, and columns or words of columns, of a program.
_BLOCK_K, _BLOCK_N, _BLOCK_W = 32, 256, 64


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
    n, k = weight.n, weight.k
    data, pitch = rows_of(weight)
    group, code = weight.group or k, weight.format.code
    codes = Codes(data, weight.scales, weight.zeros, n, k, pitch)
    if _by_pairs(out, weight):
        block_k = min(_BLOCK_K, next_power_of_2(group))
        launch(
            dequantise_pairs_kernel,
            out.device,
            (cdiv(k, block_k), cdiv(n // 8, _BLOCK_W), 1),
            codes,
            out,
            PLANES=code == INT8_PLANES.value,
            GROUP=group,
            BLOCK_W=_BLOCK_W,
            BLOCK_K=block_k,
            BITS=not triton.knobs.runtime.interpret,
            num_warps=4,
        )
        return
    launch(
        dequantise_kernel,
        out.device,
        (cdiv(k, _BLOCK_K), cdiv(n, _BLOCK_N), 1),
        codes,
        column_scales(weight),
        out,
        CODE=code,
        GROUP=group,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
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
