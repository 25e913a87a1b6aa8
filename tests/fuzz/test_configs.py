# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile configs of models: what they name is inside, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rsparse.artifact import locate
from vllm_rsparse.artifact.prepared import open_artifact
from vllm_rsparse.errors import ArtifactError

from .documents import examples, mutated

LINEARS = {"model.layers.0.mlp.down_proj": (6, 8, 0, True)}


def test_artifact_stays_inside_the_model_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_artifact: Any
) -> None:
    """Whatever a config says: a relative path leads to a place inside, or nowhere."""
    model = tmp_path / "model"
    for folder in (model / "rsparse", model / "a" / "b", tmp_path / "outside"):
        write_artifact(folder, LINEARS)

    def no_network(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    parts = st.sampled_from(
        ["rsparse", "a", "b", "..", ".", "", "outside", "~", "x" * 300, "\0", "model"]
    )
    sources = st.lists(parts | st.text(max_size=5), min_size=1, max_size=6).map(
        "/".join
    )

    @examples(800)
    @given(sources.filter(lambda source: not source.startswith("/")))
    def check(source: str) -> None:
        settings = {"quant_method": "rsparse", "artifact": source}
        config = {"quantization_config": settings}
        (model / "config.json").write_text(json.dumps(config))
        for look in (
            lambda: locate.locate_artifact(source, str(model)),
            lambda: open_artifact(model).directory,
        ):
            try:
                found = look()
            except ArtifactError:
                continue
            assert found.resolve().is_relative_to(model.resolve())

    check()


def test_any_config_of_a_model(tmp_path: Path) -> None:
    config = {"quant_method": "rsparse", "artifact": "rsparse", "format_version": 1}

    @examples(300)
    @given(mutated({"quantization_config": config, "model_type": "llama"}))
    def check(document: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(document))
        with pytest.raises(ArtifactError):  # there is none, whatever is said
            open_artifact(tmp_path)

    check()


def test_any_quantization_config() -> None:
    config = pytest.importorskip("vllm_rsparse.serving.config").RSparseConfig
    base = {
        "quant_method": "rsparse",
        "format_version": 2,
        "artifact": "rsparse",
        "artifact_sha256": "0" * 64,
        "sparsity": 0.5,
        "max_sparse_tokens": 2,
        "backend": "cpu",
        "weights": "fp8",
        "head": "fp8",
    }

    @examples(500)
    @given(mutated(base))
    def check(document: dict[str, Any]) -> None:
        try:
            made = config.from_config(document)
        except ValueError:
            return
        # What was accepted is what was read, or is the base's own dictionary.
        if document.get("quant_method") in (None, "rsparse"):
            kept = base.keys() - {"quant_method", "format_version", "sparsity"}
            for key in kept:
                value, found = document.get(key), getattr(made.settings, key)
                assert (type(found), found) == (type(value), value)
        else:
            assert made.settings.base == document

    check()
