# SPDX-License-Identifier: Apache-2.0
"""Models of random weights for ``bench_serve.py``: artifact and base agree."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from vllm_rsparse.artifact.prepared import open_artifact
from vllm_rsparse.formats.checkpoints.layout import format_of_layout
from vllm_rsparse.formats.checkpoints.parse import parse_scheme


@pytest.fixture
def random_model(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("random_model")


@pytest.mark.parametrize("weights", ["bf16", "fp8", "fp8-block", "int4"])
def test_the_artifact_names_the_format_of_its_base(
    random_model: ModuleType, tmp_path: Path, weights: str
) -> None:
    shape = random_model.SHAPES["tiny"]
    variant = random_model.Variant(weights)
    random_model.write_sparse_model(tmp_path, shape, [0.5], variant)
    info = open_artifact(tmp_path).info
    dictionary = random_model.WEIGHTS[weights]
    layout = None
    if dictionary is not None:
        layout = parse_scheme(dictionary, "config").layout(next(iter(info.linears)))
    assert format_of_layout(layout) == (info.base.format, info.base.group)


def test_planes_are_made_while_loading(
    random_model: ModuleType, tmp_path: Path
) -> None:
    shape = random_model.SHAPES["tiny"]
    planes = random_model.PLANES
    variant = random_model.Variant(planes, head="fp8")
    random_model.write_sparse_model(tmp_path, shape, [0.85, 0.15], variant)
    info = open_artifact(tmp_path).info
    assert (info.base.format, info.weights) == ("float", planes)
    assert info.head == "fp8"
    entry = next(iter(info.linears.values()))
    assert (entry.kept_fraction, entry.full_fraction) == (0.85, 0.15)
