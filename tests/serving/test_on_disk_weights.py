# SPDX-License-Identifier: Apache-2.0
"""Weights as ``prepare --copy-weights`` wrote them, with tensor-parallel ranks faked.

A rank must hold, bit for bit, what it would have made while loading the base.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear as vllm_linear

from vllm_rsparse.artifact.tensors import scales_name
from vllm_rsparse.errors import ArtifactError, RSparseError
from vllm_rsparse.formats.checkpoints.on_disk import on_disk_layout
from vllm_rsparse.formats.fp8 import channel_scales
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.serving.config import RSparseConfig

from . import mlp

pytestmark = pytest.mark.usefixtures("layers_without_a_model")

HIDDEN, INNER = 192, 256
HEADS, KV_HEADS, HEAD = 4, 2, 48
LAYER = "model.layers.0"
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (HEADS * HEAD, HIDDEN, 0, False),
    f"{LAYER}.self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN, 0, False),
    f"{LAYER}.self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN, 0, False),
    f"{LAYER}.mlp.gate_proj": (INNER, HIDDEN, 0, False),
    f"{LAYER}.mlp.up_proj": (INNER, HIDDEN, 0, True),
    f"{LAYER}.mlp.down_proj": (HIDDEN, INNER, 0, False),
}
FORMATS = ("int8-planes", "fp8")


@pytest.fixture
def weights():
    return {n: torch.randn(s[0], s[1]) / s[1] ** 0.5 for n, s in SHAPES.items()}


@pytest.fixture
def make_config(tmp_path, write_artifact, weights):
    """Call with a format and settings: a resolved config of a directory in it."""

    def make(form, **settings):
        scales = {scales_name(n): channel_scales(w) for n, w in weights.items()}
        if not (tmp_path / "rsparse").exists():
            write_artifact(
                tmp_path / "rsparse",
                SHAPES,
                planes=2 if form == "int8-planes" else 1,
                more={} if form == "int8-planes" else scales,
                weights=form,
            )
        keys = {"backend": "cpu", "max_sparse_tokens": 4}
        return mlp.make_config(tmp_path, **(keys | settings))

    return make


def build(kind, config):
    common = {
        "bias": False,
        "quant_config": config,
        "params_dtype": torch.float32,
    }
    if kind == "qkv_proj":
        return vllm_linear.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, prefix=f"{LAYER}.self_attn.{kind}", **common
        )
    common["prefix"] = f"{LAYER}.mlp.{kind}"
    if kind == "gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(HIDDEN, [INNER] * 2, **common)
    return vllm_linear.RowParallelLinear(INNER, HIDDEN, reduce_results=False, **common)


def load(layer, tensors, fused=False):
    """As vLLM's loaders do: by shard, or one tensor of all of them."""
    names = layer.quant_method.names
    shards = {3: "qkv", 2: (0, 1), 1: (None,)}[len(names)]
    if fused:
        last = {s: t.shape for s, t in tensors[names[0]].items()}
        dim = dict.fromkeys(last, -1 if "weight_planes" in last else 0)
        whole = {s: torch.cat([tensors[n][s] for n in names], dim=dim[s]) for s in last}
        tensors, names, shards = {"": whole}, [""], (None,)
    for name, shard in zip(names, shards, strict=True):
        for suffix, tensor in tensors[name].items():
            parameter = getattr(layer, suffix)
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, tensor, *arguments)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj", "down_proj"])
@pytest.mark.parametrize("form", FORMATS)
def test_ranks_hold_what_loading_would_make(
    make_config, weights, engine, form, kind, size
):
    load_time, layout = load_time_format(form), on_disk_layout(form)
    tensors = {n: layout.tensors(load_time.encode(w)) for n, w in weights.items()}
    for rank in range(size):
        engine(rank, size)
        while_loading = build(kind, make_config(form))
        plain = {n: {"weight": w} for n, w in weights.items()}
        load(while_loading, plain)
        for fused in (False, True):
            layer = build(kind, make_config(form, weights_on_disk=form))
            load(layer, tensors, fused)
            layer.quant_method.process_weights_after_loading(layer)
            for name in ("weight", "rsparse_scales", "rsparse_zeros"):
                mine, other = (getattr(one, name) for one in (layer, while_loading))
                assert (mine is None) == (other is None)
                assert mine is None or torch.equal(mine, other)
                assert mine is None or mine.stride() == other.stride()
            x = torch.randn(2, layer.input_size_per_partition)
            outputs = [one.quant_method.apply(one, x) for one in (layer, while_loading)]
            assert torch.equal(*outputs)


@pytest.mark.parametrize("form", FORMATS)
def test_dense_steps_read_the_same_weights(make_config, weights, engine, form):
    """The base's own layers could not: its weights are not there."""
    engine(0, 1)
    config = make_config(form, weights_on_disk=form, max_sparse_tokens=0)
    layer = build("down_proj", config)
    name = f"{LAYER}.mlp.down_proj"
    load_time = load_time_format(form)
    stored = load_time.encode(weights[name])
    load(layer, {name: on_disk_layout(form).tensors(stored)})
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(1, INNER)
    expected = x @ stored.dequantise().T
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected)


def test_a_tensor_that_was_not_loaded_is_named(make_config, weights, engine):
    engine(0, 1)
    layer = build("down_proj", make_config("fp8", weights_on_disk="fp8"))
    with pytest.raises(RSparseError, match=r"mlp.down_proj: weight_scale .*not loaded"):
        layer.quant_method.process_weights_after_loading(layer)


def test_ranks_that_would_split_a_group_are_refused(make_config, engine):
    engine(0, 4)
    message = r"down_proj: .*hold 64 of 256 .*fewer tensor-parallel ranks"
    config = make_config("int8-planes", weights_on_disk="int8-planes")
    with pytest.raises(RSparseError, match=message):
        build("down_proj", config)


def test_what_needs_the_base_is_refused(make_config, engine, monkeypatch):
    with pytest.raises(RSparseError, match=r"weights is as-stored, but .* in fp8 and"):
        make_config("fp8", weights_on_disk="fp8", weights="as-stored")
    with pytest.raises(RSparseError, match=r"dense_weights is 'separate', but .* fp8"):
        make_config("fp8", weights_on_disk="fp8", dense_weights="separate")
    monkeypatch.setenv("VLLM_RSPARSE_DENSE_WEIGHTS", "separate")
    with pytest.raises(RSparseError, match="VLLM_RSPARSE_DENSE_WEIGHTS is 'separate'"):
        make_config("fp8", weights_on_disk="fp8")


def test_users_do_not_set_what_is_on_disk(make_config, tmp_path):
    make_config("fp8")

    overrides = SimpleNamespace(rsparse={"weights_on_disk": "fp8"})
    config = RSparseConfig.from_config({"artifact": "rsparse"})
    with pytest.raises(ArtifactError, match="weights_on_disk is not a setting"):
        config.maybe_update_config(str(tmp_path), overrides)
