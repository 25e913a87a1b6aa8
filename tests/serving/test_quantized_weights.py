# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints through vLLM's own loaders, with tensor-parallel ranks faked.

Each rank's layer is built with vLLM's classes and loaded from the whole checkpoint
tensors; what it then stores must stand for its slice of the weights.
"""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.serving.weights.base import Partition, replace_parameters
from vllm_rsparse.serving.weights.factory import checkpoint_weights, shared_layout
from vllm_rsparse.serving.weights.float import FloatWeights
from vllm_rsparse.testing.quantized import LAYOUTS

HIDDEN, HEAD, HEADS, KV_HEADS, INNER = 256, 128, 8, 2, 1024
LINEARS = {
    "qkv_proj": {
        "q_proj": (HEADS * HEAD, HIDDEN),
        "k_proj": (KV_HEADS * HEAD, HIDDEN),
        "v_proj": (KV_HEADS * HEAD, HIDDEN),
    },
    "gate_up_proj": {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN)},
    "o_proj": {"o_proj": (HIDDEN, HEADS * HEAD)},
}
SHARD_IDS = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": (0, 1), "o_proj": (None,)}


def weights_of(quantization, names):
    layout = shared_layout(parse_scheme(quantization, "config.json"), names)
    return checkpoint_weights(layout, names)


@register_weight_loader_v2_supported_method
class _Method(LinearMethodBase):
    """Nothing but ``CheckpointWeights``."""

    def __init__(self, weights):
        self.weights = weights

    def create_weights(self, layer, input_size_per_partition, **sizes):
        self.partition = Partition(
            k=input_size_per_partition,
            shard_sizes=tuple(sizes["output_partition_sizes"]),
            full_k=sizes["input_size"],
            full_n=sizes["output_size"],
            dtype=sizes["params_dtype"],
            weight_loader=sizes["weight_loader"],
        )
        self.weights.create(layer, self.partition)

    def apply(self, layer, x, bias=None):
        raise NotImplementedError


class _Config(QuantizationConfig):
    """Gives every linear the method above."""

    def __init__(self, quantization, names):
        super().__init__()
        self.quantization, self.names = quantization, names

    def get_quant_method(self, layer, prefix):
        return _Method(weights_of(self.quantization, self.names))

    def get_name(self):
        return "test"

    def get_supported_act_dtypes(self):
        return [torch.float32]

    @classmethod
    def get_min_capability(cls):
        return -1

    @staticmethod
    def get_config_filenames():
        return []

    @classmethod
    def from_config(cls, config):
        raise NotImplementedError


def build(kind, quantization, hidden=HIDDEN, head=HEAD):
    """One layer of the decoder by the name of its fused linear."""
    names = [f"model.layers.0.{name}" for name in LINEARS[kind]]
    common = {
        "bias": False,
        "quant_config": _Config(quantization, names),
        "params_dtype": torch.float32,
        "prefix": f"model.layers.0.{kind}",
    }
    if kind == "qkv_proj":
        return vllm_linear.QKVParallelLinear(hidden, head, HEADS, KV_HEADS, **common)
    if kind == "gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(hidden, [INNER] * 2, **common)
    return vllm_linear.RowParallelLinear(
        HEADS * head, hidden, reduce_results=False, **common
    )


def load(layer, kind, tensors):
    """Load every tensor of every linear, as a model's ``load_weights`` does."""
    parameters = dict(layer.named_parameters())
    for shard_id, parts in zip(SHARD_IDS[kind], tensors, strict=True):
        arguments = () if shard_id is None else (shard_id,)
        for suffix, tensor in parts.items():
            parameter = parameters[suffix]
            parameter.weight_loader(parameter, tensor, *arguments)


def quantised(kind, layout):
    """Checkpoint tensors and meant weights of the linears behind a layer."""
    pairs = [LAYOUTS[layout][1](torch.randn(s)) for s in LINEARS[kind].values()]
    return [tensors for tensors, _ in pairs], [meant for _, meant in pairs]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj"])
