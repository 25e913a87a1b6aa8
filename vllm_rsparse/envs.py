# SPDX-License-Identifier: Apache-2.0
"""Environment variables, all of them, with their defaults.

They are read once, where the model's config is built, and travel to every worker inside
it, so that all ranks route alike whatever their own environment says.
"""

import os
from collections.abc import Callable
from typing import Any

BACKEND = "VLLM_RSPARSE_BACKEND"
MAX_SPARSE_TOKENS = "VLLM_RSPARSE_MAX_SPARSE_TOKENS"


def backend() -> str:
    """``auto`` (default), ``triton``, ``cpu`` or ``reference``."""
    return os.environ.get(BACKEND, "").strip().lower() or "auto"


def max_sparse_tokens() -> int | None:
    """Largest number of tokens in a call that takes the sparse route; 0 serves dense.

    None (default) leaves the choice to the model's config, then to the measured default
    of the device.

    Raises:
        ValueError: not an integer, or negative.
    """
    raw = os.environ.get(MAX_SPARSE_TOKENS, "").strip()
    if not raw:
        return None
    try:
        value = int(raw)
    except ValueError:
        value = -1
    if value < 0:
        raise ValueError(
            f"{MAX_SPARSE_TOKENS} must be an integer >= 0 (0 serves dense), got {raw!r}"
        )
    return value


# vLLM warns about variables with its prefix that it does not know.
VLLM_ENVIRONMENT: dict[str, Callable[[], Any]] = {
    BACKEND: backend,
    MAX_SPARSE_TOKENS: max_sparse_tokens,
}
