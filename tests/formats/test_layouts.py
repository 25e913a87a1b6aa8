# SPDX-License-Identifier: Apache-2.0
"""Checkpoint layouts against the libraries that write and read them."""

import pytest
import torch
from torch import Tensor

from vllm_rsparse.formats.base import WeightFormatError
from vllm_rsparse.formats.checkpoints.awq import AwqGemm
from vllm_rsparse.formats.checkpoints.fp8 import (
    Fp8Block,
    Fp8BlockInverse,
    Fp8Channel,
    Fp8Tensor,
)
from vllm_rsparse.formats.checkpoints.gptq import Gptq
from vllm_rsparse.formats.checkpoints.int8 import Int8Channel, PackedInt8
from vllm_rsparse.formats.checkpoints.layout import Layout, format_of_layout, shapes_of
from vllm_rsparse.formats.checkpoints.pack_quantized import (
    PackQuantized,
    PackQuantizedAsymmetric,
)
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.testing.quantized import INT8_LAYOUTS, LAYOUTS, round_groups

N, K = 264, 384
LINEAR = "model.layers.3.mlp.up_proj"


@pytest.mark.parametrize("name", [*LAYOUTS, *INT8_LAYOUTS])
def test_a_linear_is_read_as_it_was_written(name: str) -> None:
    config, quantise = (LAYOUTS | INT8_LAYOUTS)[name]
    layout = parse_scheme(config, "config.json").layout(LINEAR)
    assert layout is not None
    tensors, expected = quantise(torch.randn(N, K) / 20)
    assert set(layout.required) <= set(tensors)
    assert set(tensors) <= set(layout.suffixes)
    assert layout.shape(shapes_of(tensors)) == (N, K)
    stored = layout.store(tensors)
    assert stored.format is layout.format
    assert stored.shape == (N, K)
    assert torch.equal(stored.dequantise(), expected)
    assert layout.zeros == (stored.zeros is not None)
    grouped = "fp8" not in name and stored.group < K
    group = stored.group if grouped else 0
    assert format_of_layout(layout) == (stored.format.name, group)


def test_a_linear_that_is_not_quantized_is_a_float() -> None:
    assert format_of_layout(None) == ("float", 0)


