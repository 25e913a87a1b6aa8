# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: when the log warns, and whose metrics are exported."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_rsparse.serving import speculation


def engine(tokens, *, drafts=False):
    """The config of an engine, or of its draft model."""
    served, draft = SimpleNamespace(model="big"), SimpleNamespace(model="small")
    return SimpleNamespace(
        model_config=draft if drafts else served,
        speculative_config=SimpleNamespace(
            method="draft_model",
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
