# SPDX-License-Identifier: Apache-2.0
"""vLLM's parallel linear layers under the plug-in, with tensor-parallel ranks faked.

Each rank's layer is built with vLLM's own classes, loaded through vLLM's own loaders
from the whole checkpoint tensors, and run; put together, the ranks must give what the
definition gives on the whole layer.
"""

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers import linear as vllm_linear

from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.op import layers
from vllm_rsparse.serving.linear import RSparseLinearMethod
from vllm_rsparse.testing.cases import one_linear

from .mlp import make_config

pytestmark = pytest.mark.usefixtures("layers_without_a_model")

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
HIDDEN, HEAD, HEADS, KV_HEADS, INNER = 48, 8, 8, 2, 40
SHAPES = {
    f"{ATTENTION}.q_proj": (HEADS * HEAD, HIDDEN, 3, False),
    f"{ATTENTION}.k_proj": (KV_HEADS * HEAD, HIDDEN, 2, True),
    f"{ATTENTION}.v_proj": (KV_HEADS * HEAD, HIDDEN, 0, False),
    f"{ATTENTION}.o_proj": (HIDDEN, HEADS * HEAD, 4, True),
    f"{MLP}.gate_proj": (INNER, HIDDEN, 0, False),
    f"{MLP}.up_proj": (INNER, HIDDEN, 5, False),
    f"{MLP}.down_proj": (HIDDEN, INNER, 2, True),
}


@pytest.fixture(params=[1, 2], ids=["version-1", "version-2"])
def model(request, tmp_path, write_artifact):
    """A model directory with an artifact, its tensors and the checkpoint's weights."""
    tensors = write_artifact(tmp_path / "rsparse", SHAPES, version=request.param)
    weights = {n: torch.randn(s[0], s[1]) / s[1] ** 0.5 for n, s in SHAPES.items()}
    return tmp_path, tensors, weights


def build(kind, config, bias=False):
    """One layer of the decoder by the name of its fused linear."""
    common = {"bias": bias, "quant_config": config, "params_dtype": torch.float32}
    if kind == "qkv_proj":
        return vllm_linear.QKVParallelLinear(
            HIDDEN, HEAD, HEADS, KV_HEADS, prefix=f"{ATTENTION}.{kind}", **common
        )
    if kind == "gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(
            HIDDEN, [INNER, INNER], prefix=f"{MLP}.{kind}", **common
        )
    size = (HEADS * HEAD, ATTENTION) if kind == "o_proj" else (INNER, MLP)
    return vllm_linear.RowParallelLinear(
        size[0], HIDDEN, prefix=f"{size[1]}.{kind}", reduce_results=False, **common
    )


def load(layer, kind, weights):
    shard_ids = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1]}.get(kind, [None])
    for name, shard_id in zip(layer.quant_method.names, shard_ids, strict=True):
        arguments = () if shard_id is None else (shard_id,)
        layer.weight.weight_loader(layer.weight, weights[name], *arguments)
    layer.quant_method.process_weights_after_loading(layer)


def expected_output(x, names, tensors, weights):
    """The definition on the whole, unsharded linears, one output per linear."""
    return [one_linear(x, weights[name], tensors[name]) for name in names]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["qkv_proj", "gate_up_proj"])