def test_column_parallel_ranks_hold_their_rows(engine, kind, size, layout):
    tensors, meant = quantised(kind, layout)
    for rank in range(size):
        engine(rank, size)
        layer = build(kind, LAYOUTS[layout][0])
        load(layer, kind, tensors)
        method = layer.quant_method
        stored = method.weights.stored(layer, method.partition)
        expected = []
        for index, weight in enumerate(meant):
            # With more ranks than kv heads, neighbouring ranks hold the same head.
            ranks = min(size, KV_HEADS) if kind == "qkv_proj" and index else size
            expected.append(weight.chunk(ranks)[rank * ranks // size])
        assert torch.equal(stored.dequantise(), torch.cat(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_row_parallel_ranks_hold_their_columns(engine, size, layout):
    tensors, (meant,) = quantised("o_proj", layout)
    for rank in range(size):
        engine(rank, size)
        layer = build("o_proj", LAYOUTS[layout][0])
        load(layer, "o_proj", tensors)
        method = layer.quant_method
        stored = method.weights.stored(layer, method.partition)
        assert torch.equal(stored.dequantise(), meant.chunk(size, 1)[rank])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_stored_weight_replaces_the_checkpoints_parameters(engine, layout):
    engine(0, 1)
    tensors, meant = quantised("gate_up_proj", layout)
    layer = build("gate_up_proj", LAYOUTS[layout][0])
    load(layer, "gate_up_proj", tensors)
    method = layer.quant_method
    stored = method.weights.stored(layer, method.partition)
    replace_parameters(layer, method.weights, stored)
    left = {name for name, _ in layer.named_parameters()}
    assert left <= {"weight", "rsparse_scales", "rsparse_zeros"}
    assert layer.weight.data_ptr() == stored.data.data_ptr()
    assert torch.equal(stored.dequantise(), torch.cat(meant))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_was_not_loaded_is_named(engine, layout):
    engine(0, 1)
    tensors, _ = quantised("gate_up_proj", layout)
    layer = build("gate_up_proj", LAYOUTS[layout][0])
    scale = next(suffix for suffix in tensors[1] if "scale" in suffix[:12])
    del tensors[1][scale]
    load(layer, "gate_up_proj", tensors)
    method = layer.quant_method
    message = rf"gate_proj \+ model.*up_proj: {scale} .* was not loaded"
    with pytest.raises(CheckpointError, match=message):
        method.weights.stored(layer, method.partition)


@pytest.mark.parametrize(
    ("kind", "layout", "options", "size", "message"),
    [
        ("o_proj", "w4a16-g128", {}, 16, r"64 of 1024 input .* splits a group of 128"),
        ("o_proj", "fp8-block", {}, 16, r"64 of 1024 input .* splits a block of 128"),
        ("gate_up_proj", "fp8-block", {}, 16, r"\[64, 64\] output .* block of 128"),
        ("qkv_proj", "awq", {"head": 4}, 2, r"\[16, 4, 4\] output .* multiples of 8"),
        ("qkv_proj", "fp8-block", {"head": 40}, 1, r"\[320, 80, 80\] output .* block"),
    ],
)
def test_parts_that_cannot_be_cut_out_are_refused(
    engine, kind, layout, options, size, message
):
    engine(0, size)
    with pytest.raises(CheckpointError, match=rf"model.layers.0.*{message}.*fewer"):
        build(kind, LAYOUTS[layout][0], **options)


def test_linears_that_the_checkpoint_leaves_plain(engine):
    config = LAYOUTS["fp8-channel"][0] | {"ignore": ["re:.*gate_proj", "re:.*o_proj"]}
    assert isinstance(weights_of(config, ["a.o_proj"]), FloatWeights)
    assert isinstance(checkpoint_weights(None, ["a.o_proj"]), FloatWeights)
    message = r"fuses \(a.gate_proj: not quantized, a.up_proj: Fp8Channel\(\)\)"
    with pytest.raises(CheckpointError, match=message):
        weights_of(config, ["a.gate_proj", "a.up_proj"])
