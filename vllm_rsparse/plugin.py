# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (group ``vllm.general_plugins``)."""

import logging


def register() -> None:
    """Register the quantization method ``rsparse``; safe to call more than once.

    vLLM is imported inside: an error while an entry point is *loaded* is only logged by
    vLLM and the user would read "Unknown quantization method", an error raised here
    reaches them.
    """
    import vllm.envs
    from vllm.model_executor.layers.quantization import (
        register_quantization_config,
    )

    from vllm_rsparse import envs
    from vllm_rsparse.serving.config import RSparseConfig

    register_quantization_config("rsparse")(RSparseConfig)
    vllm.envs.environment_variables.update(envs.VLLM_ENVIRONMENT)
    # Only the "vllm" logger gets handlers, and releases differ in when. As its child,
    # ours uses them whenever they come; otherwise our INFO lines would vanish.
    logging.getLogger("vllm_rsparse").parent = logging.getLogger("vllm")
