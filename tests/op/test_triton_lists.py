# SPDX-License-Identifier: Apache-2.0
"""What a packed program lists of two planes: rows, values, and where blocks end.

Interpreted on a machine without CUDA; with CUDA the same tests run on the device.
"""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from vllm_rsparse.kernels.codes import INT4
from vllm_rsparse.kernels.group_list import list_groups
from vllm_rsparse.kernels.packing import Bounds, GroupLists, Packing
from vllm_rsparse.kernels.rsparse_linear import dot_dtype
from vllm_rsparse.kernels.tiles import Input, Split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INFINITY = float("inf")
BLOCKS = Packing(
    code=INT4.value,
    planes=2,
    sparse=True,
    tokens=1,
    spread=False,
    grouped=False,
    integer=False,
    warps=1,
    columns=64,
    words=1,
    half=1,
    halves=1,
    group=64,
    span=64,
    blocks=1,
    length=128,
    aligned=True,
    even_n=True,
    even_k=True,
    pdl=False,
)


@triton.jit
def _list_kernel(
    x,
    threshold_ptr,
    lists,
    steps_ptr,
    tokens,
    PACKING: tl.constexpr,
    DTYPE: tl.constexpr,
):
    steps = list_groups(
        x,
        threshold_ptr,
        x.k,
        lists,
        Bounds(tl.program_id(1) * PACKING.tokens, tokens),
        Split(tl.program_id(0), tl.num_programs(0)),
        PACKING,
        DTYPE,
    )
    tl.store(steps_ptr, steps)


@pytest.mark.parametrize("tokens", [1, 3])
def test_lists(tokens):
    """Block by block the first plane's rows, the second's, and padding."""
    span, k, slots = BLOCKS.span, 192, 4
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator).half()
    # Sixteenths of these are subnormal in float16.
    x[:, 3] = 2.0**-12 + 2.0**-20
    thresholds = torch.rand(2, k, generator=generator) * 1.5
    thresholds[:, 3] = -1.0
    thresholds[:, 128:] = INFINITY
    length = 4 * 2 * span
    rows = torch.full((length,), -1, dtype=torch.int32)
    values = torch.full((slots, length), 9.0).half()
    heads = torch.full((length // 16,), -1, dtype=torch.int32)
    second = torch.full((length // 16, slots), 9.0)
    steps = torch.zeros(1, dtype=torch.int32)
    made = (one.to(DEVICE) for one in (rows, values, heads, second))
    lists = GroupLists(*made, None)
    steps = steps.to(DEVICE)
    packing = BLOCKS._replace(tokens=slots, spread=True, blocks=4, length=length)
    source = Input(x.to(DEVICE), k, k)
    args = (source, thresholds.to(DEVICE), lists, steps, tokens, packing)
    _list_kernel[(1,)](*args, dot_dtype(x.dtype))
    rows, values, heads, second = (one.cpu() for one in lists[:4])

    wanted = x.float().abs() > thresholds[:, None]
    read = wanted.any(1)
    step = 0
    for block in range(2):
        channels = torch.arange(block * span, (block + 1) * span)
        planes = [channels[read[plane, channels]] for plane in range(2)]
        expected = torch.cat([planes[0], k + planes[1]])
        count = len(expected)
        begin, end = step * 16, (step + -(-count // 16)) * 16
        assert rows[begin : begin + count].tolist() == expected.tolist()
        assert set(rows[begin + count : end].tolist()) <= {block * span}
        x_first = torch.where(wanted[0], x, 0)[:, planes[0]]
        x_second = torch.where(wanted[1], x, 0)[:, planes[1]] / 16
        listed = torch.cat([x_first, x_second], 1)
        assert torch.equal(values[:tokens, begin : begin + count], listed)
        assert not values[:, begin + count : end].any()
        assert not values[tokens:, begin:end].any()
        step = end // 16
        assert heads[begin // 16 : step].tolist() == [
            2 * block + (end // 16 - 1 == one) for one in range(begin // 16, step)
        ]
        sums = x_second.float().sum(1)
        assert torch.allclose(second[step - 1, :tokens], sums, rtol=1e-6, atol=0)
    assert steps.item() == step
    # A block without rows has no steps.
    assert rows[step * 16 :].eq(-1).all()
    assert heads[step:].eq(-1).all()


@pytest.mark.parametrize("warps", [1, 4])
def test_lists_in_integers(warps):
    """Units of four rows; each block's x in units of its own, as two digits."""
    span, blocks, k = BLOCKS.span, 2, 100
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, k, generator=generator).bfloat16()
    x[0, 70] = 1000
    thresholds = torch.rand(2, k, generator=generator)
    thresholds[:, 70] = -1.0
    length = blocks * 2 * span
    rows = torch.full((length,), -1, dtype=torch.int32)
    values = torch.full((length,), 9, dtype=torch.int16)
    heads = torch.full((length // 4,), -1, dtype=torch.int32)
    sums = torch.full((3, blocks), float("nan"))
    steps = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows, values, heads, sums = (one.to(DEVICE) for one in (rows, values, heads, sums))
    lists = GroupLists(rows, values, heads, None, sums)
    packing = BLOCKS._replace(
        grouped=True,
        integer=True,
        warps=warps,
        columns=64 * warps,
        blocks=blocks,
        length=length,
        even_k=False,
    )
    source = Input(x.to(DEVICE), k, k)
    args = (source, thresholds.to(DEVICE), lists, steps, 1, packing)
    _list_kernel[(1,)](*args, dot_dtype(x.dtype), num_warps=warps)

    wanted = x.float().abs() > thresholds
    begin = 0
    for block in range(blocks):
        channels = torch.arange(block * span, min(k, (block + 1) * span))
        here = [channels[wanted[plane, channels]] for plane in range(2)]
        largest = x[0, torch.cat(here)].float().abs().max()
        unit = 2.0 ** (largest.log2().floor() - 13)
        assert sums[0, block] == unit
        expected = [torch.round(x[0, here[0]] / unit), x[0, here[1]] / unit / 16]
        expected[1] = torch.round(expected[1].float())
        assert sums[1:, block].tolist() == [one.float().sum() for one in expected]
        count = sum(map(len, here))
        end = begin + -(-count // 4) * 4
        listed = torch.cat([here[0], k + here[1]])
        assert rows[begin : begin + count].tolist() == listed.tolist()
        low = values[begin:end].to(torch.int8).int()
        high = values[begin:end].int() >> 8
        numbers = (256 * high + low)[:count]
        assert numbers.tolist() == torch.cat(expected).int().tolist()
        assert not values[begin + count : end].any()
        assert heads[begin // 4 : end // 4].eq(block).all()
        begin = end
    # The last step is completed with rows of weight zero.
    assert steps.item() == -(-begin // 32)
    assert not values[begin : steps.item() * 32].any()
    assert rows[: steps.item() * 32].ge(0).all()
