# SPDX-License-Identifier: Apache-2.0
"""Bytes that a token reads, counted here by hand."""

from typing import Any

import pytest

from vllm_rsparse.artifact.reads import (
    TOKEN_READS,
    LinearReads,
    head_reads,
    linear_reads,
    token_reads_of,
)
from vllm_rsparse.artifact.schema import ArtifactInfo, BaseWeights, LinearEntry

NAME = "model.layers.0.mlp.down_proj"


def info_of(entry: LinearEntry, **values: Any) -> ArtifactInfo:
    settings: dict[str, Any] = {
        "sparsity": 0.5,
        "linears": {NAME: entry},
        "dtype": "bfloat16",
        "tensors_sha256": "0" * 64,
        "base": BaseWeights("float", "bfloat16"),
    }
    return ArtifactInfo(**(settings | values))


def test_of_floats() -> None:
    entry = LinearEntry((16, 64), 0.5, 0.9, 2, kept_fraction=0.25, correction=True)
    found = linear_reads(info_of(entry))
    assert found == LinearReads(
        columns=2 * 16 * 64 * 0.25,
        factors=2 * 2 * (16 + 64),
        vectors=4 * (64 + 16),
        dense=2 * 16 * 64,
    )
    assert found.sparse == 512 + 320 + 320


def test_of_planes() -> None:
    """Two rows of thresholds; a group of 64 shares a scale and a zero point."""
    entry = LinearEntry((16, 192), 0.5, 1.0, 0, kept_fraction=0.5, full_fraction=0.25)
    found = linear_reads(info_of(entry, weights="int8-planes"))
    first, second = 16 / 2 + (16 * 2 + 16 / 2) / 64, 16 / 2
    assert found == LinearReads(
        columns=192 * (0.5 * first + 0.25 * second),
        vectors=4 * 2 * 192,
        dense=192 * (first + second),
    )


@pytest.mark.parametrize(("head", "width"), [("as-stored", 2), ("fp8", 1)])
def test_of_an_output_layer_whose_shape_is_not_known(head: str, width: int) -> None:
    """Artifacts of older releases have its elements alone."""
    entry = LinearEntry((16, 64), 0.5, 1.0, 0, kept_fraction=0.5)
    provenance = {TOKEN_READS: {"head": 1000, "experts": 300, "others": 50}}
    info = info_of(entry, head=head, provenance=provenance)
    assert head_reads(info) == LinearReads(columns=1000 * width, dense=1000 * width)
    parts = token_reads_of(info)
    assert parts["experts"] == LinearReads(columns=600, dense=600)
    assert parts["others"] == LinearReads(columns=100, dense=100)
    assert head_reads(info_of(entry)) is None
    assert token_reads_of(info_of(entry)) == {}
