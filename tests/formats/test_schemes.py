# SPDX-License-Identifier: Apache-2.0
"""``quantization_config`` of base checkpoints: what is read, what is refused, how."""

from copy import deepcopy
from typing import Any

import pytest

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.checkpoints.awq import AwqGemm
from vllm_rsparse.formats.checkpoints.fp8 import (
    Fp8Block,
    Fp8BlockInverse,
    Fp8Channel,
    Fp8Tensor,
)
from vllm_rsparse.formats.checkpoints.gptq import Gptq
from vllm_rsparse.formats.checkpoints.layout import Layout
from vllm_rsparse.formats.checkpoints.pack_quantized import (
    PackQuantized,
    PackQuantizedAsymmetric,
)
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.testing.quantized import (
    AWQ,
    FP8,
    GPTQ,
    LAYOUTS,
    compressed_tensors_config,
)

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def _of(name: str) -> dict[str, Any]:
    return deepcopy(LAYOUTS[name][0])


def _layout(config: dict[str, Any], name: str = UP) -> Layout | None:
    return parse_scheme(config, "config.json").layout(name)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("w4a16-g128", PackQuantized(128)),
        ("w4a16-asym-g32", PackQuantizedAsymmetric(32)),
        ("w4a16-channel", PackQuantized(None)),
        ("awq", AwqGemm(128)),
        ("gptq", Gptq(128)),
        ("fp8-channel", Fp8Channel()),
        ("fp8-tensor", Fp8Tensor()),
        ("fp8-tensor-native", Fp8Tensor()),
        ("fp8-block", Fp8Block()),
        ("fp8-block-native", Fp8BlockInverse()),
    ],
)
def test_each_method_gives_its_layout(name: str, layout: Layout) -> None:
    assert _layout(_of(name)) == layout


def test_keys_that_other_tools_add_are_ignored() -> None:
    config = _of("w4a16-g128")
    config |= {"version": "0.19.0", "kv_cache_scheme": None, "future": {"a": 1}}
    config["config_groups"]["group_0"]["weights"]["observer"] = "minmax"
    assert _layout(config) == PackQuantized(128)
    tools = {"damp_percent": 0.1, "quantizer": ["gptqmodel:2"], "true_sequential": True}
    assert _layout(GPTQ | tools) == Gptq(128)


def test_a_strategy_follows_from_the_group_size_where_none_is_named() -> None:
    for group_size, layout in ((64, PackQuantized(64)), (-1, PackQuantized(None))):
        config = compressed_tensors_config(
            "pack-quantized", num_bits=4, type="int", group_size=group_size
        )
        assert _layout(config) == layout


def test_older_files_write_blocks_as_text() -> None:
    config = _of("fp8-block")
    config["config_groups"]["group_0"]["weights"]["block_structure"] = "128x128"
    assert _layout(config) == Fp8Block()


@pytest.mark.parametrize("ignored", [DOWN, "re:.*layers.1.*", "re:model.*down"])
def test_compressed_tensors_ignores_by_name_or_pattern(ignored: str) -> None:
    config = _of("fp8-channel")
    config["ignore"].append(ignored)
    assert _layout(config, DOWN) is None
    assert _layout(config, UP) == Fp8Channel()


def test_a_pattern_must_match_from_the_start_of_the_name() -> None:
    config = _of("fp8-channel") | {"ignore": ["re:layers.1", "down_proj"]}
    assert _layout(config, DOWN) == Fp8Channel()


def test_groups_of_targets() -> None:
    config = _of("w4a16-g128")
    other = _of("fp8-channel")["config_groups"]["group_0"]
    other |= {"targets": [r"re:.*down_proj$"], "format": "float-quantized"}
    attention = {"targets": ["LlamaAttention"], "weights": None}
    config["config_groups"] |= {"group_1": other, "kv": attention}
    config["format"] = "mixed-precision"
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert _layout(config, UP) == PackQuantized(128)
    assert _layout(config, DOWN) == Fp8Channel()
    config["config_groups"]["group_0"]["targets"] = [UP]
    assert _layout(config, "model.layers.0.mlp.gate_proj") is None


def test_awq_keeps_modules_by_part_of_the_name() -> None:
    config = AWQ | {"modules_to_not_convert": ["layers.1."]}
    scheme = parse_scheme(config, "config.json")
    assert scheme.layout(DOWN) is None
    assert scheme.layout(UP) == AwqGemm(128)
    assert not scheme.tensors_decide
    assert parse_scheme(AWQ, "config.json").tensors_decide


def test_older_awq_keys() -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}
    assert _layout(config) == AwqGemm(64)


def test_gptq_rules_for_modules() -> None:
    dynamic = {r"-:.*\.down_proj": {}, r"+:.*layers\.0\.": {"group_size": 32}}
    config = GPTQ | {"dynamic": dynamic}
    assert _layout(config, DOWN) is None
    assert _layout(config, UP) == Gptq(32)
    assert _layout(config, "model.layers.1.mlp.up_proj") == Gptq(128)
    listed = GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up"]]}
    assert _layout(listed, UP) == Gptq(128)
    assert _layout(listed, DOWN) is None


