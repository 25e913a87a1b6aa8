# SPDX-License-Identifier: Apache-2.0
"""What makes the results of an earlier run useless."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_rsparse.model.checkpoint import Checkpoint
from vllm_rsparse.model.streaming import StreamedModel
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.recipe.recipes import RECIPES, Recipe
from vllm_rsparse.prepare.store import identity
from vllm_rsparse.prepare.store.identity import run_identity
from vllm_rsparse.prepare.text import GivenText
from vllm_rsparse.texts.windows import CalibrationText

WINDOWS = torch.arange(8).reshape(2, 4)
Identify = Callable[..., dict[str, Any]]


@pytest.fixture
def model(pyllama: Path, tmp_path: Path) -> Path:
    """A copy of the reference model that a test may edit."""
    return Path(shutil.copytree(pyllama, tmp_path / "model"))


@pytest.fixture
def identify(model: Path) -> Identify:
    def identify(
        recipe: Recipe = RECIPES["best"],
        windows: Tensor = WINDOWS,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> dict[str, Any]:
        options = PrepareOptions(str(model), Path("out"), 0.5, (Path("text"),))
        streamed = StreamedModel(Checkpoint(model), torch.device("cpu"), dtype)
        text = GivenText(CalibrationText(windows, {})).identity
        return run_identity(recipe, replace(options, **changes), streamed, text)

    return identify


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in one | other if one.get(key) != other.get(key)}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sparsity": 0.4}, "--sparsity"),
        ({"seed": 1}, "--seed"),
        ({"dtype": torch.bfloat16}, "--dtype"),
        ({"windows": WINDOWS + 1}, "calibration windows"),
        ({"recipe": replace(RECIPES["best"], correction="never")}, "recipe"),
        # What is written, and what the windows were drawn from, do not count.
        ({"overwrite": True, "samples": 3, "output": Path("other")}, None),
    ],
    ids=str,
)
def test_settings(identify: Identify, changes: dict[str, Any], key: str | None) -> None:
    assert differing(identify(), identify(**changes)) == ({key} if key else set())


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "config.json"),
        ("tokenizer.json", "tokenizer files"),
        ("tokenizer_config.json", "tokenizer files"),
        ("chat_template.jinja", "tokenizer files"),
        ("merges.txt", "tokenizer files"),
        ("model.safetensors", "weights"),
        ("generation_config.json", None),
        ("LICENSE", None),
        ("README.md", None),
    ],
)
def test_files_of_the_model(
    identify: Identify, model: Path, file: str, key: str | None
) -> None:
    before = identify()
    if file.endswith(".safetensors"):  # written again, by its time
        os.utime(model / file)
    else:
        with (model / file).open("a") as stream:
            stream.write(" \n")
    assert differing(before, identify()) == ({key} if key else set())


@pytest.mark.parametrize("library", identity.LIBRARIES)
def test_libraries(
    identify: Identify, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before = identify()
    version = identity.version
    monkeypatch.setattr(
        identity, "version", lambda name: "9" if name == library else version(name)
    )
    assert differing(before, identify()) == {"library versions"}
