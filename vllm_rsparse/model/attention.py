# SPDX-License-Identifier: Apache-2.0
"""Which of transformers' attention functions computes what the engine computes."""

from typing import Any


def attention_implementation(config: Any) -> str | None:
    """Name for transformers' ``attn_implementation``, None for its own choice.

    Gemma 2 caps the logits of its attention. vLLM does this, transformers' fused
    attention does not, so calibration would see other activations than decoding: on a
    small random Gemma 2, log probabilities differed by up to 0.08.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else None
