# SPDX-License-Identifier: Apache-2.0
"""A sparse draft model next to a sparse served model: greedy tokens stay the same."""

import json

import pytest

pytest.importorskip("vllm")
from .served import ALWAYS, PROMPTS, assert_same_tokens, complete

pytestmark = pytest.mark.serve


def test_tokens_with_a_draft_model_equal_plain_pytorch(prepared, serve, plain_pytorch):
    """The model drafts for itself, and verification is sparse too."""
    options = json.dumps({"model": str(prepared), "num_speculative_tokens": 3})
    speculative = ("--speculative-config", options)
    prompts = PROMPTS[:4]
    with serve(prepared, *speculative, VLLM_RSPARSE_MAX_SPARSE_TOKENS=ALWAYS) as server:
        tokens = [complete(server, prompt)[0] for prompt in prompts]
        log = server.log_path.read_text()
    # Neither model is served dense.
    assert log.count("linears loaded") == 2
    reference = plain_pytorch(prepared, limit=int(ALWAYS))
    assert_same_tokens(tokens, reference, prompts)
