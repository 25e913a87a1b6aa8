# SPDX-License-Identifier: Apache-2.0
"""Models that hold NaN or infinity, or whose activations do: one line, nothing left."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_rsparse.errors import NotFiniteError
from vllm_rsparse.prepare.pipeline import prepare

from .runs import short


def damaged(pyllama: Path, directory: Path, tensor: str, factor: float) -> Path:
    """A copy of the reference model with one element of a tensor changed."""
    shutil.copytree(pyllama, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    place = (0,) * tensors[tensor].dim()
    tensors[tensor][place] = factor
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("recipe", "tensor", "value"),
    [
        ("best", "model.layers.2.mlp.down_proj.weight", math.nan),
        ("best", "model.embed_tokens.weight", math.inf),  # the head too: it is tied
        ("best", "model.norm.weight", -math.inf),
        ("greedy", "model.layers.3.self_attn.k_proj.weight", math.inf),
        ("wina", "model.layers.1.input_layernorm.weight", math.nan),
        ("evolutionary", "model.layers.0.mlp.up_proj.weight", math.nan),
    ],
)
def test_weights(
    pyllama: Path, tmp_path: Path, recipe: str, tensor: str, value: float
) -> None:
    model = damaged(pyllama, tmp_path / "model", tensor, value)
    with pytest.raises(
        NotFiniteError, match=rf"/model: {tensor} contains {value} at \["
    ):
        prepare(short(model, tmp_path / "out", recipe=recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("best", "the output of decoder layer 1: NaN or infinity"),
        ("greedy", "the input of model.layers.1.mlp.down_proj: NaN or infinity"),
        ("wina", "the input of model.layers.1.mlp.down_proj: NaN or infinity"),
        ("evolutionary", "the input of model.layers.1.mlp.down_proj: NaN"),
    ],
)
def test_activations_beyond_float16(
    pyllama: Path, tmp_path: Path, recipe: str, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pyllama, model)
    path = model / "model.safetensors"
    tensors = load_file(path)
    # Finite in float16, but not what it makes of its inputs.
    tensors["model.layers.1.mlp.up_proj.weight"].mul_(10000.0)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        NotFiniteError, match=rf"{message}.*--dtype bfloat16 or float32"
    ):
        prepare(short(model, tmp_path / "out", recipe=recipe, dtype="float16"))
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert torch.isfinite(tensors["model.layers.1.mlp.up_proj.weight"].half()).all()