def test_column_parallel_ranks_give_the_whole(model, engine, kind, size):
    directory, tensors, weights = model
    x = torch.randn(3, HIDDEN)
    parts = []
    for rank in range(size):
        engine(rank, size)
        layer = build(kind, make_config(directory, max_sparse_tokens=4))
        load(layer, kind, weights)
        out = layer.quant_method.apply(layer, x)
        parts.append(out.split(layer.quant_method.shard_sizes, dim=-1))
    expected = expected_output(x, layer.quant_method.names, tensors, weights)
    for shard, whole in enumerate(expected):
        # With more ranks than kv heads, neighbouring ranks hold the same head.
        replicas = max(1, sum(p[shard].shape[1] for p in parts) // whole.shape[1])
        joined = torch.cat([p[shard] for p in parts[::replicas]], dim=-1)
        torch.testing.assert_close(joined, whole)
        for index, part in enumerate(parts):
            assert torch.equal(part[shard], parts[index // replicas * replicas][shard])


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["o_proj", "down_proj"])
def test_row_parallel_ranks_add_up_to_the_whole(model, engine, kind, size):
    directory, tensors, weights = model
    total = torch.zeros(3, HIDDEN)
    for rank in range(size):
        engine(rank, size)
        layer = build(kind, make_config(directory, max_sparse_tokens=4))
        load(layer, kind, weights)
        if rank == 0:
            x = torch.randn(3, layer.input_size)
        mine = x.chunk(size, dim=-1)[rank]
        total += layer.quant_method.apply(layer, mine)
    (expected,) = expected_output(x, layer.quant_method.names, tensors, weights)
    torch.testing.assert_close(total, expected)


def test_bias_is_added_once_on_both_routes(model, engine):
    directory, tensors, weights = model
    engine(0, 1)
    layer = build("qkv_proj", make_config(directory, max_sparse_tokens=2), bias=True)
    load(layer, "qkv_proj", weights)
    bias = torch.randn(layer.bias.shape)
    names = layer.quant_method.names
    x = torch.randn(2, HIDDEN)
    sparse = torch.cat(expected_output(x, names, tensors, weights), dim=-1) + bias
    torch.testing.assert_close(layer.quant_method.apply(layer, x, bias), sparse)
    x = torch.randn(3, HIDDEN)
    dense = x @ torch.cat([weights[name] for name in names]).T + bias
    torch.testing.assert_close(layer.quant_method.apply(layer, x, bias), dense)


def test_one_weight_copy_in_row_per_channel_storage(model, engine):
    directory, _, weights = model
    engine(0, 1)
    layer = build("o_proj", make_config(directory))
    load(layer, "o_proj", weights)
    assert layer.weight.shape == weights[f"{ATTENTION}.o_proj"].shape
    assert layer.weight.t().is_contiguous()
    assert torch.equal(layer.weight, weights[f"{ATTENTION}.o_proj"])
    large = [p for p in layer.parameters() if p.numel() >= layer.weight.numel()]
    assert large == [layer.weight]


def test_reloaded_weights_keep_the_layers_number(model, engine):
    """Observers know a layer by it; the operands of before must not serve again."""
    directory, tensors, weights = model
    engine(0, 1)
    layer = build("o_proj", make_config(directory, max_sparse_tokens=4))
    load(layer, "o_proj", weights)
    x = torch.randn(2, layer.input_size)
    layer.quant_method.apply(layer, x)
    number = layers.layer_of(layer.rsparse_thresholds)
    name = f"{ATTENTION}.o_proj"
    layer.weight = torch.nn.Parameter(2 * weights[name], requires_grad=False)
    layer.quant_method.process_weights_after_loading(layer)
    assert layers.layer_of(layer.rsparse_thresholds) == number
    assert number == layer.quant_method.layer_number
    expected = one_linear(x, 2 * weights[name], tensors[name])
    torch.testing.assert_close(layer.quant_method.apply(layer, x), expected)


def test_input_of_any_leading_shape(model, engine):
    directory, _, weights = model
    engine(0, 1)
    layer = build("down_proj", make_config(directory, max_sparse_tokens=6))
    load(layer, "down_proj", weights)
    x = torch.randn(2, 3, INNER)
    flat = layer.quant_method.apply(layer, x.view(6, INNER))
    assert torch.equal(layer.quant_method.apply(layer, x), flat.view(2, 3, HIDDEN))


def test_max_sparse_tokens_zero_is_the_base_models_own_method(model, engine):
    engine(0, 1)
    layer = build("o_proj", make_config(model[0], max_sparse_tokens=0))
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)
    assert not isinstance(layer.quant_method, RSparseLinearMethod)


def test_linear_outside_the_artifact_stays_dense(model, engine):
    engine(0, 1)
    config = make_config(model[0])
    layer = vllm_linear.ReplicatedLinear(
        8, 8, quant_config=config, prefix="model.layers.0.mlp.router"
    )
    assert isinstance(layer.quant_method, vllm_linear.UnquantizedLinearMethod)


def test_shape_of_another_model_is_refused(model, engine):
    engine(0, 1)
    with pytest.raises(ArtifactError, match=r"down_proj is \[48, 40\].*\[48, 80\]"):
        vllm_linear.RowParallelLinear(
            80, HIDDEN, quant_config=make_config(model[0]), prefix=f"{MLP}.down_proj"
        )