def test_act_order_over_whole_channels_is_no_order() -> None:
    assert _layout(GPTQ | {"desc_act": True, "group_size": -1}) == Gptq(None)


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_native_fp8_keeps_modules_by_name(key: str) -> None:
    config = _of("fp8-block-native") | {key: [DOWN, "mlp"]}
    assert _layout(config, DOWN) is None
    assert _layout(config, UP) == Fp8BlockInverse()


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    return compressed_tensors_config(form, **weights)


def _w4(**weights: Any) -> dict[str, Any]:
    return _compressed("pack-quantized", **({"num_bits": 4, "type": "int"} | weights))


def _w8(**weights: Any) -> dict[str, Any]:
    return _compressed("float-quantized", num_bits=8, type="float", **weights)


def _w4a8() -> dict[str, Any]:
    config = _w4(strategy="channel")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    return config


def _with(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | changes


CHANNEL = {"strategy": "channel"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nvfp4": (_compressed("nvfp4-pack-quantized", num_bits=4, type="float"), "NVFP4"),
    "mxfp4": (_compressed("mxfp4-pack-quantized", num_bits=4, type="float"), "MXFP4"),
    "int8 per tensor": (
        _compressed("int-quantized", strategy="tensor"),
        "INT8 W8A8 by tensor.*per channel",
    ),
    "naive int8": (_compressed("naive-quantized", **CHANNEL), "not quantized, in int"),
    "asymmetric int8": (
        _compressed("int-quantized", symmetric=False, **CHANNEL),
        "asymmetric INT8",
    ),
    "int8 groups": (
        _w4(num_bits=8, strategy="group", group_size=64),
        "INT8 by group of 64.*groups of 128",
    ),
    "int8 order": (_w4(num_bits=8, actorder="group", **CHANNEL), "act-order"),
    "2:4": (_compressed("marlin-24", num_bits=4, **CHANNEL), "2:4 sparsity"),
    "unknown format": (_compressed("zip"), "the format 'zip'"),
    "6 bits": (_w4(num_bits=6, **CHANNEL), "6-bit int weights"),
    "3 bits": (_w4(num_bits=3, **CHANNEL), "3-bit int weights"),
    "W4A8": (_w4a8(), "W4A8"),
    "act-order": (_w4(strategy="group", group_size=128, actorder="group"), "act-order"),
    "group size": (_w4(strategy="group", group_size=16), "group size of 16.*32, 64"),
    "per tensor": (_w4(strategy="tensor"), "W4A16 by tensor"),
    "blocks": (_w8(strategy="block", block_structure=[64, 64]), r"blocks of \[64, 64"),
    "fp8 groups": (_w8(strategy="group", group_size=128), "FP8 by group"),
    "asymmetric fp8": (_w8(symmetric=False, **CHANNEL), "asymmetric 8-bit float"),
    "transforms": (
        _with(_w4(**CHANNEL), transform_config={"config_groups": {"v": {}}}),
        r"transforms of the activations \(transform_config: v\)",
    ),
    "sparse weights": (
        _with(_w8(**CHANNEL), sparsity_config={"format": "sparse-bitmask"}),
        "sparsity of the weights",
    ),
    "not compressed": (
        _with(_w8(**CHANNEL), quantization_status="calibration"),
        "quantization_status 'calibration'",
    ),
    "awq bits": (AWQ | {"bits": 8}, "AWQ with 8 bits.*4 bits"),
    "awq zeros": (AWQ | {"zero_point": False}, "AWQ without zero points"),
    "awq version": (AWQ | {"version": "GEMV"}, "AWQ version 'GEMV'.*gemm"),
    "gptq bits": (GPTQ | {"bits": 3}, "GPTQ with 3 bits.*4 bits"),
    "gptq order": (GPTQ | {"desc_act": True}, "act-order.*desc_act = false"),
    "gptq asymmetric": (GPTQ | {"sym": False}, "asymmetric GPTQ.*AWQ"),
    "gptq format": (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marl"),
    "gptq rule": (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, "GPTQ with 8 bits"),
    "gptq pattern": (GPTQ | {"dynamic": {"-:(": {}}}, r"pattern '\('.*correct it"),
    "e5m2": (FP8 | {"fmt": "e5m2"}, "FP8 in the format 'e5m2'"),
    "native blocks": (FP8 | {"weight_block_size": [1, 128]}, r"blocks of \[1, 128\]"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    "torchao": ({"quant_method": "torchao"}, "torchao"),
    "gguf": ({"quant_method": "gguf"}, "GGUF"),
    "modelopt": ({"quant_method": "modelopt_fp4"}, "NVFP4"),
    "unknown method": ({"quant_method": "new"}, "quant_method 'new'"),
    "no method": ({}, "quant_method None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_rest_is_refused_by_name_with_what_to_do(case: str) -> None:
    config, message = REFUSED[case]
    what = rf"^config\.json.*: .*{message}"
    with pytest.raises(CheckpointError, match=what) as caught:
        _layout(config)
    assert "is not supported; " in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": "4"}, "bits: .*'4'"),
        ({"quant_method": "gptq", "bits": 4}, "group_size: Field required"),
        (AWQ | {"zero_point": 1}, "zero_point: "),
        (FP8 | {"weight_block_size": 128}, "weight_block_size: "),
        (_w4(strategy=["group"]), r"config_groups\.group_0\.weights\.strategy: "),
        ({"quant_method": "compressed-tensors"}, "config_groups: Field required"),
    ],
)
def test_malformed_keys_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quantization_config: {message}"):
        _layout(config)
