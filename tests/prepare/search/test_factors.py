# SPDX-License-Identifier: Apache-2.0
"""The ranks that are bought."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_rsparse.artifact.schema import model_sparsity
from vllm_rsparse.prepare.options import PrepareOptions
from vllm_rsparse.prepare.pipeline import prepare
from vllm_rsparse.prepare.recipe.files import recipe_json
from vllm_rsparse.prepare.recipe.recipes import RECIPES


def test_regressed_factors_are_for_q_and_k(pyllama: Path, tmp_path: Path) -> None:
    # "mixed" would take them only where less is lost, and on so little text it varies.
    recipe = tmp_path / "recipe.json"
    by_gradients = replace(
        RECIPES["best"], name="g", allocation="sensitivity", correction="always"
    )
    recipe.write_text(recipe_json(by_gradients))
    info = prepare(
        PrepareOptions(
            str(pyllama),
            tmp_path / "out",
            0.6,
            (Path(json.decoder.__file__),),
            samples=4,
            tokens=128,
            device="cpu",
            recipe=str(recipe),
        )
    )
    ranks = {name: entry.rank for name, entry in info.linears.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] > 0
    assert all(
        rank == 0
        for name, rank in ranks.items()
        if not name.endswith(("q_proj", "k_proj"))
    )
    # Half a rank of each factor is not spent.
    assert model_sparsity(info.linears) == pytest.approx(0.6, abs=3e-3)
    assert "regressed" in info.provenance["svd"]["largest_residual"]
