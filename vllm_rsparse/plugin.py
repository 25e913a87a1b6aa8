# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (group ``vllm.general_plugins``)."""

import logging
from typing import Any

METHOD = "rsparse"


def register() -> None:
    """Register the quantization method ``rsparse``; safe to call more than once.

    Everything is imported inside. vLLM only logs an error while an entry point is
    *loaded*, and the user would read "Unknown quantization method"; an error raised
    here ends every vLLM command, also those that serve other models. If our modules
    cannot be imported, a stand-in is registered that refuses rsparse models with the
    reason and does not affect other models.

    Raises:
        ImportError: this vLLM has no registry of quantization methods.
    """
    try:
        from vllm.model_executor.layers.quantization import (
            register_quantization_config,
        )
    except ImportError as error:
        raise ImportError(_reason(error)) from error
    try:
        import vllm.envs

        from vllm_rsparse import envs
        from vllm_rsparse.serving.config import RSparseConfig

        vllm.envs.environment_variables.update(envs.VLLM_ENVIRONMENT)
        config: type = RSparseConfig
    except Exception as error:
        config = _stand_in(error)
    register_quantization_config(METHOD)(config)
    # Only the "vllm" logger gets handlers, at a time that depends on the release. Ours
    # uses them as its child once they exist; otherwise our INFO lines would be lost.
    logging.getLogger("vllm_rsparse").parent = logging.getLogger("vllm")


def _stand_in(error: Exception) -> type:
    """A config for ``rsparse`` that refuses whatever model it is asked to serve.

    Its attribute ``failure`` is the reason, for ``doctor``.
    """
    from vllm.model_executor.layers.quantization.base_config import (
        QuantizationConfig,
    )

    from vllm_rsparse.errors import RSparseError

    reason = _reason(error)

    class Unavailable(QuantizationConfig):
        failure = reason

        def __new__(cls, *args: Any, **kwargs: Any) -> "Unavailable":
            raise RSparseError(reason) from error

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Unavailable":
            return cls()

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **_: Any
        ) -> None:
            # vLLM asks this for every quantized model, whoever quantized it.
            if METHOD in (user_quant, hf_quant_cfg.get("quant_method")):
                cls()

    return Unavailable


def _reason(error: Exception) -> str:
    """What failed, under which versions, and what to do."""
    from vllm_rsparse import __version__
    from vllm_rsparse.releases import installed, supported_vllm, supports_vllm

    release = installed("vllm")
    if release is None or supports_vllm(release):
        remedy = "reinstall it in this environment, and see `vllm-rsparse doctor`"
    else:
        remedy = (
            f"it supports vLLM {supported_vllm()}: install one of these, or another"
            " release of vllm-rsparse"
        )
    return (
        f"vllm-rsparse {__version__} cannot be loaded with vLLM {release}"
        f" ({type(error).__name__}: {error}); {remedy}. To serve other models without"
        " it, uninstall it or leave it out of VLLM_PLUGINS"
    )
