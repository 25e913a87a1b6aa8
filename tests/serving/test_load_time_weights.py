# SPDX-License-Identifier: Apache-2.0
"""Weights quantized while they load, with tensor-parallel ranks faked.

Layers are vLLM's own and loaded through its own loaders; put together, the ranks must
hold exactly what ``prepare`` calibrated on.
"""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.reload import layerwise

from vllm_rsparse.artifact.tensors import scales_name
from vllm_rsparse.errors import SettingError
from vllm_rsparse.formats.fp8 import FP8_WHILE_LOADING, channel_scales
from vllm_rsparse.testing.cases import one_linear

from .mlp import PREFIX as MLP
from .mlp import Mlp, load, make_config

pytestmark = pytest.mark.usefixtures("layers_without_a_model")

HIDDEN, INNER = 48, 64
build = Mlp(HIDDEN, INNER).build
SHAPES = {
    f"{MLP}.gate_proj": (INNER, HIDDEN, 0, False),
    f"{MLP}.up_proj": (INNER, HIDDEN, 5, False),
    f"{MLP}.down_proj": (HIDDEN, INNER, 2, True),
}


@pytest.fixture
def weights():
    return Mlp(HIDDEN, INNER).random_weights()


@pytest.fixture
def model(tmp_path, write_artifact, weights):
    """A model directory whose artifact was prepared for FP8, and its tensors."""
    scales = {scales_name(n): channel_scales(w) for n, w in weights.items()}
    tensors = write_artifact(tmp_path / "rsparse", SHAPES, more=scales, weights="fp8")
    return tmp_path, tensors


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_ranks_hold_what_was_calibrated(model, weights, engine, kind, size):
    parts = []
    for rank in range(size):
        engine(rank, size)
        layer = build(kind, make_config(model[0]))
        assert layer.weight.is_meta
        load(layer, weights)
        assert layer.weight.dtype is torch.float8_e4m3fn
        parts.append(layer.weight.float() * layer.rsparse_scales[:, None])
    names = layer.quant_method.names
    expected = [FP8_WHILE_LOADING.round_trip(weights[name]) for name in names]
    if kind == "down_proj":
        assert torch.equal(torch.cat(parts, dim=1), expected[0])
        return
    shards = [part.split(layer.quant_method.shard_sizes) for part in parts]
    for index, whole in enumerate(expected):
        assert torch.equal(torch.cat([s[index] for s in shards]), whole)


def test_a_layer_computes_with_the_quantized_weight(model, weights, engine):
    directory, tensors = model
    engine(0, 1)
    layer = build("down_proj", make_config(directory, max_sparse_tokens=4))
    load(layer, weights)
    name = f"{MLP}.down_proj"
    x = torch.randn(3, INNER)
    served = FP8_WHILE_LOADING.round_trip(weights[name])
    expected = one_linear(x, served, tensors[name])
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected)
    # vLLM calls it again when all layers are loaded.
    before = layer.weight
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight is before


def test_a_reload_writes_into_the_tensors_that_graphs_captured(
    model, weights, engine, caplog
):
    engine(0, 1)
    layer = build("gate_up_proj", make_config(model[0]))
    whole = nn.ModuleList([layer])
    layerwise.record_metadata_for_reloading(whole)
    load(layer, weights)
    layerwise.finalize_layerwise_processing(whole, None)
    held = layer.weight, layer.rsparse_scales
    changed = {name: weight.flip(0) * 3 for name, weight in weights.items()}
    layerwise.initialize_layerwise_reload(whole)
    with caplog.at_level(logging.WARNING):
        load(layer, changed)
    layerwise.finalize_layerwise_reload(whole, None)
    assert (layer.weight, layer.rsparse_scales) == held
    mine = layer.weight.float() * layer.rsparse_scales[:, None]
    fused = torch.cat([changed[name] for name in layer.quant_method.names])
    # Larger weights than those prepared get scales of their own.
    assert "have larger weights than the model that was prepared" in caplog.text
    assert (mine - fused).abs().max() < 0.05 * fused.abs().max()


def test_the_artifact_decides_unless_a_setting_does(model, weights, engine, caplog):
    engine(0, 1)
    served = make_config(model[0])
    assert served.served.load_time is FP8_WHILE_LOADING
    with caplog.at_level(logging.WARNING):
        plain = make_config(model[0], weights="as-stored")
    assert "serves them as-stored" in caplog.text
    layer = build("down_proj", plain)
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight, weights[f"{MLP}.down_proj"])


def test_fp8_of_an_artifact_that_was_prepared_without(
    tmp_path, write_artifact, weights, engine, caplog
):
    engine(0, 1)
    write_artifact(tmp_path / "rsparse", SHAPES)
    with caplog.at_level(logging.WARNING):
        config = make_config(tmp_path, weights="fp8")
    assert "calibrated on weights as-stored" in caplog.text
    layer = build("down_proj", config)
    load(layer, weights)
    assert layer.weight.dtype is torch.float8_e4m3fn


def test_separate_dense_steps_are_the_base_models(model, weights, engine):
    engine(0, 1)
    config = make_config(model[0], dense_weights="separate", max_sparse_tokens=1)
    layer = build("down_proj", config)
    load(layer, weights)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, INNER)
    plain = x @ weights[f"{MLP}.down_proj"].T
    torch.testing.assert_close(layer.quant_method.apply(layer, x), plain)
    assert layer.rsparse_weight.dtype is torch.float8_e4m3fn


def test_unknown_weights_are_refused(model):
    with pytest.raises(ValueError, match=r"weights must be one of as-stored, fp8"):
        make_config(model[0], weights="fp4")


def test_a_quantized_checkpoint_cannot_be_quantized_again(tmp_path, write_artifact):
    base = {"format": "int4", "dtype": "float32", "group": 128}
    write_artifact(tmp_path / "rsparse", SHAPES, base=base)
    from vllm_rsparse.testing.quantized import LAYOUTS

    with pytest.raises(SettingError, match=r"weights fp8 are made from float.*int4"):
        make_config(tmp_path, base=LAYOUTS["w4a16-g128"][0], weights="fp8")
