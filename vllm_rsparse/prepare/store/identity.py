# SPDX-License-Identifier: Apache-2.0
"""What the results of a run depend on; results of another identity are not used."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_rsparse import __version__
from vllm_rsparse.artifact.tensors import file_sha256
from vllm_rsparse.model.checkpoint_files import COMPANIONS
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.recipe.files import recipe_json
from vllm_rsparse.prepare.recipe.recipes import Recipe

CONFIGS = ("config.json", "hf_quant_config.json")
# Those whose code computes something or reads the model's files.
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def run_identity(
    recipe: Recipe,
    options: PrepareOptions,
    model: StreamedModel,
    text: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the results depend on, as JSON; the keys are shown to users.

    Weights are identified by name, size and modification time, because reading them
    takes minutes; the smaller files (config, tokenizer, chat template) by content.

    Args:
        recipe: what the user asked for.
        options: of the run.
        model: the base model.
        text: what the calibration text depends on besides, or the text itself.
    """
    checkpoint = model.checkpoint
    return {
        "release of vllm-rsparse": __version__,
        "library versions": {name: version(name) for name in LIBRARIES},
        "weights": [
            [file.name, file.stat().st_size, file.stat().st_mtime_ns]
            for file in checkpoint.weight_files
        ],
        **{
            name: file_sha256(checkpoint.directory / name)
            for name in CONFIGS
            if (checkpoint.directory / name).exists()
        },
        "tokenizer files": {
            file.name: file_sha256(file) for file in _companions(checkpoint.directory)
        },
        **text,
        "recipe": hashlib.sha256(recipe_json(recipe).encode()).hexdigest(),
        "--sparsity": options.sparsity,
        "--bits": options.bits,
        "--max-kl": options.max_kl,
        "--seed": options.seed,
        "--device": model.device.type,
        "--dtype": str(model.dtype),
        "--weights": options.weights,
        "--head": options.head,
        "--head-sparsity": options.head_sparsity,
    }


def _companions(directory: Path) -> list[Path]:
    """Files next to the weights that determine how text becomes tokens."""
    files = {file for pattern in COMPANIONS for file in directory.glob(pattern)}
    unread = ("LICENSE", "NOTICE", "generation_config")
    return sorted(
        file for file in files if file.is_file() and not file.name.startswith(unread)
    )