@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized"])
def test_int8_as_compressed_tensors_writes_it(form: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(N, K)
    scales = weight.abs().amax(1, keepdim=True) / 127
    state = {"weight": weight, "weight_scale": scales}
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(state, scheme=scheme)
    layout = PackedInt8(None) if form == "pack-quantized" else Int8Channel()
    read = layout.store({name: packed[name] for name in layout.required})
    expected = (weight / scales).round() * scales
    torch.testing.assert_close(read.dequantise(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("strategy", "group", "symmetric"),
    [
        ("group", 32, True),
        ("group", 128, False),
        ("channel", None, True),
        ("channel", None, False),
    ],
)
def test_pack_quantized_as_compressed_tensors_writes_it(
    strategy: str, group: int | None, symmetric: bool
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=4, strategy=strategy, group_size=group, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = torch.randn(N, K)
    _, scales, zeros = round_groups(weight, group or K, symmetric, torch.float32)
    state = {"weight": weight, "weight_scale": scales}
    if not symmetric:
        # Their codes are signed, -8 to 7.
        state["weight_zero_point"] = (zeros - 8).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = compressor.compress(state, scheme)
    kind = PackQuantized if symmetric else PackQuantizedAsymmetric
    stored = kind(group).store(tensors)
    theirs = compressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(stored.dequantise(), theirs)


def _codes(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 16, (rows, columns), dtype=torch.int32)


def test_awq_as_vllm_packs_it() -> None:
    quant_utils = pytest.importorskip(
        "vllm.model_executor.layers.quantization.utils.quant_utils"
    )
    codes, zeros, scales = _codes(K, N), _codes(3, N), torch.rand(3, N).half()
    stored = AwqGemm(128).store(
        {
            "qweight": quant_utils.awq_pack(codes, 4, K, N),
            "qzeros": quant_utils.awq_pack(zeros, 4, 3, N),
            "scales": scales,
        }
    )
    every = [t.float().repeat_interleave(128, 0) for t in (zeros, scales)]
    assert torch.equal(stored.dequantise().t(), (codes - every[0]) * every[1])


def test_gptq_as_vllm_packs_it() -> None:
    quant_utils = pytest.importorskip(
        "vllm.model_executor.layers.quantization.utils.quant_utils"
    )
    codes, scales = _codes(K, N), torch.rand(12, N).half()
    packed = quant_utils.gptq_pack(codes, 4, K, N)
    stored = Gptq(32).store({"qweight": packed, "scales": scales})
    every = scales.float().repeat_interleave(32, 0)
    assert torch.equal(stored.dequantise().t(), (codes - 8) * every)


@pytest.mark.parametrize("name", LAYOUTS)
def test_fused_linears_are_their_concatenation(name: str) -> None:
    """Concatenated as vLLM's loaders do: by output channels, scalars in a row."""
    config, quantise = LAYOUTS[name]
    layout = parse_scheme(config, "config.json").layout(LINEAR)
    assert layout is not None
    sizes = [256, 128, 40]
    shards = [quantise(torch.randn(n, K) * (1 + n / 100)) for n in sizes]
    along = 1 if name in ("awq", "gptq") else 0
    fused = {
        suffix: torch.cat([tensors[suffix] for tensors, _ in shards], along)
        for suffix in layout.required
    }
    expected = torch.cat([meant for _, meant in shards])
    assert torch.equal(layout.store(fused, sizes).dequantise(), expected)


@pytest.mark.parametrize(
    "name", ["w4a16-g64", "w4a16-asym-g32", "w4a16-channel", "fp8-block"]
)
def test_a_slice_of_input_channels_is_that_of_the_weight(name: str) -> None:
    """As a row-parallel rank loads it: half of the words, of the groups, of the K."""
    config, quantise = LAYOUTS[name]
    layout = parse_scheme(config, "config.json").layout(LINEAR)
    assert layout is not None
    tensors, expected = quantise(torch.randn(64, 512))
    half = {}
    for suffix in layout.required:
        tensor = tensors[suffix]
        keep = tensor.shape[1] if tensor.shape[1] == 1 else tensor.shape[1] // 2
        half[suffix] = tensor[:, -keep:]
    assert torch.equal(layout.store(half).dequantise(), expected[:, 256:])


def test_scalar_tensor_scales() -> None:
    """Old checkpoints hold the scale without dimensions."""
    weight = torch.randn(8, 6).to(torch.float8_e4m3fn)
    tensors = {"weight": weight, "weight_scale": torch.tensor(0.5)}
    assert Fp8Tensor().shape(shapes_of(tensors)) == (8, 6)
    assert torch.equal(Fp8Tensor().store(tensors).dequantise(), weight.float() / 2)


def _int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


E4M3 = torch.zeros(256, 256).to(torch.float8_e4m3fn)
UNLOADED = torch.full((256, 1), torch.finfo(torch.float32).min)

MALFORMED: dict[str, tuple[Layout, dict[str, Tensor], str]] = {
    "packed dtype": (
        PackQuantized(32),
        {"weight_packed": torch.zeros(16, 8), "weight_scale": torch.ones(16, 2)},
        "weight_packed must be torch.int32",
    ),
    "packed dimensions": (
        PackQuantized(32),
        {"weight_packed": _int32(16), "weight_scale": torch.ones(16, 2)},
        "weight_packed must have 2 dimensions",
    ),
    "part of a group": (
        PackQuantized(128),
        {"weight_packed": _int32(16, 24), "weight_scale": torch.ones(16, 2)},
        "192 input channels are no multiple of the group of 128.*groups of 32 or 64",
    ),
    "scales": (
        PackQuantized(32),
        {"weight_packed": _int32(16, 8), "weight_scale": torch.ones(2, 16)},
        r"weight_scale must be \[16, 2\], got \[2, 16\]",
    ),
    "integer scales": (
        PackQuantized(32),
        {"weight_packed": _int32(16, 8), "weight_scale": _int32(16, 2)},
        "weight_scale must be a float",
    ),
    "NaN scales": (
        PackQuantized(32),
        {
            "weight_packed": _int32(16, 8),
            "weight_scale": torch.full((16, 2), float("nan")),
        },
        "weight_scale has values that are not finite",
    ),
    "zero points": (
        PackQuantizedAsymmetric(32),
        {
            "weight_packed": _int32(16, 8),
            "weight_scale": torch.ones(16, 2),
            "weight_zero_point": _int32(16, 2),
        },
        r"weight_zero_point must be \[2, 2\], got \[16, 2\]",
    ),
    "awq zeros": (
        AwqGemm(32),
        {"qweight": _int32(64, 2), "qzeros": _int32(2, 3), "scales": torch.ones(2, 16)},
        r"qzeros must be \[2, 2\], got \[2, 3\]",
    ),
    "awq scales": (
        AwqGemm(32),
        {"qweight": _int32(64, 2), "qzeros": _int32(2, 2), "scales": torch.ones(16, 2)},
        r"scales must be \[2, 16\]",
    ),
    "gptq words": (
        Gptq(None),
        {"qweight": _int32(8, 12), "scales": torch.ones(1, 12)},
        "N must be a multiple of 8",
    ),
    "act-order": (
        Gptq(32),
        {
            "qweight": _int32(8, 16),
            "scales": torch.ones(2, 16),
            "g_idx": torch.arange(64) % 2,
        },
        "g_idx orders the input channels.*desc_act = false",
    ),
    "channel scales": (
        Fp8Channel(),
        {"weight": E4M3, "weight_scale": torch.ones(256)},
        r"weight_scale must be \[256, 1\]",
    ),
    "scales that were not loaded": (
        Fp8Channel(),
        {"weight": E4M3, "weight_scale": UNLOADED},
        "weight_scale .* was not loaded",
    ),
    "not FP8": (
        Fp8Channel(),
        {"weight": torch.zeros(4, 4), "weight_scale": torch.ones(4, 1)},
        "weight must be torch.float8_e4m3fn, got torch.float32",
    ),
    "NaN in FP8": (
        Fp8Channel(),
        {
            "weight": torch.full((8, 4), float("nan")).to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(8, 1),
        },
        "weight contains NaN",
    ),
    "tensor scales": (
        Fp8Tensor(),
        {"weight": E4M3, "weight_scale": torch.ones(3)},
        "weight_scale has 3 scales for 1 fused linears",
    ),
    "block scales": (
        Fp8BlockInverse(),
        {"weight": E4M3, "weight_scale_inv": torch.ones(2, 1)},
        r"weight_scale_inv must be \[2, 2\]",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tensors_are_refused_by_name(case: str) -> None:
    layout, tensors, message = MALFORMED[case]
    with pytest.raises(WeightFormatError, match=message):
        layout.store(tensors)


def test_a_block_that_spans_two_fused_linears_is_refused() -> None:
    tensors = {"weight": E4M3, "weight_scale": torch.ones(2, 2)}
    with pytest.raises(WeightFormatError, match="100, 156 output channels"):
        Fp8Block().store(tensors, [100, 156])
