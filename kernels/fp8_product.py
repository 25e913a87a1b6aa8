# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""fp8 weights times many tokens on the matrix units for fp8, by the library.

The library wants both operands with the input channels next to each other: x is rounded
to fp8 with a scale per token, and the weight, an input channel a row, is turned into
scratch [N, K]. On an H200 the four linears of Llama-3-8B take 226, 247 and 883 us at
128, 256 and 2048 tokens; widened to bfloat16 for cuBLAS they take 345, 344 and 1420.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_rsparse.formats.base import StoredWeight

from .known_launch import launch
from .rounded_blocks import turned_channel
from .rsparse_linear import has_dependent_launch, input_of
from .sizes import cdiv, next_power_of_2

# The library's kernels need both dimensions to be multiples of this.
ALIGNMENT = 16
# Channels and columns of a turned tile, the best of seven on an H200.
_TURNED_K, _TURNED_N = 64, 128
# Channels of x that a program holds next to such a tile.
_PART_K = 2048
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def fp8_product(x: Tensor, weight: StoredWeight) -> Tensor:
    """x, rounded to fp8 by token, times an fp8 weight: [M, N] in bfloat16.

    Sums stay in the matrix units to the end ("fast accumulation"), as in vLLM's own FP8
    layers. On an H200 the products of the four linears of Llama-3-8B and 2048 tokens
    take 597 us instead of 656. The relative error of bfloat16 outputs is 2.1e-3, with
    14,336 channels 3.3e-3, instead of 1.7e-3.

    Args:
        x: bfloat16 [M, K], any strides.
        weight: of the format fp8; N and K are multiples of ``ALIGNMENT``.
    """
    rounded, scales, turned = round_and_turn(x, weight)
    assert weight.scales is not None
    return torch._scaled_mm(
        rounded,
        turned.t(),
        scale_a=scales,
        scale_b=weight.scales.view(1, -1),
        out_dtype=x.dtype,
        use_fast_accum=True,
    )


def round_and_turn(x: Tensor, weight: StoredWeight) -> tuple[Tensor, Tensor, Tensor]:
    """``round_rows`` of x, and the elements of an fp8 weight as contiguous [N, K].

    One launch, because the steps of a prompt are not in a CUDA graph: with two, on a
    host that other processes kept busy, an H200 waited 41 of 73 ms of a prompt of 2048
    tokens for its next kernel. And one allocation, which takes the host four times as
    long as a view.
    """
    tokens, k = x.shape
    n, device = weight.n, x.device
    # Bytes of the scales, which come first; then x, then the weight.
    begin = cdiv(4 * tokens, ALIGNMENT) * ALIGNMENT
    size = begin + (tokens + n) * k
    scratch = torch.empty(size, dtype=torch.float8_e4m3fn, device=device)
    launch(
        _round_and_turn_kernel,
        device,
        (tokens + cdiv(k, _TURNED_K) * cdiv(n, _TURNED_N), 1, 1),
        input_of(x),
        weight.data,
        scratch,
        begin,
        tokens,
        n,
        LARGEST=_LARGEST,
        PART_K=_PART_K,
        BLOCK_K=_TURNED_K,
        BLOCK_N=_TURNED_N,
        num_warps=4,
    )
    return (
        scratch.as_strided((tokens, k), (k, 1), begin),
        scratch.as_strided((tokens, 4), (4, 1)).view(torch.float32),
        scratch.as_strided((n, k), (k, 1), begin + tokens * k),
    )


def round_rows(x: Tensor, turned: bool = False) -> tuple[Tensor, Tensor]:
    """x as float8_e4m3fn [M, K] and its scales, float32 [M, 1].

    ``turned``: channels in the order of ``rounded_blocks.ByteRows``; 16 divides K. A
    token's scale is its largest magnitude over 448, as in vLLM's FP8 layers. With a
    NaN among its elements it is NaN, and so is all of the token's product.
    """
    tokens, k = x.shape
    rounded = torch.empty(tokens, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=x.device)
    if tokens:
        launch(
            _round_kernel,
            x.device,
            (tokens, 1, 1),
            input_of(x),
            rounded,
            scales,
            LARGEST=_LARGEST,
            TURNED=turned,
            BLOCK_K=next_power_of_2(max(1, k)),
            PDL=has_dependent_launch(x.device),
            num_warps=8,
            pdl=has_dependent_launch(x.device),
        )
    return rounded, scales


