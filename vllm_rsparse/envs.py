# SPDX-License-Identifier: Apache-2.0
"""Environment variables, all of them, with their defaults.

Those that decide the route are read once, where the model's config is built, and sent
to every worker with it, so that all ranks use the same route whatever their own
environment says.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_rsparse.errors import SettingError

BACKEND = "VLLM_RSPARSE_BACKEND"
MAX_SPARSE_TOKENS = "VLLM_RSPARSE_MAX_SPARSE_TOKENS"
DENSE_WEIGHTS = "VLLM_RSPARSE_DENSE_WEIGHTS"
METRICS_INTERVAL = "VLLM_RSPARSE_METRICS_INTERVAL"
TUNING_DIR = "VLLM_RSPARSE_TUNING_DIR"

# Counts become integers of the op, and a larger one would end a worker instead.
MAX_COUNT = 2**31 - 1


def backend() -> str:
    """``auto`` (default), ``triton``, ``cpu``, ``cpu-torch`` or ``reference``."""
    return os.environ.get(BACKEND, "").strip().lower() or "auto"


def max_sparse_tokens() -> int | None:
    """Largest number of tokens in a call that takes the sparse route; 0 serves dense.

    None (default) leaves the choice to the model's config, then to the measured default
    of the device.

    Raises:
        SettingError: not an integer, or negative.
    """
    return _count(MAX_SPARSE_TOKENS, "0 serves dense")


def dense_weights() -> str | None:
    """``shared`` or ``separate``, see ``serving.route.DenseWeights``.

    None (default, also ``auto``) leaves the choice to the model's config, then to the
    default, ``shared``.
    """
    value = os.environ.get(DENSE_WEIGHTS, "").strip().lower()
    return None if value in ("", "auto") else value


def metrics_interval() -> int:
    """One sparse step out of this many is sampled (250); 0 turns metrics off.

    Raises:
        SettingError: not an integer, or negative.
    """
    interval = _count(METRICS_INTERVAL, "0 turns metrics off")
    return 250 if interval is None else interval


def tuning_directory() -> Path | None:
    """Folder with tables of launch configurations that precede the shipped ones.

    Every process reads its own. None (default) is ``tuning`` in ``cache_directory``.
    """
    value = os.environ.get(TUNING_DIR, "").strip()
    return Path(value) if value else None


def cache_directory() -> Path:
    """The user's folder for what this machine keeps: compiled kernels, tables."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vllm_rsparse"


def _count(name: str, zero: str) -> int | None:
    raw = os.environ.get(name, "").strip()
    if not raw:
        return None
    try:
        value = int(raw)
    except ValueError:
        value = -1
    if not 0 <= value <= MAX_COUNT:
        raise SettingError(
            f"{name} must be an integer >= 0 ({zero}), at most {MAX_COUNT}, got {raw!r}"
        )
    return value


# vLLM warns about variables with its prefix that it does not know.
VLLM_ENVIRONMENT: dict[str, Callable[[], Any]] = {
    BACKEND: backend,
    MAX_SPARSE_TOKENS: max_sparse_tokens,
    DENSE_WEIGHTS: dense_weights,
    METRICS_INTERVAL: metrics_interval,
    TUNING_DIR: tuning_directory,
}
