# SPDX-License-Identifier: Apache-2.0
"""The quantized formats: what they stand for, what they refuse, what a row costs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vllm_rsparse.formats.base import StoredWeight, WeightFormatError
from vllm_rsparse.formats.fp8 import FP8, store_fp8
from vllm_rsparse.formats.fp8_block import (
    FP8_BLOCK,
    store_fp8_block,
)
from vllm_rsparse.formats.int4 import INT4, store_int4
from vllm_rsparse.formats.nibbles import pack_nibbles, unpack_nibbles
from vllm_rsparse.formats.registry import FORMATS, format_of_code, format_of_name

E4M3 = torch.float8_e4m3fn


def _codes(*shape: int) -> Tensor:
    return torch.randint(0, 16, shape, dtype=torch.uint8)


def _sixteens(*shape: int) -> torch.Tensor:
    return torch.full(shape, 16, dtype=torch.uint8)


def _int4(n: int, k: int, group: int, zeros: bool = True) -> StoredWeight:
    scales = torch.rand(k // group, n).bfloat16()
    return store_int4(_codes(k, n), scales, _codes(k // group, n) if zeros else None)


def test_formats_are_found_by_name_and_number() -> None:
    assert [one.code for one in FORMATS] == [0, 1, 2, 3, 4]
    for one in FORMATS:
        assert format_of_code(one.code) is one
        assert format_of_name(one.name) is one


def test_a_word_holds_eight_neighbours_low_nibble_first() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x87654321 - (1 << 32)]]
    column = pack_nibbles(_codes(12, 8)).t().contiguous().t()
    assert unpack_nibbles(column).shape == (12, 8)
    codes = _codes(3, 5, 16)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(8, 32, 32), (40, 192, 64), (264, 384, 128), (24, 37, 37)]
)
def test_int4_is_its_definition(n: int, k: int, group: int, zeros: bool) -> None:
    codes, scales = _codes(k, n), torch.randn(k // group, n).half()
    zero_points = _codes(k // group, n) if zeros else None
    weight = store_int4(codes, scales, zero_points)
    assert weight.group == group
    assert (weight.data.dtype, weight.data.shape) == (torch.int32, (k, n // 8))
    expected = torch.empty(n, k)
    for channel in range(k):
        g = channel // group
        zero = 8 if zero_points is None else zero_points[g].int()
        expected[:, channel] = (codes[channel].int() - zero) * scales[g].float()
    assert torch.equal(weight.dequantise(), expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 130), (37, 5), (200, 129)])
def test_fp8_is_its_definition(n: int, k: int) -> None:
    elements, scales = torch.randn(n, k).to(E4M3), torch.rand(n).bfloat16()
    weight = store_fp8(elements, scales)
    assert weight.data.t().is_contiguous()
    expected = elements.float() * scales.float().view(n, 1)
    assert torch.equal(weight.dequantise(), expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (128, 256), (300, 129), (127, 640)])
def test_fp8_block_is_its_definition(n: int, k: int) -> None:
    elements = torch.randn(n, k).to(E4M3)
    scales = torch.rand(-(-n // 128), -(-k // 128))
    weight = store_fp8_block(elements, scales)
    rows, columns = torch.arange(n) // 128, torch.arange(k) // 128
    expected = elements.float() * scales[rows][:, columns]
    assert torch.equal(weight.dequantise(), expected)


def test_storage_that_already_has_the_layout_is_not_copied() -> None:
    elements = torch.randn(8, 6).to(E4M3).t()
    assert store_fp8(elements, torch.rand(6)).data.data_ptr() == elements.data_ptr()


FP8_16 = store_fp8(torch.zeros(16, 32).to(E4M3), torch.ones(16))
BLOCK_16 = store_fp8_block(torch.zeros(16, 129).to(E4M3), torch.ones(1, 2))
INT4_16 = _int4(16, 64, 32)

MALFORMED = {
    "int4 words": (INT4_16, {"data": torch.zeros(64, 3, dtype=torch.int32)}, "weight"),
    "int4 dtype": (INT4_16, {"data": torch.zeros(64, 2)}, "weight .* got float32"),
    "int4 layout": (
        INT4_16,
        {"data": torch.zeros(2, 64, dtype=torch.int32).t()},
        r"weight must be contiguous int32 \[64, 2\], got strides",
    ),
    "int4 N": (INT4_16, {"n": 12}, "N must be a multiple of 8"),
    "int4 group": (INT4_16, {"group": 16}, "groups of 16.*32, 64, 128"),
    "int4 part of a group": (INT4_16, {"group": 128}, "groups of 128"),
    "int4 no group": (INT4_16, {"group": 0}, "groups of 0"),
    "int4 scales": (INT4_16, {"scales": torch.ones(1, 16)}, r"scales .*\[2, 16\]"),
    "int4 scale dtype": (INT4_16, {"scales": torch.ones(2, 16).double()}, "float64"),
    "int4 no scales": (INT4_16, {"scales": None}, "scales .*there are none"),
    "int4 zeros": (
        INT4_16,
        {"zeros": torch.zeros(2, 16, dtype=torch.int32)},
        r"zeros must be contiguous int32 \[2, 2\], got int32 \[2, 16\]",
    ),
    "fp8 dtype": (FP8_16, {"data": torch.zeros(32, 16).t()}, "weight.* got float32"),
    "fp8 e5m2": (
        FP8_16,
        {"data": torch.zeros(32, 16).to(torch.float8_e5m2).t()},
        "weight.* got float8_e5m2",
    ),
    "fp8 rows": (FP8_16, {"data": torch.zeros(16, 32).to(E4M3)}, "got strides"),
    "fp8 scales": (FP8_16, {"scales": torch.ones(16, 1)}, r"scales .*\[16\]"),
    "fp8 scale dtype": (FP8_16, {"scales": torch.ones(16).half()}, "scales .*float32"),
    "fp8 zeros": (FP8_16, {"zeros": torch.zeros(16)}, "fp8 has no zeros"),
    "fp8 group": (FP8_16, {"group": 128}, "fp8 has no groups"),
    "block scales": (BLOCK_16, {"scales": torch.ones(1, 2)}, r"scales .*\[2, 1\]"),
    "block group": (BLOCK_16, {"group": 64}, "groups of 128, got 64"),
    "block zeros": (BLOCK_16, {"zeros": torch.zeros(1)}, "fp8-block has no zeros"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_by_name(case: str) -> None:
    weight, change, message = MALFORMED[case]
    with pytest.raises(WeightFormatError, match=message):
        replace(weight, **change)


@pytest.mark.parametrize(
    ("codes", "scales", "zeros", "message"),
    [
        (_codes(32, 12), torch.ones(1, 12), None, "N must be a multiple of 8"),
        (_codes(32, 8).int(), torch.ones(1, 8), None, "codes must be uint8"),
        (_sixteens(32, 8), torch.ones(1, 8), None, "codes must lie between 0 and 15"),
        (_codes(33, 8), torch.ones(2, 8), None, "a group G that divides K"),
        (_codes(32, 8), torch.ones(0, 8), None, "a group G that divides K"),
        (_codes(32, 8), torch.ones(1, 8), _codes(2, 8), "zeros must be .1, 8. like"),
        (_codes(32, 8), torch.ones(1, 8), _sixteens(1, 8), "zeros must lie between"),
    ],
)
def test_logical_values_that_int4_cannot_store(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, message: str
) -> None:
    with pytest.raises(WeightFormatError, match=message):
        store_int4(codes, scales, zeros)


def test_blocks_do_not_span_fused_linears() -> None:
    FP8_BLOCK.check_shards([256, 128, 40])
    with pytest.raises(WeightFormatError, match=r"256, 40, 128 output channels.*ranks"):
        FP8_BLOCK.check_shards([256, 40, 128])


def test_words_do_not_span_fused_linears() -> None:
    INT4.check_shards([16, 8])
    with pytest.raises(WeightFormatError, match=r"12, 4 output .* a multiple of 8"):
        INT4.check_shards([12, 4])


def test_bytes_of_reading_everything_are_the_bytes_at_rest() -> None:
    weights = [
        FP8_16,
        store_fp8_block(torch.zeros(384, 256).to(E4M3), torch.ones(3, 2)),
        _int4(64, 256, 128),
        _int4(64, 256, 32, zeros=False),
        _int4(64, 256, 256),
    ]
    for weight in weights:
        read = weight.format.bytes_of(weight, weight.n)
        assert read.whole(weight.k) == weight.nbytes, weight.format.name
        assert read.read(weight.k, (1.0,)) == weight.nbytes


def test_int4_dequantises_as_compressed_tensors_does() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    weight = _int4(32, 256, 64)
    codes = unpack_nibbles(weight.data).t().to(torch.int8)
    assert weight.scales is not None
    assert weight.zeros is not None
    theirs = dequantize(
        codes,
        weight.scales.t().float(),
        unpack_nibbles(weight.zeros).t().to(torch.int8),
        args=QuantizationArgs(num_bits=4, strategy="group", group_size=64),
    )
    assert torch.equal(weight.dequantise(), theirs)


def test_fp8_dequantises_as_compressed_tensors_does() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    elements = torch.randn(200, 256).to(E4M3)
    scales = torch.rand(200, 1)
    float8 = {"num_bits": 8, "type": "float"}
    theirs = dequantize(
        elements, scales, args=QuantizationArgs(**float8, strategy="channel")
    )
    weight = store_fp8(elements, scales.flatten())
    assert weight.format is FP8
    assert torch.equal(weight.dequantise(), theirs)
    scales = torch.rand(2, 2)
    theirs = dequantize(
        elements,
        scales,
        args=QuantizationArgs(**float8, strategy="block", block_structure=[128, 128]),
    )
    weight = store_fp8_block(elements, scales)
    assert weight.format is FP8_BLOCK
    assert torch.equal(weight.dequantise(), theirs)
