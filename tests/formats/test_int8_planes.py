# SPDX-License-Identifier: Apache-2.0
"""The format int8-planes: its definition, and what rounding to it loses."""

from dataclasses import replace

import pytest
import torch

from vllm_rsparse.formats import int8_planes
from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.int4 import INT4
from vllm_rsparse.formats.int8 import store_int8
from vllm_rsparse.formats.int8_planes import (
    INT8_PLANES,
    PLANES_WHILE_LOADING,
    encode_planes,
)
from vllm_rsparse.formats.nibbles import pack_nibbles, unpack_nibbles
from vllm_rsparse.formats.plane_bits import group_of, plane_bits
from vllm_rsparse.testing.cases import relative_error


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, dtype=torch.uint8)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(8, 32, 32), (40, 192, 64)])
def test_is_its_definition(n: int, k: int, group: int, zeros: bool) -> None:
    codes, scales = _codes(2, k, n), torch.rand(k // group, n).half()
    zero_points = _codes(k // group, n) if zeros else None
    packed = None if zero_points is None else pack_nibbles(zero_points)
    weight = StoredWeight(INT8_PLANES, pack_nibbles(codes), n, k, scales, packed, group)
    assert INT8_PLANES.planes == 2
    expected = torch.empty(2, n, k)
    for channel in range(k):
        g = channel // group
        zero = 8 if zero_points is None else zero_points[g].int()
        scale = scales[g].float()
        expected[0, :, channel] = (codes[0, channel].int() - zero) * scale
        expected[1, :, channel] = (codes[1, channel].int() - 8) / 16 * scale
    for plane, meant in zip(
        INT8_PLANES.dequantise_planes(weight), expected, strict=True
    ):
        assert torch.equal(plane, meant)
    assert torch.equal(weight.dequantise(), expected[0] + expected[1])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_of_both_planes_is_within_half_a_step(symmetric, dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * torch.rand(64, 1) * 0.1
    stored = encode_planes(weight, 64, dtype, symmetric=symmetric)
    assert stored.scales is not None
    assert stored.scales.dtype == dtype
    assert (stored.zeros is None) == symmetric
    step = stored.scales.float().repeat_interleave(64, 0).t()
    first, second = INT8_PLANES.dequantise_planes(stored)
    # The first plane's codes end where its scale leaves values out: its neighbour then
    # reaches half a step further. Elsewhere it rounds to nearest.
    inner = (unpack_nibbles(stored.data[0]).t() % 15) != 0
    off = (weight - first).abs() / step
    assert off[inner].max() <= 0.5 * (1 + 1e-6)
    # Sixteenths, but for residuals of 7.5 to 8 of them, where the codes end at 7.
    both = (weight - first - second).abs() / step
    assert (both[inner] <= 1 / 16).all()
    assert (both[inner] > 0.5 / 16 * (1 + 1e-3)).float().mean() < 0.05


def test_slices_are_encoded_as_in_the_whole() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 256).bfloat16()
    whole = encode_planes(weight, 64, torch.bfloat16).dequantise()
    part = encode_planes(weight[16:32, 64:192], 64, torch.bfloat16).dequantise()
    assert torch.equal(part, whole[16:32, 64:192])


@pytest.mark.parametrize("symmetric", [False, True])
def test_chunks_are_encoded_as_the_whole(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three output channels at a time, and one is left."""
    torch.manual_seed(0)
    weight = torch.randn(16, 320)
    whole = encode_planes(weight, 64, torch.float32, symmetric=symmetric)
    monkeypatch.setitem(int8_planes._CHUNK_ELEMENTS, "cpu", 3 * 320 + 1)
    parts = encode_planes(weight, 64, torch.float32, symmetric=symmetric)
    for one, other in zip(parts.tensors, whole.tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("symmetric", "four", "eight"), [(False, 0.098, 0.0085), (True, 0.107, 0.009)]
)
def test_what_rounding_loses_on_normal_weights(
    symmetric: bool, four: float, eight: float
) -> None:
    """Next to plain round-to-nearest over the whole range.

    That loses 0.1006 and 0.0068, with the zero point 8 everywhere 0.1112 and 0.0077.
    """
    torch.manual_seed(0)
    weight = torch.randn(256, 1024)
    stored = encode_planes(weight, 128, torch.bfloat16, symmetric=symmetric)
    first, second = INT8_PLANES.dequantise_planes(stored)
    assert relative_error(first, weight) < four
    assert relative_error(first + second, weight) < eight


def test_zero_and_constant_groups_are_exact() -> None:
    weight = torch.zeros(8, 64)
    weight[1] = 0.5
    weight[2] = -3.0
    stored = encode_planes(weight, 32, torch.float32)
    error = (stored.dequantise() - weight).abs()
    assert stored.scales is not None
    assert stored.scales.isfinite().all()
    assert (error <= weight.abs() / 15 / 16 / 2 * (1 + 1e-4)).all()


def test_bytes_by_plane() -> None:
    stored = encode_planes(torch.randn(64, 256), 128, torch.bfloat16)
    read = INT8_PLANES.bytes_of(stored, 64)
    first, second = read.rows
    assert first == 32 + 64 * 2.5 / 128
    assert second == 32
    assert read.whole(256) == stored.nbytes
    assert (first,) == INT4.bytes_of(stored, 64).rows
    assert read.fixed == 0


def test_the_group_is_the_largest_that_divides() -> None:
    assert [group_of(k) for k in (4096, 576, 96, 100)] == [128, 64, 32, None]
    with pytest.raises(ValueError, match="divides 100"):
        plane_bits(100)
    with pytest.raises(WeightFormatError, match="none divides this number"):
        PLANES_WHILE_LOADING.encode(torch.randn(8, 100))


@pytest.mark.parametrize("k", [4096, 576, 96])
def test_bits_are_those_of_the_tensors(k: int) -> None:
    stored = PLANES_WHILE_LOADING.encode(torch.randn(16, k))
    assert stored.scales is not None
    assert stored.scales.dtype == torch.bfloat16
    bits = [8 * size / 16 for size in INT8_PLANES.bytes_of(stored, 16).rows]
    assert plane_bits(k) == tuple(bits)


def test_a_rank_has_the_groups_of_the_whole_linear() -> None:
    """576 channels have groups of 64, the 192 of each of three ranks would too."""
    weight = torch.randn(16, 576).half()
    whole = PLANES_WHILE_LOADING.encode(weight).dequantise()
    part = PLANES_WHILE_LOADING.encode(weight[:, 192:384], None, 576)
    assert part.group == 64
    assert torch.equal(part.dequantise(), whole[:, 192:384])
    with pytest.raises(WeightFormatError, match=r"288 of 576.*splits a group of 64"):
        PLANES_WHILE_LOADING.encode(weight[:, :288], None, 576)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": torch.zeros(64, 2, dtype=torch.int32)}, r"weight .*\[2, 64, 2\]"),
        ({"data": torch.zeros(2, 64, 2)}, "got float32"),
        ({"n": 12}, "N must be a multiple of 8"),
        ({"group": 64, "k": 64, "scales": None}, "there are none"),
        ({"group": 48}, "groups of 48.*128, 64, 32"),
        ({"zeros": torch.zeros(2, 16, dtype=torch.int32)}, "zeros must be"),
    ],
    ids=str,
)
def test_malformed(change, message) -> None:
    stored = encode_planes(torch.randn(16, 64), 32, torch.bfloat16)
    with pytest.raises(WeightFormatError, match=message):
        replace(stored, **change)


def test_shapes_that_cannot_be_encoded() -> None:
    for n, k, group in ((12, 64, 32), (16, 65, 32), (16, 64, 48)):
        with pytest.raises(WeightFormatError, match=rf"\[{n}, {k}\]"):
            encode_planes(torch.randn(n, k), group, torch.bfloat16)


@pytest.mark.parametrize(("k", "group"), [(256, 128), (192, 192), (96, 96)])
def test_int8_is_split_exactly(k: int, group: int) -> None:
    """Every code from -128 to 127, with either zero point."""
    n = 16
    codes = torch.arange(n * k).view(n, k) % 240 - 120
    codes[8:] -= 1  # -121 to 118: these need the zero point 8
    codes[0, 0], codes[8, 0] = 127, -128
    scales = (torch.rand(n, k // group) / 100).bfloat16()
    weight = store_int8(codes.to(torch.int8), scales)
    stored = PLANES_WHILE_LOADING.requantise(weight, torch.bfloat16)
    assert torch.equal(stored.dequantise(), weight.dequantise())
    assert stored.zeros is not None
    assert set(unpack_nibbles(stored.zeros).flatten().tolist()) == {7, 8}
    assert stored.scales is not None
    assert stored.scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("least", "most", "zero"),
    [(-128, 119, 8), (-121, 119, 8), (-120, 119, 8), (-120, 120, 7), (-120, 127, 7)],
)
def test_int8_up_to_the_ends_of_a_zero_point(least: int, most: int, zero: int) -> None:
    codes = torch.randint(-50, 50, (8, 64), dtype=torch.int8)
    codes[2, 5], codes[2, 60] = least, most
    weight = store_int8(codes, torch.ones(8, 1) / 64)
    stored = PLANES_WHILE_LOADING.requantise(weight, torch.bfloat16)
    assert torch.equal(stored.dequantise(), weight.dequantise())
    assert stored.zeros is not None
    assert unpack_nibbles(stored.zeros)[0, 2] == zero


def test_int8_is_split_in_chunks_as_in_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes = torch.randint(-128, 128, (16, 640)).to(torch.int8)
    weight = store_int8(codes, (torch.rand(16, 5) / 100).bfloat16())
    whole = PLANES_WHILE_LOADING.requantise(weight, torch.bfloat16)
    monkeypatch.setitem(int8_planes._CHUNK_ELEMENTS, "cpu", 2 * 128 * 16 + 1)
    parts = PLANES_WHILE_LOADING.requantise(weight, torch.bfloat16)
    for one, other in zip(parts.tensors, whole.tensors, strict=True):
        assert torch.equal(one, other)


def test_int8_that_cannot_be_split_is_rounded_like_floats() -> None:
    """By group: codes beyond both ends, and scales that bfloat16 has not."""
    codes = torch.randint(-100, 100, (16, 256), dtype=torch.int8)
    codes[3, 5], codes[3, 6] = 127, -127  # in the first group of a channel
    scales = (torch.rand(16, 2) / 100).bfloat16().float()
    scales[7, 1] *= 1 + 2**-12
    weight = store_int8(codes, scales)
    stored = PLANES_WHILE_LOADING.requantise(weight, torch.bfloat16)
    rounded = PLANES_WHILE_LOADING.encode(weight.dequantise()).dequantise()
    exact = torch.ones(16, 2, dtype=torch.bool)
    exact[3, 0] = exact[7, 1] = False
    every = exact.repeat_interleave(128, 1)
    right = torch.where(every, weight.dequantise(), rounded)
    assert torch.equal(stored.dequantise(), right)
    assert not torch.equal(rounded, weight.dequantise())


def test_a_rank_splits_what_the_whole_linear_does() -> None:
    codes = torch.randint(-127, 128, (32, 256), dtype=torch.int8)
    scales = (torch.rand(32, 1) / 100).bfloat16()
    whole = PLANES_WHILE_LOADING.requantise(store_int8(codes, scales), torch.bfloat16)
    for part in (slice(0, 128), slice(128, 256)):
        mine = store_int8(codes[:, part], scales)
        stored = PLANES_WHILE_LOADING.requantise(mine, torch.bfloat16, channels=256)
        assert torch.equal(stored.data, whole.data[:, part])
    mine = store_int8(codes[:, :64], scales)
    with pytest.raises(WeightFormatError, match="splits a group of 128"):
        PLANES_WHILE_LOADING.requantise(mine, torch.bfloat16, channels=256)
