# SPDX-License-Identifier: Apache-2.0
"""Many tokens times int4 and fp8 weights, by the library; launches ``scratch.py``."""

from functools import cache

import torch
import triton
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight

from .scratch import dequantise_kernel, dequantise_pairs_kernel
from .stored_rows import column_scales, is_four_bit, rows_of
from .weight_tiles import Codes

# Columns of a strip are a multiple of this: with 2048 tokens, as many of the library's
# tiles as an H200 has multiprocessors.
_STRIP_COLUMNS = 2048
# Bytes of a strip where there is no GPU.
_HOST_STRIP = 45 * 2**20


def strip_linear(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] times the whole weight [N, K], a strip of columns at a time.

    A strip in x's type is written to scratch that stays in the L2 cache, and the
    library multiplies with it.

    Args:
        x: [M, K]; rows may lie apart.
        weight: int4, planes or fp8.
        bias: [N] in x's dtype, or None.

    Returns:
        [M, N] in x's dtype, contiguous.
    """
    tokens, k = x.shape
    n = weight.n
    out = torch.empty(tokens, n, dtype=x.dtype, device=x.device)
    if tokens == 0 or n == 0:
        return out
    columns = min(n, strip_columns(k * x.element_size(), x.device))
    scratch = torch.empty(k * columns, dtype=x.dtype, device=x.device)
    for begin in range(0, n, columns):
        end = min(n, begin + columns)
        strip = scratch[: k * (end - begin)].view(k, end - begin)
        dequantise_into(strip, weight, begin)
        part = out[:, begin:end]
        if bias is None:
            torch.mm(x, strip, out=part)
        else:
            torch.addmm(bias[begin:end], x, strip, out=part)
    return out


def strip_columns(bytes_of_column: int, device: torch.device) -> int:
    """Columns of scratch that stay in a device's L2 cache until they are read."""
    columns = _strip_bytes(device) // max(1, bytes_of_column)
    return max(1, columns // _STRIP_COLUMNS) * _STRIP_COLUMNS


@cache
def _strip_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _HOST_STRIP
    # gate_up of Llama-3-8B in fp8, 2048 tokens, on the H200, whose L2 cache has 50 MB:
    # 438, 426 and 422 us in strips of 16, 32 and 48 MB, 440 at once.
    return int(torch.cuda.get_device_properties(device).L2_cache_size) * 9 // 10


def dequantise(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """The weight in ``dtype``: the [N, K] view of contiguous [K, N] storage."""
    out = torch.empty(weight.k, weight.n, dtype=dtype, device=weight.device)
    dequantise_into(out, weight, 0)
    return out.t()


def dequantise_into(out: Tensor, weight: StoredWeight, begin: int) -> None:
    """Columns of the weight from ``begin`` on.

    Args:
        out: [K, columns], contiguous, written.
        weight: int4, planes or fp8.
        begin: the first column; of int4 and planes, a multiple of 8.
    """
    n, k = weight.n, weight.k
    end = begin + out.shape[1]
    data, pitch = rows_of(weight)
    group = weight.group or k
    if _by_pairs(out, weight, begin, end):
        _dequantise_pairs(out, weight, begin, group)
        return
    block_k = 32
    dequantise_kernel[(triton.cdiv(k, block_k), triton.cdiv(end - begin, 256))](
        Codes(data, weight.scales, weight.zeros, n, k, pitch),
        column_scales(weight),
        out,
        begin,
        end,
        CODE=weight.format.code,
        GROUP=group,
        BLOCK_N=256,
        BLOCK_K=block_k,
        num_warps=4,
    )


def _by_pairs(out: Tensor, weight: StoredWeight, begin: int, end: int) -> bool:
    """Whether whole words become pairs of bfloat16, with scales of the same type."""
    return (
        is_four_bit(weight)
        and weight.scales is not None
        and out.dtype == weight.scales.dtype == torch.bfloat16
        and begin % 8 == 0
        and (end - begin) % 8 == 0
        and weight.scales.is_contiguous()
    )


def _dequantise_pairs(
    out: Tensor, weight: StoredWeight, begin: int, group: int
) -> None:
    assert weight.scales is not None
    data, pitch = rows_of(weight)
    planes = data.dim() == 3
    words = out.shape[1] // 8
    block_k, block_w = min(32, triton.next_power_of_2(group)), 64
    grid = (triton.cdiv(weight.k, block_k), triton.cdiv(words, block_w))
    dequantise_pairs_kernel[grid](
        Codes(
            data[0] if planes else data,
            weight.scales.reshape(-1).view(torch.int32),
            weight.zeros,
            weight.n,
            weight.k,
            pitch,
        ),
        data[1] if planes else None,
        out.view(torch.int32),
        begin // 8,
        words,
        GROUP=group,
        BLOCK_W=block_w,
        BLOCK_K=block_k,
        BITS=not triton.knobs.runtime.interpret,
        num_warps=4,
    )
