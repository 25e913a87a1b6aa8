# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding with a sparse model: its drafter, and what to say of it."""

import logging

from vllm.config import VllmConfig, get_current_vllm_config_or_none

from vllm_rsparse.serving.route import Route

logger = logging.getLogger(__name__)

# Methods that propose nothing where they find no repetition; all others draft at every
# step.
_LOOKUPS = ("ngram", "ngram_gpu", "suffix")


def draft_is_resolved(model: str) -> bool:
    """Whether vLLM resolves the config of a draft model now, not the served model's.

    vLLM does so in the engine's process while the engine's config is the current one;
    the served model's is resolved before there is one.

    Args:
        model: what is resolved.
    """
    engine = get_current_vllm_config_or_none()
    speculative = None if engine is None else engine.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return draft is not None and draft.model == model


def is_mtp_drafter(engine: VllmConfig) -> bool:
    """Whether what is built are the MTP layers of the served model's checkpoint.

    They are a model of their own to vLLM, with the served model's quantization config,
    but no linear of them is in the artifact: all are dense.

    Args:
        engine: the config of the model that is built.
    """
    speculative = engine.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if speculative is None or draft is None or draft is not engine.model_config:
        return False
    return speculative.method == "mtp"


def log_verification(route: Route, engine: VllmConfig) -> None:
    """Say at start if drafts make the steps too large for the sparse route.

    Args:
        route: of the model that is built.
        engine: whose model it is: the served model or a draft model.
    """
    speculative = engine.speculative_config
    tokens = getattr(speculative, "num_speculative_tokens", None)
    if speculative is None or not tokens:
        return
    if engine.model_config is getattr(speculative, "draft_model_config", None):
        return  # it drafts one token at a time
    limit = route.policy.max_sparse_tokens
    if not 0 < limit < tokens + 1:
        return
    advice = "For sparse decoding leave the drafter out"
    if speculative.method in _LOOKUPS:
        advice = (
            "If vLLM captures no CUDA graph of one token, it pads such steps, and they"
            " are dense too unless cudagraph_mode is PIECEWISE"
        )
    logger.warning(
        "rsparse: speculative decoding (%s) verifies %d tokens of a request per step,"
        " more than max_sparse_tokens = %d: these steps are dense, and only steps"
        " without drafts are sparse. %s; for sparse verification set max_sparse_tokens"
        " to %d or more",
        speculative.method,
        tokens + 1,
        limit,
        advice,
        tokens + 1,
    )
