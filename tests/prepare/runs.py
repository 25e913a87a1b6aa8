# SPDX-License-Identifier: Apache-2.0
"""One way to prepare a model for a test: few tokens of one file, on the CPU."""

import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vllm_rsparse.artifact.schema import ArtifactInfo
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare

TEXT = Path(sysconfig.get_path("stdlib")) / "argparse.py"


def options(model: Path, output: Path, **changes: Any) -> PrepareOptions:
    """Uniform thresholds at 50% with factors, unless ``changes`` say otherwise."""
    settings: dict[str, Any] = {
        "model": str(model),
        "output": output,
        "sparsity": 0.5,
        "calibration_data": (TEXT,),
        "recipe": "uniform",
        "rho": 0.95,
        "samples": 2,
        "tokens": 128,
        "device": "cpu",
        "seed": 7,
    }
    return PrepareOptions(**(settings | changes))


# Two windows of 40 tokens by a recipe's own rho: for equality, which any size shows.
short = partial(options, tokens=40, rho=None, seed=0)


def run(model: Path, output: Path, **changes: Any) -> ArtifactInfo:
    """Prepare with ``options``."""
    return prepare(options(model, output, **changes))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Of the artifact in a prepared directory."""
    return load_file(directory / "rsparse" / "rsparse.safetensors")


def contents(directory: Path) -> dict[str, bytes]:
    """Files of the artifact in a prepared directory."""
    return {path.name: path.read_bytes() for path in (directory / "rsparse").iterdir()}
