# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: when the log warns, and whose metrics are exported."""

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_rsparse.errors import ArtifactError
from vllm_rsparse.serving import served, speculation
from vllm_rsparse.serving.decision import ArtifactSource


def engine(tokens, *, drafts=False, method="draft_model"):
    """The config of an engine, or of its draft model."""
    served, draft = SimpleNamespace(model="big"), SimpleNamespace(model="small")
    return SimpleNamespace(
        model_config=draft if drafts else served,
        speculative_config=SimpleNamespace(
            method=method,
            num_speculative_tokens=tokens,
            draft_model_config=draft,
        ),
    )


def route(limit):
    return SimpleNamespace(policy=SimpleNamespace(max_sparse_tokens=limit))


@pytest.mark.parametrize(
    ("limit", "config", "warns"),
    [
        (2, engine(3), True),
        (3, engine(3), True),
        (4, engine(3), False),
        (0, engine(3), False),  # dense by choice
        (2, engine(3, drafts=True), False),
        (2, SimpleNamespace(speculative_config=None), False),
    ],
)
def test_warns_that_verification_is_dense(limit, config, warns, caplog):
    with caplog.at_level(logging.WARNING, speculation.logger.name):
        speculation.log_verification(route(limit), config)
    assert ("verifies 4 tokens" in caplog.text) is warns


@pytest.mark.parametrize(
    ("method", "advice"),
    [("ngram", "cudagraph_mode is PIECEWISE"), ("mtp", "leave the drafter out")],
)
def test_the_warning_advises_by_method(method, advice, caplog):
    with caplog.at_level(logging.WARNING, speculation.logger.name):
        speculation.log_verification(route(2), engine(3, method=method))
    assert advice in caplog.text


def test_a_draft_model_is_known_while_its_engine_is_current(monkeypatch):
    def current(config):
        monkeypatch.setattr(
            speculation, "get_current_vllm_config_or_none", lambda: config
        )

    current(None)  # the served model is resolved before there is an engine
    assert not speculation.draft_is_resolved("small")
    current(engine(3))
    assert speculation.draft_is_resolved("small")
    assert not speculation.draft_is_resolved("big")
    current(SimpleNamespace(speculative_config=None))
    assert not speculation.draft_is_resolved("small")


@pytest.mark.parametrize(
    ("config", "dense"),
    [
        (engine(3, drafts=True, method="mtp"), True),
        (engine(3, method="mtp"), False),
        (engine(3, drafts=True), False),
        (SimpleNamespace(speculative_config=None), False),
    ],
)
def test_the_layers_of_an_mtp_drafter_are_dense(
    config, dense, write_prepared, monkeypatch
):
    """vLLM gives them the served model's quantization config, and numbers them on."""
    names = SimpleNamespace(architectures=["LlamaForCausalLM"])
    if config.speculative_config is None:
        config.model_config = SimpleNamespace(model="big")
    config.model_config.hf_config = config.model_config.hf_text_config = names
    model = write_prepared("model", lambda name, n, k: {"thresholds": torch.rand(k)})
    source = ArtifactSource(str(model), "rsparse")
    route = SimpleNamespace(policy=SimpleNamespace(max_sparse_tokens=2))
    decision = SimpleNamespace(source=source, route=route)
    monkeypatch.setattr(served, "get_current_vllm_config", lambda: config)
    built = served.ServedModel(decision, source.open())
    if not dense:
        with pytest.raises(
            ArtifactError, match=r"layers\.4\.self_attn\.q_proj is miss"
        ):
            built.claim("model.layers.4.self_attn.qkv_proj")
        return
    assert built.claim("model.layers.4.self_attn.qkv_proj") is None
    assert built.claim("model.layers.0.self_attn.qkv_proj") is None
    built.check_coverage()  # none of its linears is missed
