# SPDX-License-Identifier: Apache-2.0
"""The output layer quantized and sparse: vLLM's own modules, with faked ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary
from vllm.model_executor.model_loader.reload import layerwise

from vllm_rsparse.errors import ArtifactError, SettingError
from vllm_rsparse.formats.names import HEAD_FORMATS
from vllm_rsparse.formats.registry import load_time_format
from vllm_rsparse.serving import head as head_module

from .mlp import make_config

HIDDEN, WORDS = 96, 75  # padded to 128
SPARSITY = 0.4
THRESHOLDS = torch.linspace(0, 2, HIDDEN)
SHAPES = {"model.layers.0.mlp.down_proj": (HIDDEN, 40, 0, False)}


@pytest.fixture(autouse=True)
def _last_stage(monkeypatch):
    last = SimpleNamespace(is_last_rank=True)
    monkeypatch.setattr(head_module, "get_pp_group", lambda: last)


@pytest.fixture
def config(tmp_path, write_artifact):
    def make(words=WORDS, **options):
        if not (tmp_path / "rsparse").exists():
            entry = {
                "shape": [words, HIDDEN],
                "sparsity": SPARSITY,
                "rho": 1.0,
                "rank": 0,
                "kept_fraction": 1 - SPARSITY,
            }
            more = {"lm_head.thresholds": THRESHOLDS}
            write_artifact(
                tmp_path / "rsparse", SHAPES, head="fp8", sparse_head=entry, more=more
            )
        return make_config(tmp_path, **({"head_sparsity": 0} | options))

    return make


def build(kind, config):
    return kind(WORDS, HIDDEN, torch.float32, quant_config=config, prefix=kind.__name__)


def expected_logits(x, weight, head="as-stored", sparse=True):
    """By the definition, of the whole vocabulary."""
    if (load_time := load_time_format(head)) is not None:
        # As vLLM pads it: planes have words of eight rows.
        padded = torch.cat([weight, torch.zeros(-len(weight) % 8, HIDDEN)])
        weight = load_time.round_trip(padded)[: len(weight)]
    if sparse:
        x = torch.where(x.abs() > THRESHOLDS, x, 0)
    return x @ weight.T


def load(layer, weight):
    parameter = layer.weight
    parameter.weight_loader(parameter, weight)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("head", HEAD_FORMATS)
def test_ranks_give_the_logits_of_the_quantized_layer(engine, config, size, head):
    weight, x = torch.randn(WORDS, HIDDEN), torch.randn(3, HIDDEN)
    parts = []
    for rank in range(size):
        engine(rank, size)
        layer = build(vocabulary.ParallelLMHead, config(head=head))
        load(layer, weight)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.weight.dtype in (torch.float8_e4m3fn, torch.int32)
        parts.append(layer.quant_method.apply(layer, x))
    logits = torch.cat(parts, dim=-1)
    assert logits.shape == (3, 128)
    expected = expected_logits(x, weight, head, sparse=False)
    torch.testing.assert_close(logits[:, :WORDS], expected)
    assert not logits[:, WORDS:].any()


@pytest.mark.parametrize("head", HEAD_FORMATS)
@pytest.mark.parametrize("own_module", [True, False])
def test_tied_logits_are_quantized_and_lookups_are_not(
    engine, config, own_module, head
):
    engine(0, 1)
    made, weight = config(head=head), torch.randn(WORDS, HIDDEN)
    embedding = build(vocabulary.VocabParallelEmbedding, made)
    if own_module:
        module = build(vocabulary.ParallelLMHead, made).tie_weights(embedding)
        assert module is embedding
    load(embedding, weight)
    embedding.quant_method.process_weights_after_loading(embedding)
    tokens = torch.tensor([3, 70])
    assert torch.equal(
        embedding.quant_method.embedding(embedding, tokens), weight[tokens]
    )
    x = torch.randn(2, HIDDEN)
    expected = expected_logits(x, weight, head, sparse=False)
    logits = embedding.quant_method.apply(embedding, x, None)[:, :WORDS]
    torch.testing.assert_close(logits, expected)


def test_an_embedding_next_to_an_output_layer_has_no_copy(engine, config):
    engine(0, 1)
    made = config()
    embedding = build(vocabulary.VocabParallelEmbedding, made)
    build(vocabulary.ParallelLMHead, made)
    load(embedding, torch.randn(WORDS, HIDDEN))
    embedding.quant_method.process_weights_after_loading(embedding)
    assert [name for name, _ in embedding.named_parameters()] == ["weight"]


@pytest.mark.parametrize("head", ["as-stored", *HEAD_FORMATS])
@pytest.mark.parametrize("tied", [True, False])
def test_a_reload_changes_the_logits(engine, config, tied, head):
    engine(0, 1)
    kind = vocabulary.VocabParallelEmbedding if tied else vocabulary.ParallelLMHead
    sparsity = 0 if head == "int8-planes" else SPARSITY
    made = config(head=head, head_sparsity=sparsity, max_sparse_tokens=2)
    layer = build(kind, made)
    whole = nn.ModuleList([layer])
    layerwise.record_metadata_for_reloading(whole)
    load(layer, torch.randn(WORDS, HIDDEN))
    layer.quant_method.process_weights_after_loading(layer)
    held = dict(layer.named_parameters())
    x = torch.randn(2, HIDDEN)
    layer.quant_method.apply(layer, x)
    changed = torch.randn(WORDS, HIDDEN)
    layerwise.initialize_layerwise_reload(whole)
    load(layer, changed)
    layerwise.finalize_layerwise_reload(whole, None)
    assert all(held[name] is tensor for name, tensor in layer.named_parameters())
    logits = layer.quant_method.apply(layer, x)[:, :WORDS]
    expected = expected_logits(x, changed, head, sparse=sparsity > 0)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("head", ["as-stored", "fp8"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_give_the_logits_of_the_sparse_layer(engine, config, size, head):
    weight, parts = torch.randn(WORDS, HIDDEN), {2: [], 3: []}
    inputs = {tokens: torch.randn(tokens, HIDDEN) for tokens in parts}
    for rank in range(size):
        engine(rank, size)
        made = config(head=head, head_sparsity=SPARSITY, max_sparse_tokens=2)
        layer = build(vocabulary.ParallelLMHead, made)
        load(layer, weight)
        layer.quant_method.process_weights_after_loading(layer)
        assert [name for name, _ in layer.named_parameters() if "weight" in name] == [
            "weight"
        ]
        for tokens, x in inputs.items():
            parts[tokens].append(layer.quant_method.apply(layer, x))
    for tokens, x in inputs.items():
        logits = torch.cat(parts[tokens], dim=-1)
        expected = expected_logits(x, weight, head, sparse=tokens == 2)
        torch.testing.assert_close(logits[:, :WORDS], expected)
        assert not logits[:, WORDS:].any()


@pytest.mark.parametrize("kept", ["tied", "separate"])
def test_a_weight_that_stays_serves_dense_steps_as_the_base_does(engine, config, kept):
    engine(0, 1)
    weight, x = torch.randn(WORDS, HIDDEN), torch.randn(4, HIDDEN)
    kind = vocabulary.ParallelLMHead
    base = build(kind, None)
    load(base, weight)
    base.quant_method.process_weights_after_loading(base)
    options = {"head": "as-stored", "head_sparsity": SPARSITY, "max_sparse_tokens": 2}
    if kept == "tied":
        kind = vocabulary.VocabParallelEmbedding
    else:
        options["dense_weights"] = "separate"
    layer = build(kind, config(**options))
    load(layer, weight)
    layer.quant_method.process_weights_after_loading(layer)
    method = layer.quant_method
    assert torch.equal(layer.weight[:WORDS], weight)
    assert torch.equal(method.apply(layer, x), base.quant_method.apply(base, x))
    sparse = method.apply(layer, x[:2])[:, :WORDS]
    torch.testing.assert_close(sparse, expected_logits(x[:2], weight))


def test_head_sparsity_is_the_artifacts_or_none(engine, config):
    engine(0, 1)
    made = config(head="as-stored", head_sparsity=SPARSITY)
    assert made.served.decision.quantization_config(0.5, None)["head_sparsity"] == 0.4
    dense = build(vocabulary.ParallelLMHead, config(head="as-stored", head_sparsity=0))
    assert type(dense.quant_method) is vocabulary.UnquantizedEmbeddingMethod
    with pytest.raises(SettingError, match=r"head_sparsity is 0.3; .* allows 0.4 or 0"):
        config(head_sparsity=0.3)


def test_planes_are_dense_at_every_step(engine, config):
    engine(0, 1)
    made = config(head="int8-planes")
    assert made.served.decision.head_sparsity == 0
    with pytest.raises(SettingError, match=r"int8-planes, which is dense .* \(0.4\)"):
        config(head="int8-planes", head_sparsity=SPARSITY)


def test_planes_that_do_not_fit_are_refused(engine, config):
    engine(0, 1)
    made = config(head="int8-planes")
    layer = vocabulary.ParallelLMHead(
        WORDS, 80, torch.float32, quant_config=made, prefix="lm_head"
    )
    layer.weight.weight_loader(layer.weight, torch.randn(WORDS, 80))
    match = r"head is int8-planes, .* 80 input channels.* use head: as-stored"
    with pytest.raises(ArtifactError, match=match):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_head_of_another_model_is_refused(engine, config):
    engine(0, 1)
    made = config(words=WORDS + 1, head_sparsity=SPARSITY)
    layer = build(vocabulary.ParallelLMHead, made)
    load(layer, torch.randn(WORDS, HIDDEN))
    with pytest.raises(ArtifactError, match=r"lm_head is \[76, 96\].* is \[75, 96\]"):
        layer.quant_method.process_weights_after_loading(layer)


def test_settings_and_the_base_model(engine, config):
    engine(0, 1)
    for options in ({"head": "as-stored"}, {"max_sparse_tokens": 0}):
        layer = build(vocabulary.ParallelLMHead, config(**options))
        method = layer.quant_method
        assert type(method) is vocabulary.UnquantizedEmbeddingMethod
    made = config()
    assert made.served.decision.head == "fp8"
    with pytest.raises(ValueError, match=r"one of as-stored, fp8, int8-planes"):
        config(head="int4")


def test_what_cannot_be_quantized_is_refused(engine, config):
    engine(0, 1)
    made = config()
    head = build(vocabulary.ParallelLMHead, made)
    foreign = build(vocabulary.VocabParallelEmbedding, None)
    with pytest.raises(ArtifactError, match=r"UnquantizedEmbeddingMethod in this"):
        head.tie_weights(foreign)
    with pytest.raises(ArtifactError, match=r"has quantized the output layer itself"):
        head_module.head_method(made.served, made.served.head, head, head.quant_method)


def test_logits_in_another_dtype_are_refused(engine, config, monkeypatch):
    engine(0, 1)
    model = SimpleNamespace(head_dtype=torch.float32, dtype=torch.bfloat16)
    current = SimpleNamespace(model_config=model)
    monkeypatch.setattr(head_module, "get_current_vllm_config", lambda: current)
    with pytest.raises(ArtifactError, match=r"head_dtype is torch.float32"):
        build(vocabulary.ParallelLMHead, config())
