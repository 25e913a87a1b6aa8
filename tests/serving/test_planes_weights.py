# SPDX-License-Identifier: Apache-2.0
"""Weights in two planes, made while they load, with tensor-parallel ranks faked."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import (
    get_current_vllm_config,
)
from vllm.model_executor.model_loader.reload import layerwise

from vllm_rsparse.errors import RSparseError
from vllm_rsparse.formats.checkpoints.parse import parse_scheme
from vllm_rsparse.formats.int8_planes import INT8_PLANES, PLANES_WHILE_LOADING
from vllm_rsparse.op import layers
from vllm_rsparse.testing.quantized import INT8_LAYOUTS, LAYOUTS

from . import mlp
from .mlp import PREFIX as MLP
from .mlp import Mlp, load

pytestmark = pytest.mark.usefixtures("layers_without_a_model")

HIDDEN, INNER = 192, 256
build = Mlp(HIDDEN, INNER).build
make_config = partial(mlp.make_config, backend="cpu")
# N, K, rank of the factors, constant.
SHAPES = {
    f"{MLP}.gate_proj": (INNER, HIDDEN, 0, False),
    f"{MLP}.up_proj": (INNER, HIDDEN, 0, True),
    f"{MLP}.down_proj": (HIDDEN, INNER, 0, False),
}


@pytest.fixture
def weights():
    return Mlp(HIDDEN, INNER).random_weights()


@pytest.fixture
def model(tmp_path, write_artifact):
    """A directory whose artifact has two thresholds a channel, and its tensors."""
    return tmp_path, write_artifact(
        tmp_path / "rsparse", SHAPES, planes=2, weights=INT8_PLANES.name
    )


def expected(x, name, weights, tensors):
    """The formula, written out."""
    stored = PLANES_WHILE_LOADING.encode(weights[name])
    first, second = stored.format.dequantise_planes(stored)
    low, high = (x * (x.abs() > row) for row in tensors[name]["thresholds"])
    y = low @ first.T + high @ second.T
    return y + tensors[name].get("correction", 0)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_together_compute_the_formula(model, weights, engine, size):
    directory, tensors = model
    x = torch.randn(3, HIDDEN)
    outputs, sums, inner = [], 0, torch.randn(3, INNER)
    for rank in range(size):
        engine(rank, size)
        config = make_config(directory, max_sparse_tokens=4)
        up = build("gate_up_proj", config, weights)
        assert up.weight.shape == (2, HIDDEN, 2 * INNER // size // 8)
        down = build("down_proj", config, weights)
        outputs.append(up.quant_method.apply(up, x).chunk(2, dim=1))
        part = inner.chunk(size, dim=1)[rank]
        sums = sums + down.quant_method.apply(down, part)
    for index, kind in enumerate(("gate_proj", "up_proj")):
        found = torch.cat([output[index] for output in outputs], dim=1)
        right = expected(x, f"{MLP}.{kind}", weights, tensors)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    right = expected(inner, f"{MLP}.down_proj", weights, tensors)
    torch.testing.assert_close(sums, right, rtol=1e-4, atol=1e-4)


def test_a_step_that_is_dense_reads_both_planes(model, weights, engine):
    engine(0, 1)
    layer = build("down_proj", make_config(model[0], max_sparse_tokens=1), weights)
    x = torch.randn(2, INNER)
    whole = PLANES_WHILE_LOADING.round_trip(weights[f"{MLP}.down_proj"])
    torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ whole.T)


@pytest.mark.parametrize("layout", ["fp8-channel", "fp8-block"])
def test_fp8_checkpoints_become_planes(
    tmp_path, write_artifact, engine, layout, monkeypatch
):
    engine(0, 1)
    # vLLM's own method, which is not used, asks for the activations' dtype.
    activations = SimpleNamespace(dtype=torch.float32)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", activations)
    base, quantise = LAYOUTS[layout]
    form = {"format": layout.replace("-channel", ""), "dtype": "bfloat16"}
    tensors = write_artifact(
        tmp_path / "rsparse", SHAPES, planes=2, weights=INT8_PLANES.name, base=form
    )
    layer = build("down_proj", make_config(tmp_path, base=base, max_sparse_tokens=4))
    name = f"{MLP}.down_proj"
    parts, meant = quantise(torch.randn(HIDDEN, INNER) / 16)
    parameters = dict(layer.named_parameters())
    for suffix, tensor in parts.items():
        parameters[suffix].weight_loader(parameters[suffix], tensor)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(1, INNER)
    # What ``prepare`` reads: dequantised to the dtype that the artifact names.
    right = expected(x, name, {name: meant.bfloat16()}, tensors)
    torch.testing.assert_close(layer.quant_method.apply(layer, x), right)


@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("layout", INT8_LAYOUTS)
def test_int8_checkpoints_are_split_on_every_rank(
    tmp_path, write_artifact, engine, layout, kind, monkeypatch
):
    activations = SimpleNamespace(dtype=torch.float32)
    monkeypatch.setattr(get_current_vllm_config(), "model_config", activations)
    base, quantise = INT8_LAYOUTS[layout]
    group = 128 if layout.endswith("g128") else 0
    form = {"format": "int8", "dtype": "bfloat16", "group": group}
    # 128 must divide all input channels for the groups.
    shapes = {n: (s[0], 256, s[2], s[3]) for n, s in SHAPES.items()}
    write_artifact(
        tmp_path / "rsparse", shapes, planes=2, weights=INT8_PLANES.name, base=form
    )
    made = {name: quantise(torch.randn(s[:2]) / 16) for name, s in shapes.items()}
    mlp_of_256 = Mlp(256 if kind == "gate_up_proj" else HIDDEN, INNER)
    parsed = parse_scheme(base, "config.json").layout(f"{MLP}.down_proj")
    for size in (1, 2):
        parts = []
        for rank in range(size):
            engine(rank, size)
            config = make_config(tmp_path, base=base, max_sparse_tokens=4)
            layer = mlp_of_256.build(kind, config)
            parameters = dict(layer.named_parameters())
            names = layer.quant_method.names
            for index, name in enumerate(names):
                arguments = (index,) if len(names) > 1 else ()
                for suffix, tensor in made[name][0].items():
                    parameter = parameters[suffix]
                    parameter.weight_loader(parameter, tensor, *arguments)
            layer.quant_method.process_weights_after_loading(layer)
            parts.append(layer.weight)
        dims = layer.quant_method.shard_sizes
        shards = [list(p.split([d // 8 for d in dims], dim=2)) for p in parts]
        for index, name in enumerate(names):
            stored = parsed.store({s: made[name][0][s] for s in parsed.required})
            whole = PLANES_WHILE_LOADING.requantise(stored, torch.bfloat16)
            together = torch.cat([s[index] for s in shards], 1 + (len(names) > 1))
            assert torch.equal(together, whole.data)


def test_ranks_that_would_split_a_group_are_refused(model, weights, engine):
    engine(0, 4)
    message = r"down_proj: .*hold 64 of 256 .*fewer tensor-parallel ranks"
    with pytest.raises(RSparseError, match=message):
        build("down_proj", make_config(model[0]), weights)


def test_a_reload_writes_into_the_same_tensors(model, weights, engine):
    engine(0, 1)
    layer = build("gate_up_proj", make_config(model[0], max_sparse_tokens=4))
    whole = nn.ModuleList([layer])
    layerwise.record_metadata_for_reloading(whole)
    load(layer, weights)
    layerwise.finalize_layerwise_processing(whole, None)
    held = layer.weight, layer.rsparse_scales, layer.rsparse_zeros
    changed = {name: weight.flip(0) * 3 for name, weight in weights.items()}
    layerwise.initialize_layerwise_reload(whole)
    load(layer, changed)
    layerwise.finalize_layerwise_reload(whole, None)
    assert (layer.weight, layer.rsparse_scales, layer.rsparse_zeros) == held
    assert layers.layer_of(layer.rsparse_thresholds) is not None
    x = torch.randn(1, HIDDEN)
    found = layer.quant_method.apply(layer, x).chunk(2, dim=1)
    for index, kind in enumerate(("gate_proj", "up_proj")):
        right = expected(x, f"{MLP}.{kind}", changed, model[1])
        torch.testing.assert_close(found[index], right, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("other", ["as-stored", "fp8"])
def test_thresholds_for_planes_serve_no_other_weights(model, engine, other):
    with pytest.raises(RSparseError, match=f"is {other}, but .*read in planes"):
        make_config(model[0], weights=other)


def test_thresholds_for_whole_weights_do_not_serve_planes(
    tmp_path, write_artifact, engine
):
    write_artifact(tmp_path / "rsparse", SHAPES)
    with pytest.raises(RSparseError, match="prepare the model with --weights int8"):
        make_config(tmp_path, weights="int8-planes")
