# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints: what is not sparse is vLLM's own, bit for bit.

vLLM builds and loads a small model of each format twice, with rsparse and without.
"""

import gc
import json
import logging
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import transformers
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.utils import (
    initialize_model,
    process_weights_after_loading,
)
from vllm.model_executor.model_loader.weight_utils import (
    safetensors_weights_iterator,
)

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.op import backends
from vllm_rsparse.plugin import register
from vllm_rsparse.serving.base import BaseQuantization
from vllm_rsparse.serving.config import RSparseConfig
from vllm_rsparse.serving.dense import BaseLayer
from vllm_rsparse.serving.linear import RSparseLinearMethod
from vllm_rsparse.testing.quantized import LAYOUTS, write_quantized

# Formats that vLLM's CPU backend runs without AMX.
ON_CPU = ("w4a16-g128", "w4a16-asym-g32", "awq", "gptq", "fp8-channel")
HIDDEN, INNER, LAYERS = 256, 384, 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random Llama in bfloat16."""
    directory = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=ON_CPU)
def quantized(request, plain, tmp_path_factory):
    """A quantized copy of the model."""
    directory = tmp_path_factory.mktemp("quantized") / request.param
    write_quantized(plain, directory, request.param)
    return directory


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, write_artifact, quantized):
    """Lists the linears of the MLPs alone."""
    directory = tmp_path_factory.mktemp("artifact")
    linear = "model.layers.0.mlp.up_proj"
    name, group = Checkpoint(quantized).linear_format(linear)
    shapes = {
        "gate_proj": (INNER, HIDDEN, 0, False),
        "up_proj": (INNER, HIDDEN, 2, True),
        "down_proj": (HIDDEN, INNER, 0, False),
    }
    write_artifact(
        directory,
        {
            f"model.layers.{layer}.mlp.{kind}": shape
            for layer in range(LAYERS)
            for kind, shape in shapes.items()
        },
        dtype=torch.bfloat16,
        base={"format": name, "dtype": "bfloat16", "group": group},
    )
    return directory


@pytest.fixture
def build(monkeypatch):
    """Call with what ``vllm serve`` is told: the model, built and loaded."""

    def make(directory, **options):
        model_config = ModelConfig(str(directory), skip_tokenizer_init=True, **options)
        group = SimpleNamespace(rank_in_group=0, world_size=1, is_last_rank=True)
        group.is_first_rank = True
        for name in ("_TP", "_PP", "_WORLD", "_DCP", "_PCP"):
            monkeypatch.setattr(parallel_state, name, group, raising=False)
        config = VllmConfig(model_config=model_config)
        with set_current_vllm_config(config), torch.no_grad():
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = initialize_model(vllm_config=config)
                files = [str(directory / "model.safetensors")]
                model.load_weights(safetensors_weights_iterator(files, False))
                process_weights_after_loading(model, model_config, torch.device("cpu"))
            finally:
                torch.set_default_dtype(torch.float32)
        return model

    register()
    yield make
    # vLLM's handlers cannot be freed while the next model is traced.
    gc.collect()


def prepared(directory, target, artifact, **settings):
    """A directory as ``prepare`` writes it: ours, with the checkpoint's own as base."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "rsparse",
        "artifact": str(artifact),
        "base": config["quantization_config"],
        **settings,
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def methods(model):
    return {
        name: type(module.quant_method)
        for name, module in model.named_modules()
        if getattr(module, "quant_method", None) is not None
    }


def require_same(model, base):
    """Require the same methods, tensors and outputs of the linears of two models."""
    assert methods(model) == methods(base)
    mine, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    linears = {n: m for n, m in base.named_modules() if isinstance(m, LinearBase)}
    assert len(linears) == 4 * LAYERS
    for name, module in linears.items():
        x = torch.randn(3, module.input_size, dtype=torch.bfloat16)
        assert torch.equal(model.get_submodule(name)(x)[0], module(x)[0]), name


def test_prepared_directory_served_dense_is_the_base(
    quantized, artifact, tmp_path, build
):
    ours = prepared(quantized, tmp_path / "ours", artifact, max_sparse_tokens=0)
    require_same(build(ours), build(quantized))


def test_checkpoint_with_the_artifact_named_is_the_base_if_dense(
    quantized, artifact, build
):
    settings = {"artifact": str(artifact), "max_sparse_tokens": 0}
    ours = build(quantized, quantization="rsparse", hf_overrides={"rsparse": settings})
    require_same(ours, build(quantized))


def test_linears_of_the_artifact_alone_are_sparse(quantized, artifact, build):
    settings = {"artifact": str(artifact), "max_sparse_tokens": 2}
    settings["backend"] = "reference"
    ours = build(quantized, quantization="rsparse", hf_overrides={"rsparse": settings})
    model = build(quantized)
    base = methods(model)
    for name, method in methods(ours).items():
        expected = RSparseLinearMethod if ".mlp." in name else base[name]
        assert method is expected, name
    for name, module in ours.named_modules():
        if not isinstance(getattr(module, "quant_method", None), RSparseLinearMethod):
            continue
        # Three tokens go dense. vLLM rounds activations to FP8, or sums in bfloat16.
        x = torch.randn(3, module.input_size, dtype=torch.bfloat16)
        mine, theirs = module(x)[0].float(), model.get_submodule(name)(x)[0].float()
        tolerance = 0.05 if "fp8" in quantized.name else 0.01
        assert (mine - theirs).norm() < tolerance * theirs.norm(), name


def test_a_backend_that_cannot_read_the_weights_fails_at_start(
    quantized, artifact, build, monkeypatch
):
    one = backends.BACKENDS[backends.Backend.REFERENCE]
    only_float = replace(one, routes={"float": one.routes["float"]})
    table = {**backends.BACKENDS, backends.Backend.REFERENCE: only_float}
    monkeypatch.setattr(backends, "BACKENDS", table)
    settings = {"artifact": str(artifact), "backend": "reference"}
    with pytest.raises(backends.BackendError, match="reference cannot read weights of"):
        build(quantized, quantization="rsparse", hf_overrides={"rsparse": settings})


def test_separate_dense_weights_are_the_bases_own_layers(
    quantized, artifact, build, caplog
):
    """Dense steps are the base model's, bit for bit; sparse ones are not."""
    caplog.set_level(logging.INFO)
    settings = {"artifact": str(artifact), "max_sparse_tokens": 2}
    settings |= {"backend": "reference", "dense_weights": "separate"}
    ours = build(quantized, quantization="rsparse", hf_overrides={"rsparse": settings})
    base = build(quantized)
    sparse = 0
    for name, module in base.named_modules():
        if not isinstance(module, LinearBase):
            continue
        mine = ours.get_submodule(name)
        x = torch.randn(3, module.input_size, dtype=torch.bfloat16)
        expected = module(x)[0]
        assert torch.equal(mine(x)[0], expected), name
        if isinstance(mine.quant_method, RSparseLinearMethod):
            sparse += 1
            one_token = mine(x[:1])[0]
            assert not torch.equal(one_token, expected[:1]), name
    assert sparse == 2 * LAYERS
    assert "MiB of the base model's own layers (dense_weights: separate)" in caplog.text


