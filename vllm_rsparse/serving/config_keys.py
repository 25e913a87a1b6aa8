# SPDX-License-Identifier: Apache-2.0
"""Allowed keys of ``quantization_config``, in config.json or ``--hf-overrides``."""

from typing import Any

from vllm_rsparse.artifact.schema import FORMAT_VERSION

KEYS = (
    "quant_method",
    "format_version",
    "artifact",
    "artifact_sha256",
    "sparsity",
    "max_sparse_tokens",
    "backend",
    "base",
)
HOW_TO = (
    "Serve a directory written by `vllm-rsparse prepare MODEL OUTPUT --sparsity S"
    " --calibration-data FILE...`, or point a checkpoint at an artifact with"
    ' --quantization rsparse --hf-overrides \'{"rsparse": {"artifact":'
    ' "/absolute/path"}}\''
)


def check_keys(config: dict[str, Any], where: str = "quantization_config") -> None:
    """Refuse what ``RSparseConfig`` could not be built from.

    Args:
        config: the dictionary.
        where: what users call it.

    Raises:
        ValueError: unknown key, wrong type or value, unsupported format version.
    """
    for key in config:
        if key not in KEYS:
            raise ValueError(
                f"{where}: unknown key {key!r}; rsparse knows {', '.join(KEYS)}"
            )
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version is {version!r}, this release reads"
            f" {FORMAT_VERSION}; prepare the model again, or install the release"
            " of vllm-rsparse that wrote it"
        )
    for key in ("artifact", "artifact_sha256", "backend"):
        value = config.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise ValueError(f"{where}: {key} must be a string, got {value!r}")
    limit = config.get("max_sparse_tokens")
    if limit is not None and (
        not isinstance(limit, int) or isinstance(limit, bool) or limit < 0
    ):
        raise ValueError(
            f"{where}: max_sparse_tokens must be an integer >= 0 (0 serves dense),"
            f" got {limit!r}"
        )
    base = config.get("base")
    if base is not None and not (
        isinstance(base, dict) and isinstance(base.get("quant_method"), str)
    ):
        raise ValueError(
            f"{where}: base must be the quantization_config of the base checkpoint,"
            f" with its quant_method, got {base!r}"
        )
