# SPDX-License-Identifier: Apache-2.0
"""RSparseConfig: every way in, what it refuses, and what reaches the compile cache."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.models.utils import WeightsMapper

from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.op.backends import Backend
from vllm_rsparse.plugin import register
from vllm_rsparse.serving import served as served_module
from vllm_rsparse.serving.config import RSparseConfig
from vllm_rsparse.serving.route import DenseWeights, Policy, Route

KINDS = ["q_proj", "k_proj", "v_proj"]


def names(layers):
    return [f"model.layers.{i}.self_attn.{kind}" for i in layers for kind in KINDS]


@pytest.fixture
def model_dir(tmp_path, write_artifact):
    write_artifact(
        tmp_path / "rsparse", dict.fromkeys(names([0, 1]), (8, 16, 1, False))
    )
    return tmp_path


def make(model_dir, **options):
    config = RSparseConfig.from_config(
        {"quant_method": "rsparse", "artifact": "rsparse", **options}
    )
    config.maybe_update_config(str(model_dir))
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("surprise", 1, "unknown key 'surprise'"),
        ("format_version", 3, "format_version is 3.* reads 1 and 2"),
        ("artifact", 3, "artifact must be a string"),
        ("artifact", "", "artifact must be a string"),
        ("artifact_sha256", 3, "artifact_sha256 must be a string"),
        ("max_sparse_tokens", -1, "max_sparse_tokens must be an integer >= 0"),
        (
            "max_sparse_tokens",
            10**30,
            "max_sparse_tokens must be .* 2147483647",
        ),
        ("max_sparse_tokens", True, "max_sparse_tokens must be an integer >= 0"),
        ("max_sparse_tokens", "4", "max_sparse_tokens must be an integer >= 0"),
    ],
)
def test_bad_config_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        RSparseConfig.from_config({"quant_method": "rsparse", key: value})


def test_plain_checkpoint_without_artifact_gets_directions(tmp_path):
    with pytest.raises(ArtifactError, match=r"names no artifact.*--hf-overrides"):
        RSparseConfig().maybe_update_config(str(tmp_path))


def test_artifact_of_another_weight_format_is_refused(tmp_path, write_artifact):
    base = {"format": "int4", "dtype": "bfloat16", "group": 128}
    linears = dict.fromkeys(names([0]), (8, 16, 1, False))
    write_artifact(tmp_path / "rsparse", linears, base=base)
    with pytest.raises(
        ArtifactError, match=r"int4 \(groups of 128\), but .*has float;"
    ):
        make(tmp_path)
    write_artifact(tmp_path / "rsparse", linears)
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    with pytest.raises(ArtifactError, match=r"in float, but .*has fp8; prepare"):
        make(tmp_path, base=quantized)


def test_route_and_digest_enter_the_hashed_config(model_dir):
    config = RSparseConfig.from_config({"artifact": "rsparse", "max_sparse_tokens": 3})
    hf_config = SimpleNamespace()
    config.maybe_update_config(str(model_dir), hf_config)
    written = hf_config.quantization_config
    assert written["artifact_sha256"] == config.served.artifact.sha256
    assert written["max_sparse_tokens"] == 3
    assert written["backend"] == "cpu"
    # vLLM may build the config again from what we wrote.
    assert RSparseConfig.from_config(written).settings.max_sparse_tokens == 3


def test_environment_overrides_config(model_dir, monkeypatch):
    monkeypatch.setenv("VLLM_RSPARSE_MAX_SPARSE_TOKENS", "7")
    monkeypatch.setenv("VLLM_RSPARSE_BACKEND", "reference")
    config = make(model_dir, max_sparse_tokens=3, backend="cpu")
    assert config.served.route == Route(
        Backend.REFERENCE,
        Policy(7),
        DenseWeights.SHARED,
        "VLLM_RSPARSE_BACKEND",
        "VLLM_RSPARSE_MAX_SPARSE_TOKENS",
    )


def test_unknown_backend_is_named_by_the_parameter_that_was_set(model_dir, monkeypatch):
    with pytest.raises(ValueError, match=r"^quantization_config\.backend is 'fast'"):
        make(model_dir, backend="fast")
    monkeypatch.setenv("VLLM_RSPARSE_BACKEND", "quick")
    with pytest.raises(ValueError, match=r"^VLLM_RSPARSE_BACKEND is 'quick'"):
        make(model_dir, backend="fast")


def test_the_key_rsparse_overrides_one_setting(model_dir):
    hf_config = SimpleNamespace(rsparse={"max_sparse_tokens": 5})
    written = {"artifact": "rsparse", "max_sparse_tokens": 3, "backend": "reference"}
    config = RSparseConfig.from_config(written)
    config.maybe_update_config(str(model_dir), hf_config)
    assert config.served.route == Route(
        Backend.REFERENCE,
        Policy(5),
        DenseWeights.SHARED,
        "quantization_config.backend",
        "rsparse.max_sparse_tokens",
    )
    assert hf_config.quantization_config["max_sparse_tokens"] == 5


def test_another_artifact_does_not_need_the_digest_of_the_first(
    model_dir, tmp_path, write_artifact
):
    other = tmp_path / "other"
    write_artifact(other, dict.fromkeys(names([0]), (8, 16, 1, False)))
    hf_config = SimpleNamespace(rsparse={"artifact": str(other)})
    config = RSparseConfig.from_config(
        {"artifact": "rsparse", "artifact_sha256": "0" * 64}
    )
    config.maybe_update_config(str(model_dir), hf_config)
    assert config.served.artifact.directory == other
    hf_config.rsparse["artifact"] = "missing"
    with pytest.raises(ArtifactError, match=r"correct rsparse\.artifact"):
        config.maybe_update_config(str(model_dir), hf_config)


def test_vllm_refuses_a_dictionary_that_lost_its_method(pyllama, tmp_path):
    """Through vLLM itself, which would otherwise serve the prepared model dense."""
    register()
    config = json.loads((pyllama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rsparse", "artifact": "rsparse"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    overrides = {"quantization_config": {"max_sparse_tokens": 4}}
    with pytest.raises(ValueError, match="replaces the whole dictionary"):
        ModelConfig(str(tmp_path), skip_tokenizer_init=True, hf_overrides=overrides)
    one = {"rsparse": {"max_sparse_tokens": 4}}
    model = ModelConfig(str(tmp_path), skip_tokenizer_init=True, hf_overrides=one)
    assert model.quantization == "rsparse"
    # What alters the traced graph must alter the key of vLLM's compile cache.
    assert (
        model.compute_hash()
        != ModelConfig(str(tmp_path), skip_tokenizer_init=True).compute_hash()
    )


@pytest.mark.parametrize("value", ["-1", "many", "1.5"])
def test_bad_environment_is_named(model_dir, monkeypatch, value):
    monkeypatch.setenv("VLLM_RSPARSE_MAX_SPARSE_TOKENS", value)
    with pytest.raises(ValueError, match="VLLM_RSPARSE_MAX_SPARSE_TOKENS must be"):
        make(model_dir)


def test_worker_gets_the_decision_and_opens_its_own_artifact(model_dir, monkeypatch):
    config = make(model_dir, max_sparse_tokens=3)
    monkeypatch.setenv("VLLM_RSPARSE_MAX_SPARSE_TOKENS", "9")
    worker = pickle.loads(pickle.dumps(config))
    assert worker.served.route.policy == Policy(3)
    path = model_dir / "rsparse" / "rsparse.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="sha256"):
        worker.served.artifact  # noqa: B018


def test_wrong_digest_is_refused_before_anything_is_built(model_dir):
    with pytest.raises(ArtifactError, match="artifact_sha256"):
        make(model_dir, artifact_sha256="0" * 64)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """The vLLM config under which layers are built: of a GPT-2 of two layers."""
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["GPT2LMHeadModel"]),
            hf_text_config=SimpleNamespace(num_hidden_layers=2),
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
    )
    monkeypatch.setattr(
        served_module, "get_current_vllm_config", lambda: copy.copy(engine)
    )
    return engine


class FakeLinear(LinearBase):
    def __init__(self):
        torch.nn.Module.__init__(self)


def test_missing_shard_of_a_fused_layer(tmp_path, write_artifact):
    listed = {n: (8, 16, 1, False) for n in names([0]) if "k_proj" not in n}
    write_artifact(tmp_path / "rsparse", listed)
    config = make(tmp_path)
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.k_proj is missing"):
        config.get_quant_method(FakeLinear(), "model.layers.0.self_attn.qkv_proj")


def test_missing_decoder_layer(model_dir):
    config = make(model_dir)
    with pytest.raises(ArtifactError, match=r"layers\.2\.self_attn\.q_proj is missing"):
        config.get_quant_method(FakeLinear(), "model.layers.2.self_attn.qkv_proj")


def test_other_modules_are_left_alone(model_dir):
    config = make(model_dir)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed") is None


QKV = "model.layers.0.self_attn.qkv_proj"


def test_linear_that_the_model_lacks(model_dir, engine):
    engine.model_config.hf_text_config.num_hidden_layers = 1
    config = make(model_dir, max_sparse_tokens=1)
    config.get_quant_method(FakeLinear(), QKV)
    with pytest.raises(ArtifactError, match=r"lists model\.layers\.1\.self_attn\.q_pr"):
        config.served.check_coverage()


def test_pipeline_stage_claims_its_own_layers(model_dir, engine):
    engine.parallel_config.pipeline_parallel_size = 2
    config = make(model_dir, max_sparse_tokens=1)
    config.get_quant_method(FakeLinear(), QKV)
    config.served.check_coverage()


def test_pipeline_does_not_hide_a_layer_beyond_the_model(model_dir, engine):
    engine.model_config.hf_text_config.num_hidden_layers = 1
    engine.parallel_config.pipeline_parallel_size = 2
    config = make(model_dir, max_sparse_tokens=1)
    config.get_quant_method(FakeLinear(), QKV)
    with pytest.raises(ArtifactError, match=r"lists model\.layers\.1\."):
        config.served.check_coverage()


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("limit", [0, 1])
def test_model_of_which_nothing_is_listed(model_dir, engine, stages, limit):
    engine.parallel_config.pipeline_parallel_size = stages
    config = make(model_dir, max_sparse_tokens=limit)
    method = config.get_quant_method(FakeLinear(), "transformer.h.0.attn.c_attn")
    with pytest.raises(ArtifactError, match=r"none of its 6 linears.*GPT2.*c_attn"):
        method.process_weights_after_loading(FakeLinear())


def test_draft_model_is_claimed_and_judged_by_its_own_config(model_dir, engine):
    config = make(model_dir, max_sparse_tokens=1)
    for layer in range(2):
        prefix = f"draft_model.model.layers.{layer}.self_attn.qkv_proj"
        method = config.get_quant_method(FakeLinear(), prefix)
        assert method.names == names([layer])
    engine.model_config = None  # the served model's comes back after the building
    config.served.check_coverage()


def test_modules_that_the_model_moves_are_followed(model_dir):
    config = make(model_dir, max_sparse_tokens=1)
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    config.apply_vllm_mapper(mapper)
    method = config.get_quant_method(FakeLinear(), f"language_model.{QKV}")
    assert method.names == names([0])


def test_unresolved_config_is_refused(model_dir):
    with pytest.raises(ValueError, match="maybe_update_config"):
        RSparseConfig().get_quant_method(FakeLinear(), names([0])[0])