def test_a_copy_that_is_no_parameter_counts_as_well():
    """On a CPU vLLM packs a weight for oneDNN and empties its parameter."""

    class Packs:
        def process_weights_after_loading(self, layer):
            layer.weight = torch.nn.Parameter(torch.empty(0))

    layer = torch.nn.Linear(4, 8, bias=False)
    layer.register_buffer("rsparse_thresholds", torch.zeros(4))
    assert BaseLayer(Packs(), ["down_proj"]).process(layer) == 4 * 8 * 4


def test_what_is_written_is_read_again_and_sent_to_workers(quantized, artifact):
    own = json.loads((quantized / "config.json").read_text())["quantization_config"]
    config = RSparseConfig.from_config(own)
    hf_config = SimpleNamespace(rsparse={"artifact": str(artifact)})
    config.maybe_update_config(str(quantized), hf_config)
    again = RSparseConfig.from_config(hf_config.quantization_config)
    assert again.settings.artifact == str(artifact)
    assert again.base.dictionary == config.base.dictionary == own
    assert type(again.base.config) is type(config.base.config)
    arrived = pickle.loads(pickle.dumps(config))
    assert arrived.base.dictionary == own
    assert arrived.served.route == config.served.route


@pytest.mark.parametrize("layout", LAYOUTS)
def test_facts_that_vllm_reads_off_a_config_are_the_bases(layout):
    own = LAYOUTS[layout][0]
    config, base = RSparseConfig.from_config(own), BaseQuantization(own, "x").config
    assert set(config.get_supported_act_dtypes()) <= set(
        base.get_supported_act_dtypes()
    )
    assert config.get_min_capability() >= base.get_min_capability()
    assert config._ignore_unexpected_suffixes == base._ignore_unexpected_suffixes
    for name in ("weight_block_size", "kv_cache_scheme", "group_size", "no_such_fact"):
        assert hasattr(config, name) == hasattr(base, name)
        assert getattr(config, name, None) == getattr(base, name, None)
    names = ["a.k_proj.kv_scale", "a.qweight", "a.g_idx", "a.k_proj.output_scale"]
    for mapper in ("get_cache_scale_mapper", "get_checkpoint_weight_mapper"):
        mine, theirs = getattr(config, mapper)(), getattr(base, mapper)()
        assert mine.apply_list(names) == theirs.apply_list(names)


def test_a_plain_base_has_no_facts_of_a_quantized_one():
    """vLLM asks by ``hasattr`` whether weights come in blocks."""
    config = RSparseConfig.from_config({"artifact": "rsparse"})
    assert not hasattr(config, "weight_block_size")
    assert config.get_supported_act_dtypes()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"config\.json: .*bitsandbytes"),
        ({"quant_method": "modelopt_fp4"}, "NVFP4"),
        ({"quant_method": "gptq", "bits": 3}, "config.json"),
    ],
)
def test_a_quantization_that_is_not_supported_is_named(own, message):
    for config in (own, {"quant_method": "rsparse", "artifact": "a", "base": own}):
        with pytest.raises(CheckpointError, match=message):
            RSparseConfig.from_config(config)
