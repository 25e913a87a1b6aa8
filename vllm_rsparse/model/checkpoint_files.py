# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: where the directory is, and what belongs to a model."""

import os
from pathlib import Path

from vllm_rsparse.errors import CheckpointError
from vllm_rsparse.model.links import refuse_broken_links
from vllm_rsparse.validation import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DOWNLOAD_AGAIN = "; download it again"
# Files that a served model needs besides the weights. Formats that vLLM would prefer to
# the linked weights (params.json with consolidated.safetensors, *.bin, *.gguf) are not
# included.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "tekken*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
HUB_PATTERNS = (
    "config.json",
    "hf_quant_config.json",
    "*.safetensors",
    INDEX_NAME,
    *COMPANIONS,
)


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Directory of a local model, or of a Hub model after downloading it.

    Only config, tokenizer and safetensors files are downloaded.

    Raises:
        CheckpointError: neither a directory nor a model available on the Hub, or a
            revision of a local directory.
    """
    if not model:
        raise CheckpointError(
            "MODEL is empty; give a model's directory or its name on the Hub"
        )
    path = Path(model).expanduser()
    refuse_broken_links(path, "download the model again", HUB_PATTERNS)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision}: MODEL {model} is a local directory, which has"
                " no revisions; leave --revision out, or name a model on the Hub"
            )
        return path
    if path.exists():
        raise CheckpointError(f"MODEL {model}: is a file; pass the model's directory")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"MODEL {model}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(HUB_PATTERNS),
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    # The Hub's errors derive from both: unknown or gated names, no network, bad names.
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"MODEL {model}: not a local directory, and not available from the"
            f" Hugging Face Hub ({error}); check the name, the network and"
            " `hf auth login`"
        ) from error


def find_weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index lists.

    Raises:
        CheckpointError: there is neither, or the index lists what is not there.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        single = directory / SINGLE_NAME
        if single.exists():
            return [single]
        others = sorted(
            path.name
            for path in directory.iterdir()
            if path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        )
        raise CheckpointError(
            f"{directory}: neither {SINGLE_NAME} nor {INDEX_NAME} found"
            + (f" (there is {', '.join(others[:5])})" if others else "")
            + "; convert the model with transformers'"
            " save_pretrained(safe_serialization=True)"
        )
    weight_map = read_json(index, CheckpointError, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: `weight_map` is missing or empty{DOWNLOAD_AGAIN}"
        )
    files = []
    for name in sorted(set(map(str, weight_map.values()))):
        if os.path.basename(name) != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
        if not (directory / name).exists():
            raise CheckpointError(
                f"{index}: lists {name}, which is missing{DOWNLOAD_AGAIN}"
            )
        files.append(directory / name)
    return files