@triton.jit
def _round_and_turn_kernel(
    x,
    rows_ptr,
    scratch_ptr,
    begin,
    tokens,
    n,
    LARGEST: tl.constexpr,
    PART_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A token of x, part by part so that registers are few, or a tile of the weight."""
    program = tl.program_id(0)
    k = x.k
    scale_ptr = scratch_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    rounded_ptr = scratch_ptr + begin
    turned_ptr = rounded_ptr + tl.cast(tokens, tl.int64) * k
    turned_ptr = turned_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    rows_ptr = rows_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    if program < tokens:
        row = program.to(tl.int64)
        row_ptr = x.ptr + row * x.stride_m
        largest = tl.zeros([PART_K], dtype=tl.int32)
        for begin in range(0, k, PART_K):
            part = _load_part(row_ptr, begin, k, PART_K)
            largest = tl.maximum(largest, _magnitude(part))
        scale = _scale_of(tl.max(largest, axis=0), LARGEST)
        tl.store(scale_ptr + row, scale)
        for begin in range(0, k, PART_K):
            part = _load_part(row_ptr, begin, k, PART_K)
            offs_k = begin + tl.arange(0, PART_K)
            rounded = _round(part, scale, LARGEST)
            tl.store(rounded_ptr + row * k + offs_k, rounded, mask=offs_k < k)
        return
    program -= tokens
    tiles_k = tl.cdiv(k, BLOCK_K)
    offs_k = program % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n = program // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = offs_k < k
    mask_n = offs_n < n
    tile = tl.load(
        rows_ptr + offs_k.to(tl.int64)[:, None] * n + offs_n[None, :],
        mask=mask_k[:, None] & mask_n[None, :],
        other=0,
        eviction_policy="evict_first",
    )
    tl.store(
        turned_ptr + offs_n.to(tl.int64)[:, None] * k + offs_k[None, :],
        tl.trans(tile),
        mask=mask_n[:, None] & mask_k[None, :],
    )


@triton.jit
def _round_kernel(
    x,
    rounded_ptr,
    scale_ptr,
    LARGEST: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_wait()
        # The product may start; it waits for what is written here.
        gdc_launch_dependents()
    offs_k = tl.arange(0, BLOCK_K)
    channel = offs_k
    if TURNED:
        channel = turned_channel(offs_k)
    x_ptr = x.ptr + row * x.stride_m
    part = tl.load(x_ptr + channel, mask=offs_k < x.k, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(_magnitude(part), axis=0), LARGEST)
    tl.store(scale_ptr + row, scale)
    rounded = _round(part, scale, LARGEST)
    tl.store(rounded_ptr + row * x.k + offs_k, rounded, mask=offs_k < x.k)


@triton.jit
def _load_part(x_ptr, begin, k, PART_K: tl.constexpr):
    offs_k = begin + tl.arange(0, PART_K)
    return tl.load(x_ptr + offs_k, mask=offs_k < k, other=0.0).to(tl.float32)


@triton.jit
def _magnitude(x):
    """The bits of |x|, which are in the order of the numbers, NaN above infinity.

    The maximum of two floats leaves out a NaN.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(largest, LARGEST: tl.constexpr):
    """From the bits of a row's largest; of a row of zeros, one to divide by."""
    largest = tl.maximum(largest, 0x2B8CBCCC)  # 1e-12
    return largest.to(tl.float32, bitcast=True) / LARGEST


@triton.jit
def _round(x, scale, LARGEST: tl.constexpr):
    x = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    return x.to(tl.float8e4nv)
