# SPDX-License-Identifier: Apache-2.0
"""A sparse draft model next to a sparse served model: greedy tokens stay the same."""

import pytest

pytest.importorskip("vllm")
from .offline import ALWAYS_SPARSE
from .served import ALWAYS, NEW_TOKENS, PROMPTS, assert_same_tokens

pytestmark = pytest.mark.serve


def test_tokens_with_a_draft_model_equal_plain_pytorch(
    prepared, offline, plain_pytorch
):
    """The model drafts for itself, and verification is sparse too."""
    draft = {"model": str(prepared), "num_speculative_tokens": 3}
    engine = {"model": str(prepared), "max_model_len": 256, "max_num_seqs": 8}
    sampling = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    prompts = PROMPTS[:4]
    found = offline.run(
        ALWAYS_SPARSE, {**engine, "speculative_config": draft}, prompts, sampling
    )
    tokens = [completion["tokens"] for completion in found]
    # Neither model is served dense.
    assert offline.log.read_text().count("linears loaded") == 2
    reference = plain_pytorch(prepared, limit=int(ALWAYS))
    assert_same_tokens(tokens, reference, prompts)
